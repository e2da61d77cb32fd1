"""The import package of the classic tool, as FewBits provides it."""

from fewbits.quant_ops.compat import *  # noqa: F403
