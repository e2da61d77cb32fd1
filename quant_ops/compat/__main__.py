"""`python -m fewbits.quant_ops.compat`: the classic command without installing it."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
