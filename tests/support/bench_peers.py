"""For benchmarks: what users run otherwise for the same layer, from torch, comfy-kitchen and bitsandbytes.

`LINEAR`, `QUANTIZE` and `DECODE` list them; `installed()` and `missing()` say which libraries are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version

import torch

from fewbits.kernels import activations
from fewbits.kernels.levels import E4M3, INT8
from support import bench_layers as gpu

Calls = list[Callable[[], object]]
Layer = gpu.Layer


@cache
def _why_missing(library: str) -> str | None:
    """Why a library cannot be measured; None when it can."""
    try:
        import_module(library)
    except ImportError as error:
        return f"{library} is not installed here ({error}); its rows are left out"
    if library == "comfy_kitchen" and torch.cuda.is_available():
        backend = import_module(library).list_backends()["cuda"]
        if not backend["available"]:
            return f"comfy_kitchen has no CUDA kernels here ({backend['unavailable_reason']}); its rows are left out"
    return None


def missing() -> list[str]:
    """One sentence per library whose rows will be left out."""
    found = {
        peer.library
        for peers in (*LINEAR.values(), *QUANTIZE.values(), *DECODE.values())
        for peer in peers
    }
    return [reason for library in sorted(found) if (reason := _why_missing(library))]


@dataclass(frozen=True)
class Peer:
    """One function of a library.

    `build(layer, x)` makes the same call on every copy of the layer, x as it arrives from the model; of a quantizer
    `build(weights)`, of a decoder `build(layer, dtype)`. `why_not(layer, x)` says in words which inputs it refuses.
    """

    name: str
    library: str
    build: Callable[..., Calls]
    why_not: Callable[..., str | None] = lambda *inputs: None

    @property
    def label(self) -> str:
        return f"{self.name}, {self.library.replace('_', '-')} {version(self.library)}"


def captured_ms(calls: Calls) -> tuple[float | None, str]:
    """Median milliseconds of one call in a captured graph, and words for a person; None where it cannot be captured."""
    try:
        ms = gpu.graph_time(calls)
    except RuntimeError as error:
        return None, f"cannot be captured in a CUDA graph: {str(error).splitlines()[0]}"
    return ms, f"{ms:.4f} ms"


def installed(peers: dict[str, tuple[Peer, ...]], kind: str) -> list[Peer]:
    return [peer for peer in peers.get(kind, ()) if _why_missing(peer.library) is None]


# Linears --------------------------------------------------------------------------------------------------------------


def _int_mm(layer: Layer, x: torch.Tensor) -> Calls:
    codes, _ = activations.quantize_activations(x, INT8, None)
    return [lambda c=c: torch._int_mm(codes, c.t()) for c in layer.codes]


def _scaled_mm(layer: Layer, x: torch.Tensor) -> Calls:
    codes, scale = activations.quantize_activations(x, E4M3, None)
    return [
        lambda c=c, s=s: torch._scaled_mm(codes, c.t(), scale, s.t(), out_dtype=x.dtype)
        for c, s in zip(layer.codes, layer.scales)
    ]


def _kitchen_int8(layer: Layer, x: torch.Tensor) -> Calls:
    import comfy_kitchen

    return [
        lambda c=c, s=s: comfy_kitchen.int8_linear(x, c, s, out_dtype=x.dtype)
        for c, s in zip(layer.codes, layer.scales)
    ]


def _kitchen_fp8(layer: Layer, x: torch.Tensor) -> Calls:
    """As ComfyUI runs float8_e4m3fn: one scale for the weight, x scaled by 1 (no calibration) and cast on the way."""
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    name = "TensorCoreFP8Layout"
    one = torch.ones((), device=x.device)
    params = get_layout_class(name).Params(
        scale=one, orig_dtype=x.dtype, orig_shape=tuple(layer.codes[0].shape)
    )
    weights = [QuantizedTensor(c, name, params) for c in layer.codes]
    return [
        lambda w=w: torch.nn.functional.linear(QuantizedTensor.from_float(x, name, scale=one), w)
        for w in weights
    ]


def _states(kind: str, layer: Layer, dtype: torch.dtype) -> list:
    """bitsandbytes' description of our codes: its bytes are ours."""
    from bitsandbytes import functional

    table = functional.get_4bit_type(kind.split()[0], layer.codes[0].device)
    n, half = layer.codes[0].shape
    shape = torch.Size((n, 2 * half))
    return [
        functional.QuantState(s, shape, table, 64, kind.split()[0], dtype) for s in layer.scales
    ]


