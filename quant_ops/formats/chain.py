"""Where a layer goes whose shape a format cannot hold: the next format, and what is stated about
it.
"""

from __future__ import annotations

from collections.abc import Mapping

Next = tuple[str, Mapping[str, object]]

INT8_ROW: Next = ("int8_tensorwise", {"scaling": "row"})
FP8_ROW: Next = ("float8_e4m3fn_rowwise", {"scaling": "row"})
FP8_TENSOR: Next = ("float8_e4m3fn", {"scaling": "tensor"})
