"""What is tried with hostile inputs: each case takes dice and may only end well or in an error of ours.

A case returns its input, so that different ones can be counted.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import tempfile
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save, save_file

from fewbits.quant_ops.calibration import load_calibration
from fewbits.quant_ops.calibration.calibration import KEY
from fewbits.quant_ops.checkpoint.exporters import TARGETS
from fewbits.quant_ops.checkpoint.gguf_source import GgufSource
from fewbits.quant_ops.checkpoint.header import parse_header
from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.checkpoint.importers.source import ImportedSource, imported
from fewbits.quant_ops.checkpoint.labels import label_of
from fewbits.quant_ops.checkpoint.metadata import header_markers, read_marker
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.checkpoint.verify import stored_findings, verify_source
from fewbits.quant_ops.errors import QuantError, visible
from fewbits.quant_ops.pipeline import COPY, quantize, rewrite
from fewbits.quant_ops.planning.layer_config import parse_layer_config_text
from fewbits.quant_ops.planning.match import check_pattern, matches
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, draft_from_text, parse_rule, parse_wish
from fewbits.quant_ops.sources import MemorySink, MemorySource
from support import hostile

INT8 = Recipe(primary=parse_wish("int8_tensorwise"), preset="none")
LONGEST = 20_000  # characters of an error that somebody has to read


@contextlib.contextmanager
def refused():
    """Errors of ours, which are text that a terminal takes."""
    try:
        yield
    except QuantError as error:
        text = str(error)
        assert text and len(text) < LONGEST and visible(text).replace("\t", "").isprintable()


def header(dice: random.Random) -> bytes:
    text, size = hostile.header(dice)
    with refused():
        found = parse_header(text, Path("x.safetensors"), 0, size)
        assert sum(spec.nbytes for spec in found.tensors.values()) == size
        assert all(0 <= begin <= end <= size for _, begin, end in found.ranges.values())
        json.dumps(found.metadata, ensure_ascii=False).encode()
        # what is read here is read by the library of the format too
        safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(size))
    return text


def file(dice: random.Random) -> bytes:
    data = hostile.file(dice)
    with refused(), FileSource(_written("x.safetensors", data)) as found:
        for name, spec in found.header.tensors.items():
            assert tuple(found.read(name).shape) == spec.shape
    return data


def marker(dice: random.Random) -> bytes:
    """JSON of a layer where it is read, and as far as names and shapes lead."""
    header, data = hostile.marked(dice)
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        said = read_marker(data)
        with refused():
            make_plan(header, dice.choice((COPY, INT8)), {"a": said})
    with refused():
        header_markers({"_quantization_metadata": f'{{"layers": {{"a": {text}}}}}'})
    with refused():
        header_markers({"_quantization_metadata": text})
    return data


def blob(dice: random.Random) -> bytes:
    """A layer through every reader: copied, decoded, in bitsandbytes' names, verified, planned."""
    _, tensors, metadata = hostile.layer(dice)
    source = MemorySource(tensors, metadata, "x")
    assume = {"assume": "nf4"} if dice.random() < 0.3 else {}
    options = ImportOptions(foreign_only=dice.random() < 0.3, **assume)
    with refused():
        sink = MemorySink()
        rewrite(ImportedSource(source, options, TARGETS["comfy_quant"]), sink)
        for name, tensor in sink.tensors.items():
            assert tensor is not None, name
    with refused():
        target = TARGETS[dice.choice(("bf16", "bnb"))]
        rewrite(ImportedSource(source, options, target), MemorySink())
    with refused():
        quantize(imported(source, ImportOptions(foreign_only=True)), MemorySink(), INT8)
    with refused():
        stored_findings(source)
        verify_source(source).to_text()
    return _bytes_of(tensors, metadata)


def quant_state(dice: random.Random) -> bytes:
    """A 4-bit layer of bitsandbytes, translated and decoded without a pipeline around it."""
    tensors = hostile.quant_state(dice)
    with refused():
        source = ImportedSource(MemorySource(tensors, {}, "x"), ImportOptions())
        for name, spec in source.header.tensors.items():
            assert tuple(source.read(name).shape) == spec.shape
    return _bytes_of(tensors, {})


