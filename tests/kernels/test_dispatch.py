"""The choice of a backend is remembered by what it depends on, and by nothing else."""

import gc
import weakref

import pytest
import torch

from fewbits.kernels import dispatch, runtime
from fewbits.kernels.codebook4 import NF4
from fewbits.kernels.device import CLASSES, as_if
from fewbits.kernels.dispatch import Op, use_backend
from fewbits.kernels.levels import E4M3, INT8
from fewbits.kernels.scales import Geometry


@pytest.fixture
def doubled():
    """An op of which `few` takes up to 4 rows of float32 and a positive number; `asked` counts how often it was asked."""
    made = Op("doubled", lambda x, number, bias: "eager")
    made.asked = 0

    def why_not(x, number, bias):
        made.asked += 1
        if x.dtype != torch.float32 or x.device.type != "cpu" or number < 0:
            return "not mine"
        return "too many rows" if len(x) > 4 else None

    made.backend("few", why_not)(lambda x, number, bias: "few")
    return made


def test_a_decision_is_made_once_for_equal_shapes_dtypes_devices_and_numbers(doubled):
    memory = torch.arange(100.0)
    same = (
        torch.ones(4, 8),
        memory[:32].view(4, 8),
        memory[1:33].view(4, 8),
        memory.as_strided((4, 8), (1, 4)),
    )
    assert [doubled(x, 1, None) for x in same] == ["few"] * 4 and doubled.asked == 1


@pytest.mark.parametrize(
    ("x", "number", "bias", "wanted"),
    [
        (torch.ones(5, 8), 1, None, "eager"),
        (torch.ones(4, 9), 1, None, "few"),
        (torch.ones(0, 8), 1, None, "few"),
        (torch.ones(4, 8).half(), 1, None, "eager"),
        (torch.ones(4, 8, device="meta"), 1, None, "eager"),
        (torch.ones(4, 8), -1, None, "eager"),
        (torch.ones(4, 8), 1, torch.ones(3), "few"),
    ],
    ids=["more rows", "longer rows", "no rows", "dtype", "device", "number", "bias"],
)
def test_other_inputs_get_a_decision_of_their_own(doubled, x, number, bias, wanted):
    known = torch.ones(4, 8)
    for _ in range(2):
        assert doubled(known, 1, None) == "few" and doubled(x, number, bias) == wanted
    assert doubled.asked == 2


def test_a_forced_backend_neither_uses_what_is_remembered_nor_is_remembered(doubled):
    few, many = torch.ones(4, 8), torch.ones(5, 8)
    with use_backend("eager"):
        assert doubled(few, 1, None) == "eager"
    assert doubled(few, 1, None) == "few" and doubled(many, 1, None) == "eager"
    with use_backend("eager"):
        assert doubled(few, 1, None) == "eager"
        with (
            use_backend("few"),
            pytest.raises(RuntimeError, match="doubled: backend few cannot run: too many rows"),
        ):
            doubled(many, 1, None)
        assert doubled(few, 1, None) == "eager"
    assert doubled(few, 1, None) == "few" and doubled(many, 1, None) == "eager"


def test_a_backend_that_is_registered_later_gets_its_turn(doubled):
    assert doubled(torch.ones(9, 8), 1, None) == "eager"
    doubled.backend("any", lambda x, number, bias: None)(lambda x, number, bias: "any")
    assert doubled(torch.ones(9, 8), 1, None) == "any"


def test_what_is_remembered_has_a_bound_and_holds_no_tensor(doubled, monkeypatch):
    monkeypatch.setattr(dispatch, "REMEMBERED", 5)
    for rows in (*range(1, 13), *range(1, 13)):
        assert doubled(torch.ones(rows, 8), 1, None) == ("few" if rows <= 4 else "eager")
        assert len(doubled.chosen) <= 5
    x = torch.ones(3, 8)
    seen = weakref.ref(x)
    doubled(x, 1, None)
    del x
    gc.collect()
    assert seen() is None


@pytest.fixture
def hopper():
    """Tensors without storage count as lying on an H200."""
    with as_if(CLASSES["sm_90"]):
        yield


def test_a_decision_follows_the_order_and_says_what_could_not_run(doubled):
    doubled.order = lambda x, number, bias: [("few", "fast"), ("eager", "exact")]
    found = doubled.decide(torch.ones(4, 8), 1, None)
    assert (found.backend, found.why, found.cannot) == ("few", "fast", {})
    found = doubled.decide(torch.ones(5, 8), 1, None)
    assert (found.backend, found.why, found.cannot) == ("eager", "exact", {"few": "too many rows"})


def test_what_a_gpu_elsewhere_would_run_is_not_remembered():
    x, codes = (torch.empty(16, 64, device="meta", dtype=d) for d in (torch.bfloat16, torch.int8))
    inputs = (x, codes, torch.empty(16, 1, device="meta"), INT8, Geometry(1, None), None)
    with as_if(CLASSES["sm_90"]):
        assert runtime.linear_tiles.choose(*inputs)[0] == "cuda"
    assert runtime.linear_tiles.choose(*inputs)[0] == "dequantize"


@pytest.mark.parametrize("m", [1, 16, 64, 256, 300, 1024, 4608])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_linear_chooses_by_strides_or_addresses(hopper, m, dtype):
    """Else a decision could not be remembered."""
    n, k = 3072, 12288
    whole = torch.empty(m, k, dtype=dtype, device="meta")
    odd = torch.empty(m, k + 24, dtype=dtype, device="meta")[:, 3 : k + 3]
    for levels in (INT8, E4M3):
        codes = torch.empty(n, k, dtype=levels.dtype, device="meta")
        for geometry in (Geometry(1, None), Geometry(128, 128), Geometry(1, 64)):
            scale = torch.empty(geometry.grid_shape((n, k)), device="meta")
            rest = scale, levels, geometry, None
            wanted = runtime.linear_tiles.reasons(whole, codes, *rest)
            assert wanted == runtime.linear_tiles.reasons(odd, codes, *rest)
            assert wanted == runtime.linear_tiles.reasons(
                whole, torch.empty_like(codes.t()).t(), *rest
            )
            assert any(reason is None for reason in wanted.values())
    packed, absmax = (
        torch.empty(s, dtype=d, device="meta")
        for s, d in (((n, k // 2), torch.uint8), (n * k // 64, None))
    )
    wanted = runtime.linear_flat4.reasons(whole, packed, absmax, NF4, 64, None)
    assert wanted == runtime.linear_flat4.reasons(odd, packed, absmax, NF4, 64, None)
    assert any(reason is None for reason in wanted.values())
