"""Files of every kind that somebody may open, each with what its layer `a` means: a few hundred, made from tables.

`meaning` is None where the file does not say it; `legible` marks what is to be read, not refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from fewbits.quant_ops.formats import FORMATS
from support import dialects

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Tensors = dict[str, torch.Tensor]


def uneven(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight whose rows and columns differ in size, so that a scale on the wrong axis shows."""
    dice = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=dice) / 32
    return noise * (1 + torch.arange(rows) % 5)[:, None] * (1 + torch.arange(columns) // 16 % 3)


WEIGHT = uneven(64, 256)
SQUARE = uneven(64, 64, seed=1)


def native(name: str, weight: torch.Tensor, **options: object) -> tuple[Tensors, dict]:
    """`dialects.native` with blocks that fit."""
    size = {"block_size": 64} if name == "int8_blockwise" else {}
    return dialects.native(name, weight, **size, **options)


@dataclass(frozen=True)
class File:
    tensors: Tensors
    meaning: torch.Tensor | None
    legible: bool = False
    metadata: dict[str, str] = field(default_factory=dict)


def fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return (weight / scale).clamp(-largest, largest).to(dtype)


def int8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).round().clamp(-127, 127).to(torch.int8)


def marked(tensors: Tensors, **marker: object) -> Tensors:
    return dialects.under("a", tensors, marker)


def named(**tensors: torch.Tensor) -> Tensors:
    return {f"a.{suffix}": tensor for suffix, tensor in tensors.items()}


def header(layers: dict[str, dict]) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


# ---- formats of ours, and each under every other's name ----


def ours() -> Iterator[tuple[str, File]]:
    for name in FORMATS:
        stored, marker = native(name, WEIGHT)
        yield name, File(dialects.under("a", stored, marker), WEIGHT, True)
        yield f"{name}, JSON in the header", File(dialects.under("a", stored), WEIGHT, True, header({"a": marker}))  # fmt: skip
        yield f"{name}, its scale lost", File(_without_scale(stored, marker), WEIGHT)
        yield f"{name}, without JSON", File(dialects.under("a", stored), WEIGHT)
        yield (
            f"{name}, under a scaled_fp8 marker",
            File(dialects.under("a", stored) | {"scaled_fp8": torch.empty(0, dtype=E4M3)}, WEIGHT),
        )
        for other in FORMATS:
            if other != name:
                theirs = native(other, WEIGHT)[1]
                yield f"{name}, called {other}", File(dialects.under("a", stored, theirs), WEIGHT)


def _without_scale(stored: Tensors, marker: dict) -> Tensors:
    return dialects.under("a", {"weight": stored["weight"]}, marker)


# ---- scales: every shape under every name, every type, every value ----

