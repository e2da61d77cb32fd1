"""Time this device: every format's linear against bf16 and against decoding first, and which kernel
runs and why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import torch
from torch.nn.functional import linear

from ..kernels.device import Gpu, as_if
from .formats import FORMATS, Format, FormatOptions, get_format
from .sources import TORCH_DTYPES
from .spec import LayerInput

ROWS = (1, 16, 256, 4096)  # rows of x: a time step, a short prompt, a small picture, a picture
SHAPE = (12288, 3072)  # (N, K) of a Flux layer
# On a CPU every format's rows of SHAPE take many minutes; these, all formats, 14 s on two cores.
CPU_ROWS = ROWS[:3]
CPU_SHAPE = (1024, 1024)
CACHE_BYTES = 150e6  # copies of a weight are timed in turn until they exceed every GPU's cache

# What a backend of `linear_tiles` and `linear_flat4` is called in a sentence.
WORDS = {
    "scratch": "decoded to INT8 rows, then native CUDA",
    "hopper": "native CUDA for sm_90",
    "cuda": "native CUDA",
    "triton": "native Triton",
    "torch": "torch's scaled matmul",
    "dequantize": "decoded, then the library's matmul",
    "eager": "eager PyTorch",
    "decoded": "decoded, then the library's matmul",
}
NATIVE = ("scratch", "hopper", "cuda", "triton", "torch")


def kernel_report(
    formats: Iterable[str] | None = None,
    device: torch.device | str | Gpu = "cpu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = SHAPE,
    rows: Iterable[int] = ROWS,
) -> list[dict]:
    """Which kernel multiplies each format on a device, at default options; nothing is computed or
    compiled.

    Args:
        device: a device, or a class of GPU that need not be here (`kernels.device.CLASSES`).

    Returns:
        Per format: `format`; `rows`, {rows of x: {"backend", "why", "why_not": {backend asked
            before it: what it cannot do}}}; `native_since`, the ComfyUI from which comfy-kitchen
            multiplies it instead, or None; `text`, one line in plain words, such as
            "int8_blockwise: native Triton".
    """
    names = FORMATS if formats is None else formats
    if isinstance(device, Gpu):
        with as_if(device):
            return [_report(get_format(name), "meta", dtype, shape, rows=rows) for name in names]
    return [
        _report(get_format(name), torch.device(device), dtype, shape, rows=rows) for name in names
    ]


def _report(
    format: Format,
    device: torch.device | str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rows: Iterable[int],
) -> dict:
    options, layer = format.configure({}), LayerInput(shape, "BF16")
    stored = {
        suffix: torch.empty((), dtype=TORCH_DTYPES[code], device=device).expand(size)
        for suffix, (code, size) in format.tensor_specs(layer, options).items()
    }
    product = format.product(stored, layer, options)
    decisions = {}
    for m in rows:
        x = torch.empty((), dtype=dtype, device=device).expand(m, shape[1])
        decisions[m] = _decided(format, product, x)
    since = format.min_comfyui if format.native else None
    text = f"{format.name}: {_sentence(decisions)}"
    if since:
        text += f"; comfy-kitchen's in ComfyUI {since} or newer"
    return {"format": format.name, "rows": decisions, "native_since": since, "text": text}


def _decided(format: Format, product: tuple | None, x: torch.Tensor) -> dict:
    """What multiplies x, why, and what those asked before it cannot do."""
    if product is None:
        reason = f"no kernel multiplies {format.name} codes"
        return {"backend": "decoded", "why": "", "why_not": {"kernel": reason}}
    op, arguments = product
    decision = op.decide(x, *arguments, None)
    return {"backend": decision.backend, "why": decision.why, "why_not": decision.cannot}


def _sentence(rows: dict[int, dict]) -> str:
    """`native CUDA up to 16 rows, native Triton above`, with a reason where nothing native runs."""
    runs: list[tuple[str, int]] = []
    for m, decision in rows.items():
        words = WORDS[decision["backend"]]
        if runs and runs[-1][0] == words:
            runs.pop()
        runs.append((words, m))
    parts = [f"{words} up to {m} rows" for words, m in runs[:-1]]
    text = ", ".join([*parts, f"{runs[-1][0]} above" if parts else runs[-1][0]])
    last = rows[max(rows)]
    if last["backend"] in NATIVE or parts:
        return text
    reasons = [*last["why_not"].values(), last["why"]]
    if reasons[0]:
        return f"{text}, because {reasons[0]}"
    return text


def reason_lines(report: dict) -> Iterator[str]:
    """`M=16  native CUDA: what was measured`, and a line per kernel that could not run."""
    for m, decision in report["rows"].items():
        why = f": {decision['why']}" if decision["why"] else ""
        yield f"M={m}  {WORDS[decision['backend']]}{why}"
        for name, reason in decision["why_not"].items():
            yield f"      not {WORDS.get(name, name)}: {reason}"


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

    Args:
        on_row: is given each row as soon as it is measured.

    Returns:
        Per format and number of rows: N, K, M, format, `ms`, `bf16_ms`, `decoded_ms` (decode the
            weight, then bf16),
        `kernel` in words and `encode_ms`, the time to quantize the weight.
    """
    n, k = shape
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
    plain = _copies(weight)
    inputs = {m: _x(m, k, device) for m in rows}

    @cache
    def dense(m: int) -> float:
        return median_ms([partial(linear, inputs[m], w) for w in plain], device)

    results = []
    for name in FORMATS if formats is None else formats:
        for row in _bench_format(get_format(name), weight, inputs):
            results.append({**row, "bf16_ms": dense(row["M"])})
            on_row(results[-1])
    return results


def _bench_format(
    format: Format, weight: torch.Tensor, inputs: dict[int, torch.Tensor]
) -> Iterator[dict]:
    device, (n, k) = weight.device, weight.shape
    options, layer = format.configure({}), LayerInput((n, k), "BF16")
    if format.check(layer, options):
        return
    begin = time.perf_counter()
    stored = quantized_layer(format, weight, options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    encode = (time.perf_counter() - begin) * 1e3
    columns = [_copies(tensor, stored) for tensor in stored.values()]
    copies = [dict(zip(stored, pieces, strict=True)) for pieces in zip(*columns, strict=True)]

    def decoded(x: torch.Tensor, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return linear(x, format.dequantize_to(stored, layer, options, x.dtype))

    for m, x in inputs.items():
        products = [partial(format.linear, x, copy, layer, options, None) for copy in copies]
        yield {
            "N": n,
            "K": k,
            "M": m,
            "format": format.name,
            "ms": median_ms(products, device),
            "decoded_ms": median_ms([partial(decoded, x, copy) for copy in copies], device),
            "kernel": WORDS[_backend(format, x, stored, layer, options=options)],
            "encode_ms": encode,
        }


def _backend(
    format: Format, x: torch.Tensor, stored: dict, layer: LayerInput, options: FormatOptions
) -> str:
    product = format.product(stored, layer, options)
    if product:
        return product[0].choose(x, *product[1], None)[0]
    return "decoded"


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
    if tensor.device.type == "cpu":
        return [tensor.clone()]
    fitting = int(CACHE_BYTES // max(nbytes, 1))
    return [tensor.clone() for _ in range(max(2, min(16, fitting)))]
