"""Benchmarks compare like with like: the libraries that are here compute our product and our weights."""

import pytest
import torch

from support import bench_layers as gpu
from support import bench_peers as peers

KINDS = (
    "int8 row",
    "nf4 64",
    "fp4 64",
)  # comfy-kitchen's FP8 has one scale, which our codes do not


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_peers_compute_what_ours_does(kind):
    layer = gpu.layer(kind, 64, 256, "cpu")
    x = torch.randn(3, 256).bfloat16()
    for peer in peers.installed(peers.LINEAR, kind):
        if peer.why_not(layer, x) is None:
            calls = peer.build(layer, x)
            assert len(calls) == len(layer.codes)
            assert difference(calls[0](), layer.linears(kind, x)[0]()) < 0.02, peer.label
    for peer in peers.installed(peers.DECODE, kind):
        decoded = peer.build(layer, torch.bfloat16)[0]()
        assert torch.equal(decoded, layer.dequantizes(kind, torch.bfloat16)[0]()), peer.label


def test_a_library_that_is_not_here_is_named(monkeypatch):
    absent = peers.Peer("f", "no_such_library", lambda *inputs: [])
    monkeypatch.setattr(peers, "LINEAR", {"nf4 64": (absent,)})
    assert peers.installed(peers.LINEAR, "nf4 64") == []
    assert any(
        reason.startswith("no_such_library is not installed here") for reason in peers.missing()
    )
