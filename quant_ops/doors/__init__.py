"""What is done with whole files: one door each, the same for commands, nodes and scripts."""

from .compare import compare_files
from .convert import Conversion, convert_file
from .inspect import Inspection, inspect_file
from .quantize import quantize_file
from .repair import Repair, repair_file
from .verify import verify_file

__all__ = [
    "Conversion",
    "Inspection",
    "Repair",
    "compare_files",
    "convert_file",
    "inspect_file",
    "quantize_file",
    "repair_file",
    "verify_file",
]
