"""Inputs that a stranger made: valid ones with a few things changed, all from one seed."""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Callable

import torch

from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.sources import TORCH_DTYPES, spec_of
from fewbits.quant_ops.spec import Header, TensorSpec
from support import dialects
from support.codec import CANONICAL, encode, wish

NUMBERS = (
    0, 1, 2, -1, 3, 16, 63, 64, 128, 255, 256, 1024, 4096, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1,
    2**63, 2**64, 10**30, 0.5, -0.0, 1e-45, 1e39, 1e308,
)  # fmt: skip
TEXTS = (
    "", "a", "weight", "nf4", "fp4", "af4", "int8", "float8_e4m3fn", "bnb_nf4", "hybrid_mxfp8", "high", "low", "true",
    "\x1b[2J\x1b]0;owned\x07", "\u202egnp", "\ud800", "a" * 300, "\0", "..", "{}", "[[", "%s%n", "'; --", "F32", "🙂",
)  # fmt: skip
KEYS = (
    "format", "group_size", "params", "shape", "dtype", "orig_dtype", "orig_shape", "convrot", "convrot_groupsize",
    "per_row", "nibble_order", "quant_map", "quant_type", "blocksize", "nested_blocksize", "nested_offset",
    "linear_dtype", "full_precision_matrix_mult", "num_experts", "nested_dtype",
)  # fmt: skip
WEIGHT = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))


def value(dice: random.Random, depth: int = 0) -> object:
    """Any JSON value, more often an odd one."""
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return dice.choice(NUMBERS)
    if kind == 1:
        return dice.choice(TEXTS)
    if kind == 2:
        return dice.choice((None, True, False))
    if kind == 3:
        return dice.choice((*FORMATS, *TEXTS))
    if kind == 4:
        return dice.randrange(-3, 300)
    size = dice.randrange(4)
    if kind in (5, 6):
        return [value(dice, depth + 1) for _ in range(size)]
    return {dice.choice((*KEYS, *TEXTS)): value(dice, depth + 1) for _ in range(size)}


def changed(dice: random.Random, found: object, keys: tuple[str, ...] = KEYS) -> object:
    """A JSON value with one thing in it changed: another value, a key more or less."""
    if isinstance(found, dict) and found and dice.random() < 0.9:
        table, key = dict(found), dice.choice(list(found))
        act = dice.randrange(6)
        if act == 0:
            del table[key]
        elif act == 1:
            table[dice.choice(keys)] = value(dice)
        elif act == 2:
            table[dice.choice(keys)] = table.pop(key)
        elif act == 3:
            table[key] = value(dice)
        else:
            table[key] = changed(dice, table[key], keys)
        return table
    if isinstance(found, list) and found and dice.random() < 0.7:
        items, at = list(found), dice.randrange(len(found))
        items[at] = changed(dice, items[at], keys)
        return items[: dice.randrange(len(items) + 1)] if dice.random() < 0.2 else items
    if type(found) is int and dice.random() < 0.4:
        return found + dice.choice((-1, 1, found, 8, 1 << 31))
    return value(dice)


def spoiled(dice: random.Random, text: bytes) -> bytes:
    """A few bytes changed, lost, doubled or nested deeply."""
    for _ in range(dice.choice((0, 0, 0, 1, 1, 3))):
        at = dice.randrange(len(text) + 1)
        act = dice.randrange(5)
        if act == 0:
            text = text[:at] + bytes([dice.randrange(256)]) + text[at + 1 :]
        elif act == 1:
            text = text[:at] + text[at + dice.randrange(1, 9) :]
        elif act == 2:
            text = text[:at] + text[at : at + 40] * 2 + text[at + 40 :]
        elif act == 3:
            text = text[:at] + dice.choice((b"[", b'{"a":')) * dice.choice(
                (5, 5, 70, 70, 1000, 50_000)
            )
        else:
            extra = (b"9" * 5000, b"NaN", b"1e999", b"-0", b'"\\ud800"', b"null", b"\0", b",", b'"')
            text = text[:at] + dice.choice(extra) + text[at:]
    return text


# ---- headers ----

