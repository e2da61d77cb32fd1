"""Makes `import fewbits` load this checkout without installing it; the checkout itself never enters sys.path.

(Its `nodes` would shadow ComfyUI's module of that name.)
"""

import importlib.util
import sys
from pathlib import Path

_root = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location(
    __name__, _root / "__init__.py", submodule_search_locations=[str(_root)]
)
_module = importlib.util.module_from_spec(_spec)
sys.modules[__name__] = _module  # import returns what stands here, so this file leaves no trace
_spec.loader.exec_module(_module)
