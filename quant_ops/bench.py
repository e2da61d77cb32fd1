"""Time this device: every format's linear against bf16 and against decoding first, and which kernel
runs and why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch.nn.functional import linear

from .formats import FORMATS, get_format
from .formats.base import Format
from .sources import TORCH_DTYPES
from .spec import FormatOptions, LayerInput

ROWS = (1, 16, 256, 4096)  # rows of x: a time step, a short prompt, a small picture, a picture
SHAPE = (12288, 3072)  # (N, K) of a Flux layer
CACHE_BYTES = 150e6  # copies of a weight are timed in turn until they exceed every GPU's cache

# What a backend of `linear_tiles` and `linear_flat4` is called in a sentence.
WORDS = {
    "hopper": "native CUDA for sm_90",
    "cuda": "native CUDA",
    "triton": "native Triton",
    "torch": "torch's scaled matmul",
    "dequantize": "decoded, then the library's matmul",
    "eager": "eager PyTorch",
    "decoded": "decoded, then the library's matmul",
}
# Reasons that say nothing to a user: another path was the better one for this format or shape.
_BETTER = ("is faster", "INT8 codes", "torch has no", "measured on", "has no wgmma")


def kernel_report(
    formats: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = SHAPE,
) -> list[dict]:
    """Which kernel multiplies each format on a device, at default options; nothing is computed or
    compiled.

    Returns:
        Per format: `format`; `rows`, {rows of x: {"backend", "why_not": {other backend: reason}}};
            `native_since`, the
        ComfyUI from which comfy-kitchen multiplies it instead, or None; `text`, one line in plain
        words, such as "int8_blockwise: native Triton".
    """
    device = torch.device(device)
    return [
        _report(get_format(name), device, dtype, shape)
        for name in (FORMATS if formats is None else formats)
    ]


def _report(
    format: Format, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> dict:
    options, layer = format.resolve(FormatOptions()), LayerInput(shape, "BF16")
    stored = {
        suffix: torch.empty((), dtype=TORCH_DTYPES[code], device=device).expand(size)
        for suffix, (code, size) in format.tensor_specs(layer, options).items()
    }
    rows = {}
    for m in ROWS:
        x = torch.empty((), dtype=dtype, device=device).expand(m, shape[1])
        product = format.product(stored, layer, options)
        if product is None:
            rows[m] = {
                "backend": "decoded",
                "why_not": {"kernel": f"no kernel multiplies {format.name} codes"},
            }
        else:
            op, arguments = product
            inputs = (x, *arguments, None)
            rows[m] = {"backend": op.choose(*inputs)[0], "why_not": op.reasons(*inputs)}
    since = format.min_comfyui if format.native else None
    text = f"{format.name}: {_sentence(rows)}" + (
        f"; comfy-kitchen's in ComfyUI {since} or newer" if since else ""
    )
    return {"format": format.name, "rows": rows, "native_since": since, "text": text}


def _sentence(rows: dict[int, dict]) -> str:
    """`native CUDA up to 16 rows, native Triton above`, with a reason where nothing native runs."""
    runs: list[tuple[str, int]] = []
    for m, choice in rows.items():
        words = WORDS[choice["backend"]]
        if runs and runs[-1][0] == words:
            runs[-1] = (words, m)
        else:
            runs.append((words, m))
    text = ", ".join(f"{words} up to {m} rows" for words, m in runs[:-1])
    text = f"{text}, {runs[-1][0]} above" if text else runs[0][0]
    last = rows[max(rows)]
    if last["backend"] not in ("cuda", "triton", "torch"):
        reasons = [
            why
            for why in last["why_not"].values()
            if why and not any(part in why for part in _BETTER)
        ]
        if reasons and len(runs) == 1:
            text += f", because {reasons[0]}"
    return text


def median_ms(calls: list[Callable], device: torch.device, repeats: int = 5) -> float:
    """Median milliseconds of one call; the list holds the same call on different inputs. On a GPU a
    captured graph.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        times = []
        for call in calls * repeats:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * 2:
            call()
    graph.replay()
    return replayed(graph.replay, repeats) / (2 * len(calls))


def replayed(run: Callable, repeats: int) -> float:
    """Median milliseconds on the GPU from before `run` to after it."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def quantized_layer(
    format: Format, weight: torch.Tensor, options: FormatOptions
) -> dict[str, torch.Tensor]:
    """suffix -> stored tensor of a weight, rounded to nearest."""
    prepared = format.prepare(weight, options)
    grid = format.grid(LayerInput(tuple(weight.shape), "BF16"), options)
    return format.quantize(prepared, grid, options)


def bench_linears(
    device: torch.device,
    formats: Iterable[str] | None = None,
    rows: Iterable[int] = ROWS,
    shape: tuple[int, int] = SHAPE,
    on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Time one linear layer in bf16 and in every format.

    Returns:
        Per format and number of rows: N, K, M, format, `ms`, `bf16_ms`, `decoded_ms` (decode the
            weight, then bf16),
        `kernel` in words and `encode_ms`, the time to quantize the weight.
    """
    n, k = shape
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
    plain = _copies(weight)
    inputs = {m: _x(m, k, device) for m in rows}
    dense = {
        m: median_ms([partial(linear, x, w) for w in plain], device) for m, x in inputs.items()
    }
    results = []
    for name in FORMATS if formats is None else formats:
        for row in _bench_format(get_format(name), weight, inputs):
            results.append({**row, "bf16_ms": dense[row["M"]]})
            on_row(results[-1])
    return results


def _bench_format(
    format: Format, weight: torch.Tensor, inputs: dict[int, torch.Tensor]
) -> Iterator[dict]:
    device, (n, k) = weight.device, weight.shape
    options, layer = format.resolve(FormatOptions()), LayerInput((n, k), "BF16")
    if format.check(layer, options):
        return
    begin = time.perf_counter()
    stored = quantized_layer(format, weight, options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    encode = (time.perf_counter() - begin) * 1e3
    copies = [
        dict(zip(stored, pieces)) for pieces in zip(*(_copies(t, stored) for t in stored.values()))
    ]

    def decoded(x: torch.Tensor, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return linear(x, format.dequantize_to(stored, layer, options, x.dtype))

    for m, x in inputs.items():
        yield {
            "N": n, "K": k, "M": m, "format": format.name,
            "ms": median_ms([partial(format.linear, x, copy, layer, options, None) for copy in copies], device),
            "decoded_ms": median_ms([partial(decoded, x, copy) for copy in copies], device),
            "kernel": WORDS[_backend(format, x, stored, layer, options)], "encode_ms": encode,
        }  # fmt: skip


def _backend(
    format: Format, x: torch.Tensor, stored: dict, layer: LayerInput, options: FormatOptions
) -> str:
    product = format.product(stored, layer, options)
    return product[0].choose(x, *product[1], None)[0] if product else "decoded"


def _x(m: int, k: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(m)
    return torch.randn(m, k, device=device, dtype=torch.bfloat16, generator=generator)


def _copies(
    tensor: torch.Tensor, together: dict[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Enough copies that they exceed the cache together with the other tensors of the layer; one on
    a CPU.
    """
    nbytes = sum(t.nbytes for t in together.values()) if together else tensor.nbytes
    count = (
        1 if tensor.device.type == "cpu" else max(2, min(16, int(CACHE_BYTES // max(nbytes, 1))))
    )
    return [tensor.clone() for _ in range(count)]
