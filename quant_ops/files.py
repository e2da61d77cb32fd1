"""Files that are read: what may be opened at all, and whether it is still what it was."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, QuantError

MAX_TEXT_BYTES = 1 << 26  # of an index, a recipe or a layer-config; real ones have a few MB at most
CHANGES = {"st_size": "size", "st_mtime_ns": "time of change", "st_ino": "place on the disk"}


@dataclass(frozen=True)
class InputFile:
    """A file that a model is read from. `state` is what the system said of it when it was opened;
    None where nobody reads it any more.
    """

    path: Path
    state: os.stat_result | None = None

    @classmethod
    def found(cls, path: Path) -> InputFile:
        """The file as it is now.

        Raises:
            CheckpointError: missing, not to be read, or a pipe, device or folder: those have no
                size, and opening one may wait for ever.
        """
        return cls(path, regular_file(path))

    def refuse_as_output(self, target: Path) -> None:
        """Links of every kind are followed.

        Raises:
            CheckpointError: `target` is this file.
        """
        try:
            same = os.path.samefile(self.path, target)
        except (OSError, ValueError):  # one of them does not exist
            return
        if same:
            raise CheckpointError(
                f"{target}: the output would replace {self.path}, which is read from; "
                "an input is never changed: name another file"
            )

    def refuse_change(self) -> None:
        """What was read may be half old and half new.

        Raises:
            CheckpointError: the file is not what it was when it was opened.
        """
        if self.state is None:
            return
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be found any more ({error.strerror}); nothing was written"
            ) from None
        changed = [name for field, name in CHANGES.items() if _changed(self.state, now, field)]
        if changed:
            raise CheckpointError(
                f"{self.path.name}: changed while it was read ({', '.join(changed)}); nothing was "
                "written: start again when nobody writes it"
            )


def _changed(before: os.stat_result, now: os.stat_result, field: str) -> bool:
    return getattr(before, field) != getattr(now, field)


def refuse_as_output(files: Iterable[InputFile], target: Path) -> None:
    """`InputFile.refuse_as_output` for several."""
    for file in files:
        file.refuse_as_output(target)


def regular_file(path: Path, error: type[QuantError] = CheckpointError) -> os.stat_result:
    """What the system says of a file, if it is one.

    Raises:
        error: missing, not to be read, or a pipe, device or folder.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    except ValueError as problem:  # a zero byte in the name
        raise error(f"{str(path)!r}: not a file name: {problem}") from None
    if not stat.S_ISREG(state.st_mode):
        raise error(f"{path}: is a {_kind(state.st_mode)}; a file on a disk is needed")
    return state


def _kind(mode: int) -> str:
    kinds = {
        "folder": stat.S_ISDIR,
        "pipe": stat.S_ISFIFO,
        "socket": stat.S_ISSOCK,
        "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((kind for kind, holds in kinds.items() if holds(mode)), "special file")


def read_text(path: Path, error: type[QuantError]) -> str:
    """A small UTF-8 file that a person or a tool wrote.

    Raises:
        error: no such file, no file at all, too large, or not UTF-8.
    """
    state = regular_file(path, error)
    if state.st_size > MAX_TEXT_BYTES:
        raise error(f"{path}: has {state.st_size} bytes, {MAX_TEXT_BYTES} are read at most")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8: {problem}") from None
