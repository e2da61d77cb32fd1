import pytest
import torch
from formats.reference import hadamard

from fewbits.kernels.hadamard import is_group_size, rotate
from fewbits.kernels.scales import CHUNK_ELEMENTS

GROUPS = (4, 16, 64, 256, 1024)


def test_a_unit_vector_becomes_its_golden_row():
    e5 = torch.zeros(1, 16)
    e5[0, 5] = 1
    assert (rotate(e5, 16) * 4).int().tolist() == [[1, 1, -1, 1, 1, 1, -1, 1, -1, -1, 1, -1, 1, 1, -1, 1]]


def test_a_ramp_is_a_fixed_point_of_the_smallest_rotation():
    assert rotate(torch.tensor([[1.0, 2, 3, 4]]), 4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("group", GROUPS)
def test_unit_vectors_become_the_rows_of_the_hadamard_matrix_exactly(group):
    assert torch.equal(rotate(torch.eye(group), group), torch.from_numpy(hadamard(group)).float())


@pytest.mark.parametrize("group", GROUPS)
def test_rotating_twice_gives_integers_back_exactly(group):
    x = torch.randint(-8, 9, (5, 2 * group), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(rotate(rotate(x, group), group), x)


@pytest.mark.parametrize("group", GROUPS)
def test_random_weights_are_within_rounding_of_a_float64_matrix_product(group):
    x = torch.randn(7, 2 * group, generator=torch.Generator().manual_seed(1))
    exact = (x.double().view(-1, group) @ torch.from_numpy(hadamard(group))).view(x.shape)
    assert (rotate(x, group) - exact).abs().max() <= 1e-6 * x.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_result_is_float32_of_the_widened_weight_and_the_input_is_kept(dtype):
    x = torch.randn(3, 64).to(dtype)
    before = x.clone()
    assert torch.equal(rotate(x, 64), rotate(x.float(), 64))
    assert rotate(x, 64).dtype == torch.float32
    assert torch.equal(x, before)


def test_a_slice_of_a_larger_matrix_and_one_in_several_chunks_are_rotated_alike():
    x = torch.randn(CHUNK_ELEMENTS // 1024 + 3, 1024)
    whole = rotate(x, 256)
    assert torch.equal(whole[-5:], rotate(x[-5:], 256))
    assert torch.equal(rotate(x.t().contiguous().t()[:9], 256), whole[:9])


@pytest.mark.parametrize(
    ("size", "allowed"), [(4, True), (64, True), (1024, True), (2, False), (32, False), (4096, False)]
)
def test_group_sizes_are_powers_of_four_from_4_to_1024(size, allowed):
    assert is_group_size(size) is allowed