PLACES: dict[str, Callable[[torch.Tensor, torch.Tensor], Tensors]] = {
    "weight_scale": lambda codes, scale: named(weight=codes, weight_scale=scale),
    "scale_weight": lambda codes, scale: named(weight=codes, scale_weight=scale),
    "scale_weight, marked": lambda codes, scale: named(weight=codes, scale_weight=scale) | {"scaled_fp8": torch.empty(2, dtype=E4M3)},
    "weight_scale_inv": lambda codes, scale: named(weight=codes, weight_scale_inv=scale),
    "scale": lambda codes, scale: named(weight=codes, scale=scale),
    "_scale": lambda codes, scale: named(weight=codes, _scale=scale),
    "weight._scale": lambda codes, scale: {"a.weight": codes, "a.weight._scale": scale},
    "quanto's": lambda codes, scale: {"a.weight._data": codes, "a.weight._scale": scale},
    "scales": lambda codes, scale: named(weight=codes, scales=scale),
    "input_scale only": lambda codes, scale: named(weight=codes, input_scale=scale),
    "JSON of one scale": lambda codes, scale: marked({"weight": codes, "weight_scale": scale}, format="float8_e4m3fn" if codes.dtype == E4M3 else "int8_tensorwise"),
    "JSON of rows": lambda codes, scale: marked({"weight": codes, "weight_scale": scale}, format="float8_e4m3fn_rowwise" if codes.dtype == E4M3 else "int8_lodewise"),
}  # fmt: skip
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "()": lambda w: w.abs().max(),
    "(1)": lambda w: w.abs().max().reshape(1),
    "(1, 1)": lambda w: w.abs().max().reshape(1, 1),
    "(N)": lambda w: w.abs().amax(1),
    "(N, 1)": lambda w: w.abs().amax(1, keepdim=True),
    "(N, 1, 1)": lambda w: w.abs().amax(1).reshape(-1, 1, 1),
    "(1, K)": lambda w: w.abs().amax(0, keepdim=True),
    "(K, 1)": lambda w: w.abs().amax(0).reshape(-1, 1),
    "(N, 4)": lambda w: w.reshape(len(w), 4, -1).abs().amax(2),
    "(4, N)": lambda w: w.reshape(len(w), 4, -1).abs().amax(2).t(),
    "(N, 4, 1)": lambda w: w.reshape(len(w), 4, -1).abs().amax(2, keepdim=True),
    "(4, 4)": lambda w: w.reshape(4, len(w) // 4, 4, -1).abs().amax((1, 3)),
    "(2)": lambda w: w.abs().max() * torch.tensor([1.0, 2.0]),
}  # fmt: skip