ENTRIES = {
    "__metadata__": {"format": "pt", "modelspec.title": "tiny"},
    "a.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
    "a.bias": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
    "a.weight_scale": {"dtype": "F32", "shape": [], "data_offsets": [80, 84]},
    "b.weight": {"dtype": "F8_E4M3", "shape": [2, 2, 1], "data_offsets": [84, 88]},
    "empty": {"dtype": "U8", "shape": [0, 5], "data_offsets": [88, 88]},
}  # fmt: skip
FIELDS = ("dtype", "shape", "data_offsets", "__metadata__", "a.weight", "b.weight")
HEADER_BYTES = 88


def header(dice: random.Random) -> tuple[bytes, int]:
    """(header JSON, bytes that follow it)"""
    entries = dict(ENTRIES)  # `changed` changes copies
    for _ in range(dice.randrange(4)):
        entries = changed(dice, entries, FIELDS)
    if dice.randrange(400) == 0 and isinstance(entries, dict):
        entries = {**entries, **many(dice, entries)}
    text = json.dumps(entries).encode()
    return spoiled(dice, text), HEADER_BYTES + dice.choice((0, 0, 0, -1, 1, 8, 1000))


def many(dice: random.Random, table: dict) -> dict:
    """Thousands of entries like those of a table: what takes more than linear time shows."""
    likes = list(table.values()) or [value(dice)]
    count = dice.choice((300, 1000, 4000))
    return {f"blocks.{i}.{dice.choice(KEYS)}": dice.choice(likes) for i in range(count)}


def file(dice: random.Random) -> bytes:
    """A whole safetensors file."""
    text, _ = header(dice) if dice.random() < 0.5 else (json.dumps(ENTRIES).encode(), 0)
    length = len(text) + dice.choice((0, 0, 0, 0, -1, 1, 8, -len(text), 2**31, 2**63))
    data = max(length, 0).to_bytes(8, "little") + text + bytes(HEADER_BYTES)
    return damaged(dice, data)


def damaged(dice: random.Random, data: bytes) -> bytes:
    """Binary data with a few bytes changed, cut, added, or a number in it made another."""
    for _ in range(dice.choice((0, 1, 1, 1, 2, 4))):
        at = dice.randrange(len(data) + 1)
        act = dice.randrange(5)
        if act == 0:
            data = data[:at]
        elif act == 1:
            data = data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
        elif act == 2:
            data = data[:at] + data[at : at + 32] + data[at:]
        else:
            width = dice.choice((4, 8))
            number = int(dice.choice(NUMBERS)) % (1 << 8 * width)
            data = data[:at] + number.to_bytes(width, "little") + data[at + width :]
    return data


# ---- layers ----


