"""The INT8 product of the servers that the tests start: torch's own, to the last bit."""

import pytest
import torch

from support.harness.first_word import COLUMNS, whole_product


def codes(*shape):
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("columns", [1, 64, COLUMNS, COLUMNS + 1, 3 * COLUMNS])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_it_is_torchs_product(rows, columns):
    a, b = codes(rows, columns), codes(columns, 24)
    product = whole_product(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product, torch._int_mm(a, b))
    weight = codes(24, columns)
    assert torch.equal(whole_product(a, weight.t()), torch._int_mm(a, weight.t()))


def test_the_largest_sums_are_exact():
    """-128 everywhere but in one code: the sums differ from the largest ones by 1 x 128."""
    a = torch.full((17, 2 * COLUMNS), -128, dtype=torch.int8)
    a[3, 5] = -127
    b = torch.full((2 * COLUMNS, 8), -128, dtype=torch.int8)
    product = whole_product(a, b)
    assert torch.equal(product, torch._int_mm(a, b))
    assert product[0, 0] - product[3, 0] == 128
