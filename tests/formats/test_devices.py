"""Every format gives the same bytes on every device, on random and on edge tensors."""

import pytest
import torch

from fewbits.kernels.codebook4 import fast_codes, round_e2m1, round_fp4, round_nf4
from fewbits.kernels.w4a8 import round_level
from fewbits.quant_ops.formats import get_format
from support.codec import CANONICAL, decode, encode, layer_of, specs_of, wish
from support.vectors import raw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def edges() -> torch.Tensor:
    """Powers of two, ties, subnormals of the codes, huge and tiny values, signed zeros, zero rows and blocks."""
    powers = [2.0**-90, -(2.0**-81), 2.0**-79]
    values = torch.tensor(
        [0.0, -0.0, *powers, 1e-8, -1e-8, 0.5, 1.5, 2.5, 3.5, 5.0, 6.0, 448.0, 1e30]
    )
    weight = values[
        torch.randint(0, len(values), (128, 512), generator=torch.Generator().manual_seed(0))
    ]
    weight *= torch.randint(-3, 4, weight.shape, generator=torch.Generator().manual_seed(1))
    weight[::7] = 0
    weight[1::7, 64:128] = 0
    weight[2::7] *= 1e-20
    weight[3::7] *= 2.0**-40
    return weight


INPUTS = {
    "float32": lambda: torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)) * 0.03,
    "bfloat16": lambda: (
        torch.randn(512, 1024, generator=torch.Generator().manual_seed(3)) * 0.03
    ).bfloat16(),
    "float16": lambda: torch.randn(256, 512, generator=torch.Generator().manual_seed(4)).half(),
    "float64": lambda: torch.randn(128, 512, generator=torch.Generator().manual_seed(5)).double(),
    "large": lambda: torch.randn(2048, 4096, generator=torch.Generator().manual_seed(6)).bfloat16(),
    "odd": lambda: torch.randn(97, 576, generator=torch.Generator().manual_seed(7)).bfloat16(),
    "edges": edges,
    "zeros": lambda: torch.zeros(64, 256),
}


@pytest.mark.parametrize("source", INPUTS)
@pytest.mark.parametrize("case", CANONICAL)
def test_cuda_writes_the_bytes_of_the_cpu_and_decodes_them_to_the_same_values(case, source):
    name, options = wish(case)
    weight = INPUTS[source]()
    refusal = get_format(name).check(layer_of(weight), options)
    if refusal and not refusal.startswith("padding"):
        weight = weight[: weight.shape[0] // 16 * 16].contiguous()
    here, marker = encode(name, weight, options)
    there, _ = encode(name, weight.cuda(), options)
    assert specs_of(here) == specs_of(there)
    for suffix in here:
        assert there[suffix].is_cuda
        assert raw(here[suffix]) == raw(there[suffix]), suffix
    assert torch.equal(decode(name, here, marker), decode(name, there, marker).cpu())


@pytest.mark.parametrize(
    "round_",
    [round_nf4, round_fp4, round_e2m1, round_level],
    ids=["nf4", "fp4", "e2m1", "w4a8 level"],
)
def test_the_cpu_table_equals_the_rounding_function_for_every_float32(round_):
    """All 2^32 bit patterns but infinities and NaN, 2^26 at a time."""
    for start in range(-(2**31), 2**31, 2**26):
        x = (
            torch.arange(start, start + 2**26, dtype=torch.int64, device="cuda")
            .to(torch.int32)
            .view(torch.float32)
        )
        expected = round_(x).to(torch.uint8)
        finite = x.isfinite()
        found = fast_codes(x.cpu(), round_).cuda()
        assert torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("case", CANONICAL)
def test_the_reported_error_agrees_across_devices(case):
    name, options = wish(case)
    format, weight = get_format(name), INPUTS["bfloat16"]()
    errors = []
    for device in ("cpu", "cuda"):
        prepared = format.prepare(weight.to(device), options)
        grid = format.grid(layer_of(weight), options)
        scale = grid.scale(prepared)
        error, signal, *_ = grid.deviation(prepared, grid.encode(prepared, scale), scale)
        errors.append((error / signal) ** 0.5)
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
