"""The bytes in each format's docstring are those that the format writes."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass

import pytest
import torch

from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.formats.base import marker_bytes
from fewbits.quant_ops.planning.wish import parse_value
from fewbits.quant_ops.sources import DTYPE_NAMES
from support.codec import encode
from support.vectors import raw

EXAMPLE = re.compile(
    r"Example(?: with ([^:]*))?:\n\n(.*?)\n\nis stored as\n\n(.*?)(?:\n\n|$)", re.S
)
TENSOR = re.compile(r"(\w+) (\w+) \(([\d, ]*)\): (.*)")


@dataclass(frozen=True)
class Example:
    """`1 -2 0 x3` are the values 1 -2 0 0 0; `2 rows of` such a line are two; bytes are hexadecimal."""

    stated: dict[str, object]
    weight: torch.Tensor
    marker: dict
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]


def repeated(text: str) -> list[str]:
    values = []
    for word in text.split():
        values += [values[-1]] * (int(word[1:]) - 1) if word.startswith("x") else [word]
    return values


def rows(text: str) -> list[list[float]]:
    table = []
    for line in text.splitlines():
        count, _, values = line.rpartition(" rows of ")
        table += [[float(value) for value in repeated(values)]] * int(count.strip() or 1)
    return table


def examples(format: object) -> list[Example]:
    """Those of a class; a line that is indented further belongs to the one before."""
    found = []
    for options, weight, stored in EXAMPLE.findall(inspect.cleandoc(type(format).__doc__ or "")):
        pairs = (pair.partition("=") for pair in options.split(", ") if pair)
        lines = re.sub(r"\n {6,}", " ", stored).splitlines()
        marker, tensors = {}, {}
        for line in map(str.strip, lines):
            if line.startswith("comfy_quant: "):
                marker = json.loads(line.partition(": ")[2])
                continue
            suffix, dtype, shape, data = TENSOR.fullmatch(line).groups()
            sizes = tuple(int(size) for size in shape.split(",") if size.strip())
            tensors[suffix] = (dtype, sizes, bytes(int(byte, 16) for byte in repeated(data)))
        found.append(
            Example(
                stated={name: parse_value(value) for name, _, value in pairs},
                weight=torch.tensor(rows(weight)),
                marker=marker,
                tensors=tensors,
            )
        )
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_the_docstring_shows_what_is_stored(name):
    shown = examples(FORMATS[name])
    assert shown
    for example in shown:
        tensors, marker = encode(name, example.weight, example.stated)
        stored = {
            suffix: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), raw(tensor))
            for suffix, tensor in tensors.items()
        }
        assert stored == example.tensors
        assert marker_bytes(marker) == json.dumps(example.marker).encode()