def spread(scale: torch.Tensor, shape: str, weight: torch.Tensor) -> torch.Tensor:
    """The scale of every element."""
    n, k = weight.shape
    if shape == "(2)":
        return scale[0].expand(n, k)
    if shape == "(4, 4)":
        return scale.repeat_interleave(n // 4, 0).repeat_interleave(k // 4, 1)
    if shape in ("(N, 4)", "(N, 4, 1)"):
        return scale.reshape(n, 4).repeat_interleave(k // 4, 1)
    if shape == "(4, N)":
        return scale.t().repeat_interleave(k // 4, 1)
    if shape in ("(1, K)", "(K, 1)"):
        return scale.reshape(1, -1).expand(n, k)
    return scale.reshape(-1, 1).expand(n, k)


def scales() -> Iterator[tuple[str, File]]:
    for shape, of in SHAPES.items():
        for kind, largest in (("FP8", 448), ("INT8", 127)):
            scale = of(WEIGHT) / largest
            each = spread(scale, shape, WEIGHT)
            codes = fp8(WEIGHT, each) if kind == "FP8" else int8(WEIGHT, each)
            for place, put in PLACES.items():
                yield f"{kind}, {place} {shape}", File(put(codes, scale), WEIGHT)
    for kind in ("FP8", "INT8"):
        for shape in ("(1, K)", "(K, 1)", "(4, N)"):  # as wide as it is high: shapes do not tell
            scale = SHAPES[shape](SQUARE) / (448 if kind == "FP8" else 127)
            each = spread(scale, shape, SQUARE)
            codes = fp8(SQUARE, each) if kind == "FP8" else int8(SQUARE, each)
            if shape != "(K, 1)":  # rows of a square matrix: what it says is that
                yield f"{kind} square, {shape}", File(named(weight=codes, weight_scale=scale), SQUARE)  # fmt: skip


SCALED = {
    "float8_e4m3fn": "weight_scale", "float8_e4m3fn_rowwise": "weight_scale", "int8_tensorwise": "weight_scale",
    "int8_blockwise": "weight_scale", "int8_lodewise": "weight_scale", "nvfp4": "weight_scale_2", "bnb_nf4": "absmax",
    "convrot_w4a4": "weight_scale", "asym_w4a8_int8": "weight_s_channel",
}  # fmt: skip
TYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.uint8,
    E4M3,
    torch.complex64,
    torch.bool,
)
VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda scale: scale * float("nan"),
    "infinite": lambda scale: scale * float("inf"),
    "negative": lambda scale: -scale,
    "zero": lambda scale: scale * 0,
    "almost zero": lambda scale: scale * 0 + 1e-42,
    "a reciprocal": lambda scale: 1 / scale,
    "one NaN": lambda scale: _first(scale, float("nan")),
    "one zero": lambda scale: _first(scale, 0.0),
    "one negative": lambda scale: _first(scale, -float(scale.reshape(-1)[0])),
}  # fmt: skip


def _first(scale: torch.Tensor, value: float) -> torch.Tensor:
    changed = scale.clone()
    changed.view(-1)[0] = value
    return changed


def values() -> Iterator[tuple[str, File]]:
    for name, suffix in SCALED.items():
        stored, marker = native(name, WEIGHT)
        for what, change in VALUES.items():
            changed = stored | {suffix: change(stored[suffix])}
            yield f"{name}, {suffix} {what}", File(dialects.under("a", changed, marker), WEIGHT)
        for dtype in TYPES:
            changed = stored | {suffix: stored[suffix].to(dtype)}
            legible = dtype in (torch.bfloat16, torch.float64) and suffix == "weight_scale"
            yield f"{name}, {suffix} {dtype}", File(dialects.under("a", changed, marker), WEIGHT, legible)  # fmt: skip
    for name, byte in (("nvfp4", 0x7F), ("mxfp8", 0xFF), ("asym_w4a8_int8", 0x7F)):
        suffix = "weight_s_rel" if name == "asym_w4a8_int8" else "weight_scale"
        stored, marker = native(name, WEIGHT)
        broken = stored[suffix].clone()
        broken.view(torch.uint8).view(-1)[:1] = byte
        yield f"{name}, a block scale NaN", File(dialects.under("a", stored | {suffix: broken}, marker), WEIGHT)  # fmt: skip
    codes = fp8(WEIGHT, WEIGHT.abs().max() / 448)
    broken = codes.clone()
    broken.view(torch.uint8)[3, 3] = 0x7F
    scale = WEIGHT.abs().max() / 448
    yield "FP8, a code NaN", File(marked({"weight": broken, "weight_scale": scale}, format="float8_e4m3fn"), WEIGHT)  # fmt: skip
    yield "FP8, turned", File(marked({"weight": codes.t(), "weight_scale": scale}, format="float8_e4m3fn"), WEIGHT.t(), True)  # fmt: skip


# ---- JSON ----


def text(data: bytes | str, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    raw = data.encode() if isinstance(data, str) else data
    return torch.tensor(list(raw), dtype=torch.uint8).to(dtype)


MARKERS: dict[str, torch.Tensor] = {
    "no JSON": text("hello"),
    "empty": torch.empty(0, dtype=torch.uint8),
    "zeros": torch.zeros(40, dtype=torch.uint8),
    "cut": text('{"format": "float8_e4m3'),
    "a list": text("[1]"),
    "a number": text("7"),
    "null": text("null"),
    "no format": text("{}"),
    "format null": text('{"format": null}'),
    "format a list": text('{"format": ["float8_e4m3fn"]}'),
    "format empty": text('{"format": ""}'),
    "format unknown": text('{"format": "fp8_magic"}'),
    "format svdquant_w4a4": text('{"format": "svdquant_w4a4"}'),
    "not UTF-8": text(b"\xff\xfe{}"),
    "a BOM": text(b'\xef\xbb\xbf{"format": "float8_e4m3fn"}'),
    "two keys alike": text('{"format": "float8_e4m3fn", "format": "int8_tensorwise"}'),
    "deep": text('{"a":' * 200 + "1" + "}" * 200),
    "two objects": text('{"format": "float8_e4m3fn"}{}'),
    "floats for bytes": text('{"format": "float8_e4m3fn"}', torch.float32),
    "two dimensions": text('{"format": "float8_e4m3fn"} ').reshape(2, -1),
    "a zero at the end": text(b'{"format": "float8_e4m3fn"}\0'),
    "rotated": text('{"format": "float8_e4m3fn", "convrot": true}'),
    "a shape that is another": text('{"format": "float8_e4m3fn", "orig_shape": [7, 7]}'),
    "experts": text('{"format": "float8_e4m3fn", "num_experts": 4}'),
    "capitals": text('{"format": "FLOAT8_E4M3FN"}'),
    "torch's name": text('{"format": "torch.float8_e4m3fn"}'),
}  # fmt: skip


def markers() -> Iterator[tuple[str, File]]:
    for name in ("float8_e4m3fn", "int8_tensorwise", "int8_tensorwise:convrot", "nvfp4", "bnb_nf4"):
        options = {"convrot": True, "convrot_groupsize": 64} if ":" in name else {}
        stored, marker = native(name.partition(":")[0], WEIGHT, **options)
        for what, tensor in MARKERS.items():
            layer = dialects.under("a", stored) | {"a.comfy_quant": tensor}
            yield f"{name}, JSON {what}", File(layer, WEIGHT)
            good = json.dumps({"format_version": "1.0", "layers": {"a": marker}})
            if what in ("no JSON", "zeros", "format unknown"):
                yield (
                    f"{name}, JSON {what}, header right",
                    File(layer, WEIGHT, metadata={"_quantization_metadata": good}),
                )
        for what in ("{oops", "[]", "{}", '{"layers": []}', '{"layers": {"a": 7}}', '{"layers": {"b": {"format": "nvfp4"}}}'):  # fmt: skip
            yield (
                f"{name}, header {what}",
                File(
                    dialects.under("a", stored, marker),
                    WEIGHT,
                    metadata={"_quantization_metadata": what},  # fmt: skip
                ),
            )
    for what, tensor in MARKERS.items():
        bare = {"a.weight": WEIGHT.bfloat16(), "a.comfy_quant": tensor}
        yield f"a float weight, JSON {what}", File(bare, WEIGHT)
        cast = {"a.weight": (WEIGHT * 4).to(E4M3), "a.comfy_quant": tensor}
        yield f"a plain cast, JSON {what}", File(cast, WEIGHT * 4)


# ---- other tools ----


def packed(codes: torch.Tensor, low_first: bool = True) -> torch.Tensor:
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return (even | odd << 4 if low_first else even << 4 | odd).to(torch.uint8)


def words(codes: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit codes of a row in one number, lowest first."""
    shifts = torch.arange(8) * 4
    made = (codes.reshape(len(codes), -1, 8).to(torch.int64) << shifts).sum(2)
    return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32)


def tools() -> Iterator[tuple[str, File]]:
    n, k = WEIGHT.shape
    dice = torch.Generator().manual_seed(5)
    nibbles = torch.randint(0, 16, (n, k), generator=dice)
    grid = torch.rand(n, k // 64, generator=dice) / 64 + 0.01
    each = grid.repeat_interleave(64, 1)
    by_row = WEIGHT.abs().amax(1, keepdim=True)
    codes8, codes_fp8 = int8(WEIGHT, by_row / 127), fp8(WEIGHT, by_row / 448)
    zero = torch.randint(0, 255, (n, 1), generator=dice)
    bytes8 = ((WEIGHT / (by_row / 127)).round() + zero).clamp(0, 255)
    unsigned = (bytes8 - zero) * (by_row / 127)
    bias = torch.randn(n, k // 64, generator=dice) / 64
    affine = nibbles * each + bias.repeat_interleave(64, 1)
    symmetric = (nibbles - 8) * each
    for kind in ("nf4", "fp4"):
        yield f"bitsandbytes {kind}", File(dialects.bitsandbytes("a", WEIGHT, kind), WEIGHT, True)
        yield f"low nibble first, {kind}", File(dialects.d30("a", WEIGHT, kind), WEIGHT, True)
        yield f"flat, {kind}", File(dialects.d14("a", WEIGHT, kind), WEIGHT, True)
        yield f"flat with shape, {kind}", File(dialects.d19("a", WEIGHT, kind), WEIGHT, True)
        yield f"flat with state, {kind}", File(dialects.d19_legacy("a", WEIGHT, kind), WEIGHT, True)
        torn = dialects.bitsandbytes("a", WEIGHT, kind)
        for lost in [name for name in torn if name != "a.weight"]:
            yield f"bitsandbytes {kind} without {lost[2:]}", File({name: tensor for name, tensor in torn.items() if name != lost}, WEIGHT)  # fmt: skip
    yield "INT8-Fast", File(dialects.int8_fast("a", WEIGHT), WEIGHT, True)
    yield "INT8-Fast, rotated", File(dialects.int8_fast("a", WEIGHT, 64), WEIGHT, True)
    yield "LLM.int8", File(named(weight=codes8, SCB=by_row.reshape(-1), weight_format=torch.tensor(0, dtype=torch.uint8)), WEIGHT, True)  # fmt: skip
    yield "LLM.int8, SCB (N, 1)", File(named(weight=codes8, SCB=by_row), WEIGHT)
    yield "LLM.int8, SCB of columns", File(named(weight=codes8.t(), SCB=by_row.reshape(-1)), WEIGHT.t())  # fmt: skip
    yield "LLM.int8, tiled", File(named(weight=codes8, SCB=by_row.reshape(-1), weight_format=torch.tensor(2, dtype=torch.uint8)), WEIGHT)  # fmt: skip
    yield "MLX, 4 bit", File(named(weight=words(nibbles).view(torch.uint32), scales=grid.half(), biases=bias.half()), affine)  # fmt: skip
    yield "SDNQ, int8", File(named(weight=codes8, scale=by_row / 127), WEIGHT)
    yield "SDNQ, uint8 with zero points", File(named(weight=bytes8.to(torch.uint8), scale=by_row / 127, zero_point=-zero * by_row / 127), unsigned)  # fmt: skip
    yield "SDNQ, packed with SVD", File(named(weight=packed(nibbles).reshape(-1), scale=grid.reshape(n, -1, 1), svd_up=torch.randn(n, 8), svd_down=torch.randn(8, k)), None)  # fmt: skip
    yield "OpenVINO-like", File(named(weight=bytes8.to(torch.uint8), weight_zero_point=zero.to(torch.uint8), weight_scale=by_row / 127), unsigned)  # fmt: skip
    yield "INT8 and zero points in U8", File(named(weight=codes8, weight_scale=by_row / 127, weight_zero_point=zero.to(torch.uint8)), None)  # fmt: skip
    yield "uint8 with one scale", File(named(weight=bytes8.to(torch.uint8), weight_scale=by_row / 127), None)  # fmt: skip
    yield "a byte for each nibble", File(named(weight=nibbles.to(torch.uint8), weight_scale=grid), None)  # fmt: skip
    yield "BitNet", File(named(weight=packed(nibbles).reshape(n, -1), weight_scale=torch.tensor(0.5).bfloat16()), None)  # fmt: skip
    yield "pack-quantized", File(named(weight_packed=words(nibbles), weight_scale=grid.bfloat16(), weight_shape=torch.tensor([n, k])), (nibbles - 8) * grid.bfloat16().float().repeat_interleave(64, 1), True)  # fmt: skip
    yield "pack-quantized, no shape", File(named(weight_packed=words(nibbles), weight_scale=grid), symmetric)  # fmt: skip
    yield "pack-quantized, scales turned", File(named(weight_packed=words(nibbles), weight_scale=grid.t(), weight_shape=torch.tensor([n, k])), symmetric)  # fmt: skip
    yield "int-quantized", File(named(weight=codes8, weight_scale=by_row / 127), WEIGHT, True)
    yield "float-quantized", File(named(weight=codes_fp8, weight_scale=(by_row / 448).bfloat16()), WEIGHT, True)  # fmt: skip
    yield "float-quantized, static input", File(named(weight=codes_fp8, weight_scale=by_row / 448, input_scale=torch.tensor([0.1])), WEIGHT, True)  # fmt: skip
    yield "naive-quantized INT8, one scale", File(named(weight=int8(WEIGHT, WEIGHT.abs().max() / 127), weight_scale=(WEIGHT.abs().max() / 127).reshape(1)), WEIGHT, True)  # fmt: skip
    yield "mxfp8 in rows, no JSON", File(named(weight=codes_fp8, weight_scale=torch.full((n, k // 32), 120, dtype=torch.uint8)), None)  # fmt: skip
    yield "sparse-bitmask", File(named(compressed=codes8.reshape(-1)[: n * k // 2], bitmask=torch.ones(n, k // 8, dtype=torch.uint8), shape=torch.tensor([n, k])), None)  # fmt: skip
    yield "HQQ", File(named(W_q=packed(nibbles), scale=grid.reshape(-1, 1), zero=grid.reshape(-1, 1), meta=torch.zeros(3)), None)  # fmt: skip
    yield "HQQ of 3 bits", File(named(W_q=words(nibbles), scale=grid.reshape(-1, 1), zero=grid.reshape(-1, 1)), None)  # fmt: skip
    yield "AQLM", File(named(codes=torch.randint(-128, 127, (n, k // 8, 2), dtype=torch.int8), codebooks=torch.randn(2, 256, 1, 8), scales=torch.rand(n, 1, 1, 1)), None)  # fmt: skip
    yield "ExLlamaV2", File(named(q_weight=words(nibbles), q_scale=torch.ones(4, 8, dtype=torch.int32), q_scale_max=torch.ones(4).half(), q_groups=torch.ones(8, dtype=torch.int16), q_invperm=torch.arange(k, dtype=torch.int16)), None)  # fmt: skip
    yield "ExLlamaV3", File(named(trellis=torch.ones(4, 16, 64, dtype=torch.int16), suh=torch.ones(k).half(), svh=torch.ones(n).half()), None)  # fmt: skip
    yield "QuIP#", File(named(Qidxs=torch.ones(n, k // 8, dtype=torch.int64), SU=torch.ones(k), SV=torch.ones(n), Wscale=torch.tensor(0.1)), None)  # fmt: skip
    yield "Marlin", File(named(B=torch.ones(k // 16, n * 2, dtype=torch.int32), s=torch.rand(k // 64, n).half()), None)  # fmt: skip
    yield "torchao int4", File(named(_weight_qdata=words(nibbles), _weight_scale_and_zero=torch.rand(4, n, 2).bfloat16()), None)  # fmt: skip
    yield "torchao float8", File({"a._weight_qdata": codes_fp8, "a._weight_scale": by_row / 448}, WEIGHT)  # fmt: skip
    yield "gpt-oss", File({"a.down_proj_blocks": torch.ones(2, 64, 8, 16, dtype=torch.uint8), "a.down_proj_scales": torch.ones(2, 64, 8, dtype=torch.uint8)}, None)  # fmt: skip
    yield "GPTQ without scales", File(named(qweight=words(nibbles.t()).t().contiguous(), qzeros=torch.ones(4, n // 8, dtype=torch.int32)), None)  # fmt: skip
    yield "GGUF blocks in safetensors", File(named(weight=torch.randint(0, 255, (n, k // 32 * 34), generator=dice).to(torch.uint8)), None)  # fmt: skip
    yield "zero points beside FP8", File(named(weight=codes_fp8, weight_scale=by_row / 448, weight_zero_point=torch.zeros(n, 1).to(E4M3)), None)  # fmt: skip
    yield "ModelOpt NVFP4, no JSON", File(_modelopt(), WEIGHT)
    yield "ModelOpt FP8", File(named(weight=fp8(WEIGHT, WEIGHT.abs().max() / 448), weight_scale=WEIGHT.abs().max() / 448, input_scale=torch.tensor(0.1)), WEIGHT, True)  # fmt: skip
    yield "smoothed before", File(named(weight=fp8(WEIGHT, WEIGHT.abs().max() / 448), weight_scale=WEIGHT.abs().max() / 448, pre_quant_scale=torch.rand(k) + 0.5), None)  # fmt: skip
    yield "FP8 whose columns are smoothed", File(named(weight=codes_fp8, weight_scale=by_row / 448, smooth_scale=torch.rand(k)), None)  # fmt: skip
    yield "outliers apart", File(named(weight=codes8, weight_scale=by_row / 127, weight_outliers=torch.rand(n, 4), outlier_ids=torch.arange(4)), None)  # fmt: skip
    yield "NF4 with a table of its own", File(_other_table(), None)


def _modelopt() -> Tensors:
    stored, _ = native("nvfp4", WEIGHT)
    return dialects.under("a", stored) | {"a.input_scale": torch.tensor(0.1)}


def _other_table() -> Tensors:
    tensors = dialects.bitsandbytes("a", WEIGHT)
    return tensors | {"a.weight.quant_map": torch.linspace(-1, 1, 16)}


# ---- two stories of one layer, layers that differ, names, places ----


def mixtures() -> Iterator[tuple[str, File]]:
    by_row = WEIGHT.abs().amax(1, keepdim=True)
    one = WEIGHT.abs().max() / 448
    codes = fp8(WEIGHT, one)
    story = {
        "weight_scale": one, "scale_weight": one * 3, "weight_scale_inv": one * 3, "weight_scale_2": one * 3,
        "SCB": by_row.reshape(-1) * 3, "absmax": by_row.reshape(-1) * 3, "weight_zero_point": torch.ones(64, 1),
        "weight_scalar": one * 3, "weight_global_scale": one, "scale": one * 3, "zero_point": one, "scale_input": one,
        "output_scale": one * 3, "pre_quant_scale": torch.rand(256) + 0.5, "weight_correction": torch.ones(16, 64),
    }  # fmt: skip
    for first in ("weight_scale", "scale_weight", "weight_scale_inv"):
        for other in story:
            if other != first:
                harmless = other in ("scale_input", "output_scale")
                layer = named(weight=codes, **{first: one, other: story[other]})
                yield f"FP8, {first} and {other}", File(layer, WEIGHT if harmless else None)
    stored, marker = native("int8_tensorwise", WEIGHT, convrot=True, convrot_groupsize=64)
    other, theirs = native("float8_e4m3fn", WEIGHT)
    both = dialects.under("a", stored, marker) | dialects.under("b", other, theirs)
    yield "two formats", File(both, WEIGHT, True)
    swapped = both | {"a.comfy_quant": both["b.comfy_quant"], "b.comfy_quant": both["a.comfy_quant"]}  # fmt: skip
    yield "each under the other's JSON", File(swapped, None)
    yield "the header says the other", File(both, WEIGHT, metadata=header({"a": theirs, "b": marker}))  # fmt: skip
    yield "the header knows more layers", File(both, WEIGHT, metadata=header({"a": marker, "b": theirs, "c": theirs}))  # fmt: skip
    yield "the header knows fewer layers", File(both, WEIGHT, metadata=header({"b": theirs}))
    yield "a group size that is another", File(dialects.under("a", stored, {**marker, "convrot_groupsize": 16}), None)  # fmt: skip
    yield "a rotation that nothing says", File(dialects.under("a", stored, {"format": "int8_tensorwise", "per_row": True}), None)  # fmt: skip
    for prefix in ("model.diffusion_model.", "diffusion_model.", "net.", "model.", "transformer.", "text_encoders.t5xxl.transformer.", "model.model.diffusion_model."):  # fmt: skip
        scaled = {f"{prefix}{name}": tensor for name, tensor in named(weight=codes, scale_weight=one).items()}  # fmt: skip
        yield f"below {prefix}", File(scaled | {f"{prefix}scaled_fp8": torch.empty(0, dtype=E4M3)}, None)  # fmt: skip
        yield f"below {prefix}, the marker is not", File(scaled | {"scaled_fp8": torch.empty(0, dtype=E5M2)}, None)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, E4M3, E5M2, torch.uint8, torch.int64):
        for size in (0, 1, 2, 3):
            layer = named(weight=codes, scale_weight=one)
            yield f"a marker of {size} {dtype}", File(layer | {"scaled_fp8": torch.zeros(size).to(dtype)}, WEIGHT)  # fmt: skip


def oddities() -> Iterator[tuple[str, File]]:
    good = dialects.under("a", *native("float8_e4m3fn", WEIGHT))
    names = (
        "ключ.weight", "ключ", "重み.weight", "🙂", "a b.weight", "a/b.weight", "..", "../x.weight", "", ".", ".weight",
        "weight", "a..weight", "a.weight.weight", "x" * 3000, "a\nb.weight", "a\x1b[2J.weight", "a\u202eb", "a\0b", "scale",
        "comfy_quant", ".comfy_quant", "lost.comfy_quant", "lost.weight_scale", "a.weight_scale_3", "a.weight_scale.weight",
    )  # fmt: skip
    for name in names:
        yield f"a tensor called {ascii(name)[:30]}", File({**good, name: torch.rand(32, 32)}, WEIGHT)  # fmt: skip
    shapes = ((), (0,), (0, 64), (64, 0), (1,), (1, 1), (1, 64), (64, 1), (2, 3, 4, 5), (1, 1, 1, 1, 1, 1), (16, 16), (15, 17))  # fmt: skip
    for shape in shapes:
        for dtype in (torch.float32, E4M3, torch.int8, torch.bool, torch.complex64):
            tensor = (torch.rand(shape) / 4).to(dtype)
            yield f"{shape} of {dtype}", File({**good, "b.weight": tensor}, WEIGHT)
            yield f"{shape} of {dtype}, alone", File({"b.weight": tensor}, None)
    for name in FORMATS:
        for shape in ((1, 1), (1, 64), (17, 129), (64, 0), (3, 40)):
            try:
                stored, marker = native(name, torch.rand(shape) / 8)
            except Exception:  # a shape that this format does not have
                continue
            yield f"{name} of {shape}", File({**good, **dialects.under("b", stored, marker)}, WEIGHT)  # fmt: skip


# What no file shows by itself: NF4 codes under FP4's name are FP4 codes, scales that are reciprocals
# may be those of large weights, a rotation may be said by JSON that is gone.
UNTOLD = (
    "ours: bnb_nf4, called bnb_fp4",
    "ours: bnb_fp4, called bnb_nf4",
    "values: bnb_nf4, absmax a reciprocal",
    "values: convrot_w4a4, weight_scale a reciprocal",
    "markers: float8_e4m3fn, JSON experts",
    "markers: int8_tensorwise:convrot, JSON no format",
    "markers: int8_tensorwise:convrot, JSON format empty",
)
KINDS = {
    "ours": ours, "scales": scales, "values": values, "markers": markers, "tools": tools, "mixtures": mixtures,
    "oddities": oddities,
}  # fmt: skip


def files() -> dict[str, File]:
    """Every file by name, the kind first."""
    made = {f"{kind}: {name}": file for kind, make in KINDS.items() for name, file in make()}
    return made | {name: replace(made[name], meaning=None) for name in UNTOLD}
