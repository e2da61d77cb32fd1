"""docs/formats.md#labels-from-shapes, for N = 256 and K = 128."""

import pytest

from fewbits.quant_ops.checkpoint.labels import label_of
from fewbits.quant_ops.errors import CheckpointError

READ = {
    "F8_E4M3": {
        "float8_e4m3fn": [(), (1,), (1, 1)],
        "float8_e4m3fn_rowwise": [(256,), (256, 1), (256, 1, 1)],
        "float8_e4m3fn_blockwise 64": [(4, 2)],
        "float8_e4m3fn_block3d 64": [(256, 2, 1), (256, 2)],
        None: [(128,), (8,), (4, 4), (1, 128), (256, 128), (0,)],
    },
    "F8_E5M2": {"float8_e5m2": [()], None: [(256,), (4, 2)]},
    "I8": {
        "int8_tensorwise": [(), (1,), (256,), (256, 1)],
        "int8_lodewise 64": [(256, 2)],
        "int8_blockwise 64": [(4, 2)],
        "int8_blockwise 128": [(2, 1)],
        None: [(128,)],
    },
}
CASES = [
    (dtype, shape, label)
    for dtype, rows in READ.items()
    for label, shapes in rows.items()
    for shape in shapes
]


@pytest.mark.parametrize(
    "dtype, shape, label", CASES, ids=[f"{d} {s} {n or 'refused'}" for d, s, n in CASES]
)
def test_every_shape_has_one_reading_or_none(dtype, shape, label):
    if label is None:
        with pytest.raises(CheckpointError, match="weight_scale is .* 256x128 allows"):
            label_of(dtype, (256, 128), shape)
        return
    found = label_of(dtype, (256, 128), shape)
    assert f"{found.format} {found.size}" == label if found.size else found.format == label


def test_rows_and_the_whole_tensor_are_one_int8_format_with_two_scalings():
    assert label_of("I8", (256, 128), (256,)).options == {"scaling": "row"}
    assert label_of("I8", (256, 128), ()).options == {"scaling": "tensor"}


def test_a_single_block_is_one_only_when_the_tag_says_so():
    assert label_of("F8_E4M3", (64, 64), (1, 1), "float8_e4m3fn_blockwise", 64).size == 64
    assert (
        label_of("F8_E4M3", (64, 64), (1, 1), "float8_e4m3fn_blockwise", 32).format
        == "float8_e4m3fn"
    )
    assert label_of("F8_E4M3", (64, 64), (), "int8_blockwise", 64).format == "float8_e4m3fn"


def test_other_dtypes_have_no_label():
    with pytest.raises(CheckpointError, match="weight is U8"):
        label_of("U8", (256, 128), ())
