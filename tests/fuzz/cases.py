"""What is tried with hostile inputs: each case takes dice and may only end well or in an error of ours."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from fewbits.quant_ops.checkpoint.exporters import TARGETS
from fewbits.quant_ops.checkpoint.header import parse_header
from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.checkpoint.importers.source import ImportedSource, imported
from fewbits.quant_ops.checkpoint.labels import label_of
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.checkpoint.verify import stored_findings, verify_source
from fewbits.quant_ops.errors import QuantError
from fewbits.quant_ops.pipeline import quantize, rewrite
from fewbits.quant_ops.planning.layer_config import parse_layer_config_text
from fewbits.quant_ops.planning.recipe import Recipe, draft_from_text, parse_rule, parse_wish
from fewbits.quant_ops.sources import MemorySink, MemorySource
from support import hostile

COPY = Recipe(primary=None)
INT8 = Recipe(primary=parse_wish("int8_tensorwise"), preset="none")
refused = contextlib.suppress(QuantError)


def header(dice: random.Random) -> None:
    text, size = hostile.header(dice)
    with refused:
        found = parse_header(text, Path("x.safetensors"), 0, size)
        assert sum(spec.nbytes for spec in found.tensors.values()) == size
        assert all(0 <= begin <= end <= size for _, begin, end in found.ranges.values())
        json.dumps(found.metadata, ensure_ascii=False).encode()


def blob(dice: random.Random) -> None:
    """A layer through every reader: copied, decoded, in bitsandbytes' names, verified, planned."""
    _, tensors, metadata = hostile.layer(dice)
    source = MemorySource(tensors, metadata, "x")
    assume = {"assume": "nf4"} if dice.random() < 0.3 else {}
    options = ImportOptions(foreign_only=dice.random() < 0.3, **assume)
    with refused:
        sink = MemorySink()
        rewrite(ImportedSource(source, options, TARGETS["comfy_quant"]), sink, COPY)
        for name, tensor in sink.tensors.items():
            assert tensor is not None, name
    with refused:
        rewrite(
            ImportedSource(source, options, TARGETS[dice.choice(("bf16", "bnb"))]),
            MemorySink(),
            COPY,
        )
    with refused:
        quantize(imported(source, ImportOptions(foreign_only=True)), MemorySink(), INT8)
    with refused:
        stored_findings(source)
        verify_source(source).to_text()


def layer_config(dice: random.Random) -> None:
    with refused:
        found = parse_layer_config_text(
            hostile.layer_config(dice), "x", fullmatch=dice.random() < 0.3
        )
        found.under(INT8.primary).ranked(["img_in", "double_blocks.0.a"])
        json.dumps(found.to_json())


def recipe(dice: random.Random) -> None:
    with refused:
        draft_from_text(hostile.recipe(dice), "x").finish().to_text()


def rule(dice: random.Random) -> None:
    with refused:
        parse_rule(hostile.rule(dice)).to_text()
    with refused:
        parse_wish(hostile.rule(dice).partition("=")[2])


def scale_shape(dice: random.Random) -> None:
    shape = tuple(dice.choice((0, 1, 2, 32, 64, 128, 2**31, 2**62)) for _ in range(2))
    scale = tuple(dice.choice((0, 1, 2, 4, 32, 64, 128, 2**31)) for _ in range(dice.randrange(5)))
    with refused:
        label_of(
            dice.choice(("F8_E4M3", "F8_E5M2", "I8", "U8")), shape, scale, "int8_blockwise", 64
        )


def index(dice: random.Random) -> None:
    folder = _folder_with_shards()
    path = folder / "model.safetensors.index.json"
    path.write_bytes(hostile.index(dice))
    with refused, FileSource(path) as found:
        for name in found.header.tensors:
            found.read(name)


_FOLDERS: dict[int, tempfile.TemporaryDirectory] = {}


def _folder_with_shards() -> Path:
    if os.getpid() not in _FOLDERS:
        _FOLDERS[os.getpid()] = folder = tempfile.TemporaryDirectory()
        for name, letter in (("one", "a"), ("two", "b")):
            save_file(
                {f"{letter}.weight": hostile.WEIGHT}, Path(folder.name) / f"{name}.safetensors"
            )
    return Path(_FOLDERS[os.getpid()].name)


# case -> its share of the time
CASES = {
    header: 40, blob: 30, layer_config: 10, recipe: 5, rule: 5, scale_shape: 5, index: 5,
}  # fmt: skip
