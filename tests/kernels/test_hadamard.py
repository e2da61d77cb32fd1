import pytest
import torch

from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.hadamard import is_group_size, rotate
from fewbits.kernels.scales import CHUNK_ELEMENTS
from fewbits.quant_ops.reference import hadamard

GROUPS = (4, 16, 64, 256, 1024)


def test_a_unit_vector_becomes_its_golden_row():
    e5 = torch.zeros(1, 16)
    e5[0, 5] = 1
    assert (rotate(e5, 16) * 4).int().tolist() == [
        [1, 1, -1, 1, 1, 1, -1, 1, -1, -1, 1, -1, 1, 1, -1, 1]
    ]


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
    ("size", "allowed"),
    [(4, True), (64, True), (1024, True), (2, False), (32, False), (4096, False)],
)
def test_group_sizes_are_powers_of_four_from_4_to_1024(size, allowed):
    assert is_group_size(size) is allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1024), (9, 3072), (257, 5120)], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_the_kernel_gives_the_bits_of_eager_and_of_the_cpu(group, shape, dtype):
    x = (
        torch.randn(shape, device="cuda")
        .mul_(torch.logspace(-8, 4, shape[1], device="cuda"))
        .to(dtype)
    )
    x[0, :4] = -0.0
    with use_backend("eager"):
        expected = rotate(x, group)
    with use_backend("triton"):
        got, strided = rotate(x, group), rotate(x.t().contiguous().t(), group)
    for other in (strided, expected, rotate(x.cpu(), group).cuda()):
        assert torch.equal(got.view(torch.int32), other.view(torch.int32))


@pytest.mark.gpu
def test_nan_stays_in_its_group():
    x = torch.ones(3, 1024, device="cuda")
    x[1, 300] = float("nan")
    expected = torch.zeros(3, 1024, dtype=torch.bool)
    expected[1, 256:512] = True
    assert torch.equal(rotate(x, 256).isnan().cpu(), expected)


def test_float64_has_no_kernel():
    assert rotate.reasons(torch.zeros(1, 4, dtype=torch.float64), 4) == {"triton": "float64 weight"}
