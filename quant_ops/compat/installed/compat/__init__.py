"""`from fewbits.compat import ...`, for scripts written against the classic tool."""

from fewbits.quant_ops.compat import *  # noqa: F403
