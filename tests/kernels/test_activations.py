"""The quantizer of activations: eager is the spec; on a GPU the kernel errs at most twice as much."""

import re

import pytest
import torch

from fewbits.kernels.activations import quantize_activations
from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.grids import decode
from fewbits.kernels.levels import E4M3, INT8
from fewbits.kernels.scales import Geometry

by_levels = pytest.mark.parametrize("levels", [INT8, E4M3], ids=lambda levels: levels.name)
by_group = pytest.mark.parametrize(
    "group", [None, 64, 128], ids=lambda group: f"group {group or 'row'}"
)


def decoded(codes, scale, levels, group):
    return decode(codes, scale, levels, Geometry(1, group)).double()


@by_levels
@by_group
def test_rows_of_zeros_and_of_nan_show_it(group, levels):
    x = (3 * torch.randn(5, 256)).bfloat16()
    x[0], x[1, 7] = 0, float("nan")
    codes, scale = quantize_activations(x, levels, group)
    assert codes.dtype == levels.dtype
    assert (scale[0] == 1).all() and not codes[0].view(torch.uint8).any()
    assert not scale[1, 0].isfinite() and scale[2:].isfinite().all()
    truth = x[2:].double()
    error = (decoded(codes[2:], scale[2:], levels, group) - truth).norm() / truth.norm()
    assert 1e-3 < error < 0.04  # what 8 bits cost


class Compiled:
    """What Triton returns from a launch."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.log = log

    def launch_metadata(self, *arguments):
        return None

    def run(self, x, y, z, stream, function, metadata, what, enter, leave, *arguments):
        self.log.append(("direct", (x, y, z), arguments))


class Kernel:
    __name__ = "_twice"

    def __init__(self):
        self.log = []

    def __getitem__(self, grid):
        def start(*arguments, num_warps, num_stages):
            self.log.append(("Triton", grid, arguments))
            return Compiled(self.log)

        return start


def test_triton_is_asked_again_only_when_it_would_compile_anew(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from fewbits.kernels.triton.launch import launch

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    kernel, x = Kernel(), torch.zeros(64)

    def start(*tensors, number=1, num_warps=4):
        launch(kernel, (2, 1, 1), tensors, number, num_warps=num_warps)
        how, grid, arguments = kernel.log[-1]
        assert grid == (2, 1, 1) and arguments == (*tensors, number)
        return how

    assert start(x) == "Triton" and start(x) == "direct" == start(torch.ones(64))
    assert start(x[1:]) == "Triton" and start(x[1:]) == "direct" == start(
        x[5:]
    )  # not a multiple of 16 bytes
    assert (
        start(x.half()) == "Triton" == start(x, number=16) == start(x, num_warps=8) == start(x, x)
    )
    assert start(x) == "direct" == start(x, number=16)


def test_a_first_use_that_takes_long_is_logged_once(monkeypatch, caplog):
    pytest.importorskip("triton", reason="triton is not installed")
    from fewbits.kernels.triton import launch

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    quick, slow = Kernel(), Kernel()
    with caplog.at_level("INFO", logger="fewbits"):
        launch.launch(quick, (1, 1, 1), (torch.zeros(4),), num_warps=4)
        monkeypatch.setattr(launch, "LOGGED", 0.0)
        for direct in (False, True):
            monkeypatch.setattr(launch, "DIRECT", direct)
            for _ in range(3):
                launch.launch(slow, (1, 1, 1), (torch.zeros(4),), num_warps=4)
    (record,) = caplog.records
    assert re.fullmatch(
        r"first use of the Triton kernel test_activations.twice took 0.0 s: compiled, then cached",
        record.getMessage(),
    )
    assert [how for how, *_ in slow.log] == ["Triton"] * 3 + ["direct"] * 3


# GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@by_levels
@by_group
@pytest.mark.parametrize(
    "shape", [(1, 128), (3, 1152), (17, 3200), (300, 13056)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernel_errs_at_most_twice_as_much_as_eager(dtype, shape, group, levels):
    m, k = shape
    x = (3 * torch.randn(m, k + 16, device="cuda")).to(dtype)[:, :k]
    codes, scale = quantize_activations(x, levels, group)
    with use_backend("eager"):
        eager = quantize_activations(x, levels, group)
    truth = x.double()
    got, reference = decoded(codes, scale, levels, group), decoded(*eager, levels, group)
    assert (got - truth).abs().max() <= 2 * (reference - truth).abs().max()
    assert scale.shape == eager[1].shape and scale.stride(0) == 1
    again = quantize_activations(x, levels, group)
    assert torch.equal(again[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(
        again[1], scale
    )


@pytest.mark.gpu
@by_levels
@by_group
def test_zeros_nan_and_extremes_come_through(group, levels):
    x = torch.randn(6, 384, device="cuda", dtype=torch.bfloat16)
    x[0], x[1, 3], x[2], x[3], x[4] = 0, float("nan"), -1e30, 1e30, 1e-30
    codes, scale = quantize_activations(x, levels, group)
    assert (scale[0] == 1).all() and not codes[0].view(torch.uint8).any()
    assert not scale[1, 0].isfinite()
    values = decoded(codes, scale, levels, group)
    assert (
        torch.allclose(values[2], x[2].double(), rtol=1e-2)
        and torch.allclose(values[3], x[3].double(), rtol=1e-2)
        and values[5].isfinite().all()
    )


@pytest.mark.gpu
def test_an_address_of_another_alignment_is_not_taken_for_the_remembered_one():
    storage = torch.randn(4 * 1024 + 8, device="cuda").bfloat16()
    for offset in (0, 1, 8, 3):  # the kernel that reads 16 bytes at a time is compiled first
        x = storage[offset : offset + 4096].view(4, 1024)
        with use_backend("eager"):
            expected = quantize_activations(x, INT8, None)
        for _ in range(2):
            assert all(
                torch.equal(a, b)
                for a, b in zip(quantize_activations(x, INT8, None), expected, strict=True)
            )