def layer_config(dice: random.Random) -> str:
    text, fullmatch = hostile.layer_config(dice), dice.random() < 0.3
    with refused():
        found = parse_layer_config_text(text, "x", fullmatch=fullmatch)
        found.under(INT8.primary).ranked(["img_in", "double_blocks.0.a"])
        json.dumps(found.to_json())
    return text


def recipe(dice: random.Random) -> str:
    text = hostile.recipe(dice)
    with refused():
        draft_from_text(text, "x").finish().to_text()
    return text


def rule(dice: random.Random) -> str:
    text = hostile.rule(dice)
    with refused():
        parse_rule(text).to_text()
    with refused():
        parse_wish(text.partition("=")[2])
    return text


NAMES = ("img_in", "double_blocks.0.img_attn.qkv", "a" * 255, "0.1.2.3", "ä.🙂")


def pattern(dice: random.Random) -> str:
    text = hostile.pattern(dice)
    with refused():
        check_pattern(text)
        for name in NAMES:
            assert matches(text, name) in (True, False)
    return text


def scale_shape(dice: random.Random) -> str:
    shape = tuple(dice.choice((0, 1, 2, 32, 64, 128, 2**31, 2**62)) for _ in range(2))
    scale = tuple(dice.choice((0, 1, 2, 4, 32, 64, 128, 2**31)) for _ in range(dice.randrange(5)))
    dtype = dice.choice(("F8_E4M3", "F8_E5M2", "I8", "U8"))
    with refused():
        label_of(dtype, shape, scale, "int8_blockwise", 64)
    return f"{dtype} {shape} {scale}"


def index(dice: random.Random) -> bytes:
    data = hostile.index(dice)
    _shards()
    with refused(), FileSource(_written("model.safetensors.index.json", data)) as found:
        for name in found.header.tensors:
            found.read(name)
    return data


def calibration(dice: random.Random) -> bytes:
    tensors, text = hostile.calibration(dice)
    data = save(tensors, {KEY: text})
    path = _written("calibration.safetensors", data)
    with refused():
        found = load_calibration(path)
        for base, (_, *shape) in found.layers.items():
            if found.missing(base, shape) is None:
                found.inputs_of(base, tuple(shape))
        found.merge(load_calibration(path))
    return data


def gguf(dice: random.Random) -> bytes:
    data = hostile.gguf(dice)
    with refused(), GgufSource(_written("x.gguf", data)) as found:
        for name, spec in found.header.tensors.items():
            assert tuple(found.read(name).shape) == spec.shape
    return data


def _bytes_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    parts = [repr(metadata).encode()]
    for name, tensor in tensors.items():
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.contiguous().reshape(-1)
        parts.append(flat.view(torch.uint8).numpy().tobytes() if len(flat) else b"")
    return b"\0".join(parts)


@functools.cache
def _folder_of(process: int) -> Path:
    """A folder of this process's own; in memory where the system has such a place."""
    memory = "/dev/shm"
    place = memory if os.access(memory, os.W_OK) else None
    folder = tempfile.TemporaryDirectory(dir=place)
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _written(name: str, data: bytes) -> Path:
    path = _folder_of(os.getpid()) / name
    path.write_bytes(data)
    return path


@functools.cache
def _shards() -> None:
    for name, letter in (("one", "a"), ("two", "b")):
        tensors = {f"{letter}.weight": hostile.WEIGHT}
        save_file(tensors, _folder_of(os.getpid()) / f"{name}.safetensors")


# case -> its share of the time
CASES = {
    header: 40, file: 20, marker: 20, blob: 30, quant_state: 20, layer_config: 10, recipe: 10, rule: 5,
    pattern: 10, scale_shape: 5, index: 5, calibration: 10, gguf: 20,
}  # fmt: skip