@functools.cache
def layers() -> dict[str, dict[str, torch.Tensor]]:
    """Valid layers of every format and dialect, by label."""
    made = {f"ours {case}": _own(case) for case in CANONICAL}
    wide = WEIGHT
    makers: dict[str, Callable] = {
        "bitsandbytes": dialects.bitsandbytes, "nested": dialects.nested, "d30": dialects.d30, "d14": dialects.d14,
        "d19": dialects.d19, "d19_legacy": dialects.d19_legacy, "int8_fast": dialects.int8_fast,
        "scaled_fp8": dialects.scaled_fp8,
    }  # fmt: skip
    for label, make in makers.items():
        made[label] = make("a", wide)
    made["fp4"] = dialects.bitsandbytes("a", wide, "fp4")
    made["d14l"] = {
        "a.weight": torch.zeros(2048, dtype=torch.uint8),
        "a.scale_weight": torch.ones(64),
    }
    made["asym of another"] = dialects.under(
        "a",
        {
            "weight": torch.zeros(32, 64, dtype=torch.int8),
            "weight_s_rel": torch.ones(32, 4),
            "weight_s_channel": torch.ones(32),
            "weight_correction": torch.zeros(4, 32),
        },
        {"format": "asym_w4a8_int8", "group_size": 32, "convrot_groupsize": 64},
    )
    made["scaled with pre-quant"] = {
        **made["scaled_fp8"],
        "a.pre_quant_scale": torch.ones(128),
        "a.scale_input": torch.ones(()),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    made["dummy"] = {"a.weight": wide.bfloat16(), "a.scale_weight": torch.ones(())}
    return made


@functools.cache
def headers() -> dict[str, tuple[dict[str, TensorSpec], dict]]:
    """The layers of our formats without their bytes: tensors, and what their JSON says."""
    return {
        label: (
            {name: spec_of(name, tensor) for name, tensor in tensors.items()},
            _json_of(tensors["a.comfy_quant"]),
        )
        for label, tensors in layers().items()
        if "a.comfy_quant" in tensors
    }


def marked(dice: random.Random) -> tuple[Header, dict[str, dict] | bytes]:
    """A header of one layer of ours, and a marker that may say something else."""
    specs, marker = headers()[dice.choice(list(headers()))]
    specs = dict(specs)
    for _ in range(dice.choice((1, 1, 2))):
        marker = changed(dice, marker)
    if dice.random() < 0.2:
        name = dice.choice(list(specs))
        shape = tuple(
            dice.choice((0, 1, 2, 32, 64, 2**31, 2**62)) for _ in range(dice.randrange(4))
        )
        dtype = dice.choice((specs[name].dtype, *TORCH_DTYPES))
        specs[name] = TensorSpec(name, dtype, shape)
    return Header(specs), spoiled(dice, json.dumps(marker).encode())


def quant_state(dice: random.Random) -> dict[str, torch.Tensor]:
    """A 4-bit layer of bitsandbytes whose state says something else."""
    label = dice.choice(("bitsandbytes", "nested", "fp4"))
    tensors = dict(layers()[label])
    name = next(key for key in tensors if "quant_state" in key)
    state = _json_of(tensors[name])
    for _ in range(dice.choice((1, 1, 2, 3))):
        state = changed(dice, state)
    tensors[name] = _as_bytes(spoiled(dice, json.dumps(state).encode()))
    if dice.random() < 0.3:
        other = dice.choice(list(tensors))
        tensors[other] = other_tensor(dice, tensors[other])
    return tensors


def _own(case: str) -> dict[str, torch.Tensor]:
    name, options = wish(case)
    tensors, marker = encode(name, WEIGHT, options)
    return dialects.under("a", tensors, marker)


def layer(dice: random.Random) -> tuple[str, dict[str, torch.Tensor], dict[str, str]]:
    """(label, tensors, metadata) of one layer with a few things changed."""
    label = dice.choice(list(layers()))
    tensors = dict(layers()[label])
    metadata: dict[str, str] = {}
    for _ in range(dice.choice((1, 1, 2, 3))):
        name = dice.choice(list(tensors)) if tensors else "a.weight"
        texts = [key for key in tensors if "comfy_quant" in key or "quant_state" in key]
        if texts and dice.random() < 0.5:
            name = dice.choice(texts)
            tensors[name] = _other_json(dice, tensors[name])
        elif texts and dice.random() < 0.2:
            marker = _json_of(tensors[dice.choice(texts)])
            entry = {"layers": {dice.choice(("a", "b", "")): changed(dice, marker)}}
            text = json.dumps(
                changed(dice, entry, ("layers", "a")) if dice.random() < 0.3 else entry
            )
            metadata["_quantization_metadata"] = text
        elif tensors:
            act = dice.randrange(4)
            if act == 0:
                del tensors[name]
            elif act == 1:
                other = f"a.{dice.choice(SUFFIXES)}"
                tensors[other] = tensors[name]
            else:
                tensors[name] = other_tensor(dice, tensors[name])
    return label, tensors, metadata


SUFFIXES = (
    "weight", "weight_scale", "weight_scale_2", "scale_weight", "scale_input", "input_scale", "absmax", "quant_map",
    "weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction", "pre_quant_scale", "weight.absmax",
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "bias", "comfy_quant",
    "weight.quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "weight_scalar",
)  # fmt: skip


def _json_of(tensor: torch.Tensor) -> object:
    try:
        return json.loads(bytes(tensor.reshape(-1).tolist()))
    except (ValueError, TypeError, RecursionError):
        return {}


def _other_json(dice: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    text = spoiled(dice, json.dumps(changed(dice, _json_of(tensor))).encode())
    return _as_bytes(text)


def _as_bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0).byte()


def other_tensor(dice: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Another shape, dtype, or values."""
    act = dice.randrange(6)
    flat = tensor.reshape(-1)
    if act == 0:
        return flat[: dice.randrange(len(flat) + 1)].clone()
    if act == 1 and len(flat):
        return torch.cat([flat] * dice.randrange(1, 3))
    if act == 2:
        return tensor.reshape(
            (1,) * dice.randrange(3) + tuple(tensor.shape) + (1,) * dice.randrange(3)
        )
    if act == 3:
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if len(flat) % size == 0]
        return tensor.reshape(dice.choice(sizes), -1) if len(flat) else tensor
    if act == 4:
        return _as_dtype(tensor, dice.choice(list(TORCH_DTYPES.values())))
    odd = dice.choice((float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38, 255.0))
    other = tensor.clone()
    if len(flat) and tensor.is_floating_point() and tensor.itemsize > 1:
        other.view(-1)[dice.randrange(len(flat))] = odd
    elif len(flat):
        other.view(torch.uint8).view(-1)[dice.randrange(flat.nbytes)] = dice.randrange(256)
    return other


def _as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes where they fit, else as many elements of zeros."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if dtype == torch.bool or flat.numel() % dtype.itemsize:
        return torch.zeros(tensor.shape, dtype=dtype)
    return flat.clone().view(dtype)


# ---- what people write ----

LAYER_CONFIG = {
    "_default": {"format": "int8_tensorwise"},
    "_exclusions": ["img_in", "*.norm*"],
    "double_blocks.0.*": {"format": "bnb_nf4", "block_size": 64, "method": "nearest"},
    "single_blocks.1.linear1": {"skip": True},
    "x": {"format": "float8_e4m3fn", "scaling_mode": "row", "full_precision_matrix_mult": True},
}
RECIPE = """preset = "none"
seed = 3
heuristics = false
[primary]
format = "int8_tensorwise"
scaling = "row"
method = "nearest"
[fallback]
format = "float8_e4m3fn"
[[rule]]
match = "double_blocks.0.*"
format = "bnb_nf4"
block_size = 64
[[rule]]
match = "re:.*\\\\.norm"
keep = true
[layer_config]
"img_in" = { skip = true }
"""
SETTINGS = (
    "format", "skip", "block_size", "group_size", "scaling_mode", "method", "simple", "convrot", "convrot_groupsize",
    "linear_dtype", "full_precision_matrix_mult", "_default", "_exclusions", "_note",
)  # fmt: skip


def layer_config(dice: random.Random) -> str:
    table = LAYER_CONFIG
    for _ in range(dice.randrange(4)):
        table = changed(dice, table, SETTINGS)
    if dice.randrange(400) == 0 and isinstance(table, dict):
        table = {**table, **many(dice, table)}
    return spoiled(dice, json.dumps(table).encode()).decode("utf-8", "replace")


def recipe(dice: random.Random) -> str:
    lines = RECIPE.splitlines()
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(lines))
        key = lines[at].partition("=")[0].strip() or dice.choice(SETTINGS)
        act = dice.randrange(5)
        if act == 0:
            del lines[at]
        elif act == 1:
            lines.insert(at, dice.choice(lines))
        elif act == 2:
            lines[at] = dice.choice(("[primary]", "[[rule]]", "[fallback]", "[a.b]", f"{key} = "))
        else:
            lines[at] = f"{key} = {json.dumps(value(dice))}"
        if not lines:
            break
    if lines and dice.randrange(400) == 0:
        lines += [dice.choice(lines) for _ in range(dice.choice((300, 4000)))]
    return spoiled(dice, "\n".join(lines).encode()).decode("utf-8", "replace")


def rule(dice: random.Random) -> str:
    texts = (
        "double_blocks.0.*=bnb_nf4:block_size=64", "re:a+=keep", "search:b=int8_tensorwise:scaling=row", "*=fp8",
    )  # fmt: skip
    name, _, tail = dice.choice(texts).partition("=")
    if dice.random() < 0.5:
        name = pattern(dice)
    options = [f"{dice.choice(KEYS + SETTINGS)}={value(dice, 3)}" for _ in range(dice.randrange(3))]
    text = f"{name}={','.join([tail, *options])}".encode("utf-8", "replace").decode()
    if dice.randrange(100) == 0:
        text = "".join(dice.choice(text) for _ in range(dice.choice((100, 3000, 100_000))))
    return spoiled(dice, text.encode()).decode("utf-8", "replace")


PIECES = (
    "*", "?", "[", "]", "[!", "[^", "[a-z]", "[z-a]", "(", ")", "(?:", "(?i)", "|", "+", "+?", "{1000}", "{,}", "{4294967295}",
    "\\w", "\\d", "\\1", "(?=a)", "(?<!a)", "(?P<n>a)", ".", ".*", "a", "0", "blocks", "double_blocks.0.img", "$", "^",
    "\0", "\ud800", "🙂", "re:", "search:", "part:", "top:", "\\", "\\p{L}", "(a+)+", "([\\w.]+)+", "[[:alpha:]]", "\n",
)  # fmt: skip


def pattern(dice: random.Random) -> str:
    """What names layers, in any of its ways to be written."""
    prefix = dice.choice(("", "", "re:", "search:", "part:", "top:"))
    pieces = [dice.choice(PIECES) for _ in range(dice.choice((1, 2, 4, 8, 30)))]
    times = dice.choice((2, 100, 3000)) if dice.random() < 0.1 else 1
    return prefix + "".join(pieces) * times


INDEX = {
    "metadata": {"total_size": 88},
    "weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"},
}


def index(dice: random.Random) -> bytes:
    table = dict(INDEX)
    for _ in range(dice.randrange(3)):
        table = changed(dice, table, ("weight_map", "a.weight", "../x", "c.weight"))
    if dice.randrange(400) == 0 and isinstance(table, dict):
        table = {**table, "weight_map": many(dice, INDEX["weight_map"])}
    return spoiled(dice, json.dumps(table).encode())


# ---- calibrations ----

CALIBRATION = {
    "version": 1,
    "layers": {"a": [0, 32, 8], "b": [1, 4, 8]},
    "inputs": [
        {"size": 8, "capacity": 4, "counts": [3, 2], "damaged": 0},
        {"size": 8, "capacity": 16, "counts": [3, 2], "damaged": 1},
    ],
}
CALIBRATION_KEYS = ("version", "layers", "inputs", "size", "capacity", "counts", "damaged", "a")


@functools.cache
def statistics() -> dict[str, torch.Tensor]:
    """The tensors of a valid calibration: one input with rows, one with its gram."""
    sums = {f"input.{n}.{name}": torch.ones(8) for n in (0, 1) for name in SUMS}
    rows = {f"input.0.{half}.rows": torch.ones(2, 8).bfloat16() for half in (0, 1)}
    grams = {f"input.1.{half}.gram": torch.eye(8) for half in (0, 1)}
    return {**sums, **rows, **grams}


SUMS = ("total", "square", "largest")


def calibration(dice: random.Random) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors, JSON) of a calibration file with a few things changed."""
    tensors, table = dict(statistics()), CALIBRATION
    for _ in range(dice.randrange(3)):
        table = changed(dice, table, CALIBRATION_KEYS)
    for _ in range(dice.randrange(3)):
        name = dice.choice(list(tensors))
        if dice.random() < 0.3:
            tensors[dice.choice(("input.0.x", "input.1.0.rows", "input.0.1.gram"))] = tensors.pop(
                name
            )
        else:
            tensors[name] = other_tensor(dice, tensors[name])
    return tensors, spoiled(dice, json.dumps(table).encode()).decode("utf-8", "replace")


# ---- GGUF ----


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _listed(key: str, kind: int, code: str, *values: object) -> bytes:
    data = (
        b"".join(map(_text, values)) if kind == 8 else struct.pack(f"<{len(values)}{code}", *values)
    )
    return _text(key) + struct.pack("<IIQ", 9, kind, len(values)) + data


@functools.cache
def gguf_file() -> bytes:
    """A valid file with a plain tensor, one of blocks, and one that was flattened."""
    keys = (
        _text("general.architecture") + struct.pack("<I", 8) + _text("flux"),
        _text("general.alignment") + struct.pack("<II", 4, 32),
        _listed("tokens", 8, "", "a", "bc"),
        _listed("comfy.gguf.orig_shape.c.weight", 5, "i", 4, 2, 2, 2),
    )
    entries = (
        ("a.weight", (8, 2), 0, 0),
        ("b.weight", (32, 2), 8, 64),
        ("c.weight", (8, 4), 1, 160),
    )
    infos = [
        _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        for name, sizes, kind, offset in entries
    ]
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(keys))
    data = start + b"".join(keys) + b"".join(infos)
    return data + bytes(-len(data) % 32) + bytes(range(224))


def gguf(dice: random.Random) -> bytes:
    return damaged(dice, gguf_file())
