"""compare_files: two files of any formats, decoded and compared tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..checkpoint.importers.source import PREFIXES, ImportedSource
from ..checkpoint.reader import FileSource
from ..errors import CheckpointError
from ..pipeline import ProgressFn, ignore_progress
from ..report.comparison import Comparison, Difference, measure

NOTHING = ("", "")


def compare_files(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    on_progress: ProgressFn = ignore_progress,
) -> Comparison:
    """Compare two files, indexes or folders of shards; errors are relative to the first.

    Quantized layers are decoded to float32, one at a time; other tensors are taken as they are.
    Where one file's names have a prefix that the other's lack, it is left out.

    Raises:
        CheckpointError: a file that cannot be read without guessing, or two that share no name.
    """
    with FileSource(first) as a, FileSource(second) as b:
        return compare(a, b, on_progress)


def compare(a: FileSource, b: FileSource, on_progress: ProgressFn = ignore_progress) -> Comparison:
    """`compare_files` for opened files."""
    decoded = _decoded(a), _decoded(b)
    tensors = [source.header.tensors for source in decoded]
    prefixes = _prefixes(*tensors)
    names = [_without(prefix, found) for prefix, found in zip(prefixes, tensors, strict=True)]
    shared = [name for name in names[0] if name in names[1]]
    if not shared:
        raise CheckpointError(
            f"{a.name} and {b.name} share no tensor name; compare two versions of one model"
        )
    sizes = [tensors[0][names[0][name]].nbytes for name in shared]
    differences, reshaped, done = [], [], 0
    for name, size in zip(shared, sizes, strict=True):
        on_progress(done, sum(sizes), name)
        done += size
        own = [found[name] for found in names]
        shapes = [list(found[key].shape) for found, key in zip(tensors, own, strict=True)]
        if shapes[0] != shapes[1]:
            reshaped.append(f"{name} {shapes[0]} and {shapes[1]}")
            continue
        values = [source.read(key) for source, key in zip(decoded, own, strict=True)]
        formats = tuple(_stored_as(source, key) for source, key in zip(decoded, own, strict=True))
        differences.append(Difference(name, formats, measure(*values)))
    on_progress(done, done, "")
    for file in (*a.files, *b.files):
        file.refuse_change()
    return Comparison(
        names=(a.name, b.name),
        bytes=(_size(a), _size(b)),
        differences=tuple(differences),
        only=(_missing(names[0], names[1]), _missing(names[1], names[0])),
        reshaped=tuple(reshaped),
    )


def _decoded(source: FileSource) -> ImportedSource:
    return ImportedSource(source, retarget=lambda made: made.decoded("F32", ""))


def _without(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The name without the prefix -> the name."""
    return {name.removeprefix(prefix): name for name in names}


def _prefixes(a: Iterable[str], b: Iterable[str]) -> tuple[str, str]:
    """What to leave out of the names of each file so that most are shared; nothing if in doubt."""
    pairs = [
        NOTHING,
        *((prefix, "") for prefix in PREFIXES),
        *(("", prefix) for prefix in PREFIXES),
    ]

    def shared(pair: tuple[str, str]) -> int:
        left, right = pair
        return len(_without(left, a).keys() & _without(right, b).keys())

    return max(pairs, key=shared)  # the first of equals


def _stored_as(source: ImportedSource, name: str) -> str:
    made = source.canonical.get(name.removesuffix(".weight"))
    if made is None or not name.endswith(".weight"):
        return source.source.header.tensors[name].dtype
    return made.format or made.dialect


def _missing(names: Iterable[str], other: Iterable[str]) -> tuple[str, ...]:
    other = set(other)
    return tuple(name for name in names if name not in other)


def _size(source: FileSource) -> int:
    return sum(file.path.stat().st_size for file in source.files)