def _bitsandbytes(kind: str) -> Callable[[Layer, torch.Tensor], Calls]:
    def build(layer: Layer, x: torch.Tensor) -> Calls:
        import bitsandbytes

        return [
            lambda c=c, s=s: bitsandbytes.matmul_4bit(x, c.view(-1, 1).t(), s)
            for c, s in zip(layer.codes, _states(kind, layer, x.dtype))
        ]

    return build


def _few_rows(layer: Layer, x: torch.Tensor) -> str | None:
    return None if len(x) > 16 else "torch._int_mm takes more than 16 rows only"


LINEAR = {
    "int8 row": (
        Peer("torch._int_mm alone", "torch", _int_mm, _few_rows),
        Peer("int8_linear", "comfy_kitchen", _kitchen_int8),
    ),
    "fp8 row": (
        Peer("torch._scaled_mm alone", "torch", _scaled_mm),
        Peer("float8_e4m3fn layout", "comfy_kitchen", _kitchen_fp8),
    ),
    "nf4 64": (Peer("matmul_4bit", "bitsandbytes", _bitsandbytes("nf4 64")),),
    "fp4 64": (Peer("matmul_4bit", "bitsandbytes", _bitsandbytes("fp4 64")),),
}


# Quantizers and decoders of weights -----------------------------------------------------------------------------------


def _quantize_4bit(kind: str) -> Callable[[list[torch.Tensor]], Calls]:
    def build(weights: list[torch.Tensor]) -> Calls:
        from bitsandbytes import functional

        return [
            lambda w=w: functional.quantize_4bit(w, blocksize=64, quant_type=kind.split()[0])
            for w in weights
        ]

    return build


def _decode_4bit(kind: str) -> Callable[[Layer, torch.dtype], Calls]:
    def build(layer: Layer, dtype: torch.dtype) -> Calls:
        from bitsandbytes import functional

        states = _states(kind, layer, dtype)
        return [
            lambda c=c, s=s: functional.dequantize_4bit(c.view(-1, 1), s)
            for c, s in zip(layer.codes, states)
        ]

    return build


def _quantize_kitchen(name: str, **options: object) -> Callable[[list[torch.Tensor]], Calls]:
    def build(weights: list[torch.Tensor]) -> Calls:
        from comfy_kitchen.tensor import get_layout_class

        layout = get_layout_class(name)
        return [lambda w=w: layout.quantize(w, **options) for w in weights]

    return build


def _decode_kitchen_int8(layer: Layer, dtype: torch.dtype) -> Calls:
    from comfy_kitchen.tensor import get_layout_class

    layout = get_layout_class("TensorWiseINT8Layout")
    shape = tuple(layer.codes[0].shape)
    made = [layout.Params(scale=s, orig_dtype=dtype, orig_shape=shape) for s in layer.scales]
    return [lambda c=c, p=p: layout.dequantize(c, p) for c, p in zip(layer.codes, made)]


def _decode_kitchen_fp8(layer: Layer, dtype: torch.dtype) -> Calls:
    import comfy_kitchen

    one = torch.ones((), device=layer.codes[0].device)
    return [lambda c=c: comfy_kitchen.dequantize_per_tensor_fp8(c, one, dtype) for c in layer.codes]


QUANTIZE = {
    "int8 row": (
        Peer("rows", "comfy_kitchen", _quantize_kitchen("TensorWiseINT8Layout", per_channel=True)),
    ),
    "fp8 row": (Peer("one scale", "comfy_kitchen", _quantize_kitchen("TensorCoreFP8Layout")),),
    "nf4 64": (Peer("quantize_4bit", "bitsandbytes", _quantize_4bit("nf4 64")),),
    "fp4 64": (Peer("quantize_4bit", "bitsandbytes", _quantize_4bit("fp4 64")),),
}
DECODE = {
    "int8 row": (Peer("rows", "comfy_kitchen", _decode_kitchen_int8),),
    "fp8 row": (Peer("one scale", "comfy_kitchen", _decode_kitchen_fp8),),
    "nf4 64": (Peer("dequantize_4bit", "bitsandbytes", _decode_4bit("nf4 64")),),
    "fp4 64": (Peer("dequantize_4bit", "bitsandbytes", _decode_4bit("fp4 64")),),
}
