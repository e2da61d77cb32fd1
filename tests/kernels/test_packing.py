import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.kernels.packing import (
    pack_nibbles,
    pad_to,
    round_up,
    swizzle_scales,
    swizzled_shape,
    unpack_nibbles,
    unswizzle_scales,
)


@pytest.mark.parametrize(
    ("high_first", "expected"), [(True, [0x12, 0xF0]), (False, [0x21, 0x0F])], ids=["high", "low"]
)
def test_two_codes_share_a_byte_in_the_stated_order(high_first, expected):
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes, high_first).tolist() == [expected]


def test_signed_codes_are_packed_as_twos_complement_nibbles():
    codes = torch.tensor([[-7, 7, -1, 0]], dtype=torch.int8)
    assert pack_nibbles(codes, high_first=False).tolist() == [[0x79, 0x0F]]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20), half=st.integers(1, 40), high_first=st.booleans(), seed=st.integers(0, 99)
)
def test_unpacking_returns_the_codes_that_were_packed(n, half, high_first, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, 2 * half), generator=generator, dtype=torch.uint8)
    packed = pack_nibbles(codes, high_first)
    assert packed.shape == (n, half)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, high_first), codes)


GOLDEN_OFFSETS = {
    (0, 0): 0, (0, 3): 3, (0, 4): 512, (1, 0): 16, (32, 0): 4, (33, 5): 533, (127, 7): 1023, (128, 0): 1024,
}  # fmt: skip


def test_swizzled_offsets_are_the_golden_ones():
    for (r, c), offset in GOLDEN_OFFSETS.items():
        grid = torch.zeros(129, 8, dtype=torch.uint8)
        grid[r, c] = 1
        assert swizzle_scales(grid).flatten().nonzero().flatten().tolist() == [offset]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), cols=st.integers(1, 20))
def test_every_swizzled_offset_follows_the_formula_and_unswizzles(rows, cols):
    grid = torch.arange(1, rows * cols + 1, dtype=torch.int32).view(rows, cols)
    stored = swizzle_scales(grid)
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    assert tuple(stored.shape) == (padded_rows, padded_cols)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    quarter = padded_cols // 4
    offset = ((r // 128) * quarter + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    assert torch.equal(stored.flatten()[offset], grid)
    assert int((stored != 0).sum()) == rows * cols
    assert torch.equal(unswizzle_scales(stored, rows, cols), grid)


@pytest.mark.parametrize(
    ("size", "step", "expected"), [(1, 32, 32), (32, 32, 32), (33, 32, 64), (0, 16, 0)]
)
def test_sizes_are_rounded_up(size, step, expected):
    assert round_up(size, step) == expected


def test_padding_appends_zeros_and_leaves_a_full_matrix_alone():
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    padded = pad_to(x, 4, 8)
    assert padded.shape == (4, 8)
    assert torch.equal(padded[:3, :5], x) and float(padded.sum()) == 15
    assert pad_to(x, 3, 5) is x
