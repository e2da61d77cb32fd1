"""Files that appear complete or not at all: written under a hidden name beside the target, then
renamed; what a killed process left is removed by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: a file that somebody has open cannot be removed, so none is locked
    fcntl = None

# Never matches *.safetensors, and short: a target's name may have all the bytes a name can have.
NAME = re.compile(r"\.fewbits-[0-9a-f]{16}\.part")
# Seconds. Windows cannot rename an open file: between closing and renaming nothing protects it.
CLOSED_FOR = 60.0


class PartFile:
    """A file in the making, which this process alone holds; `raw` is open, unbuffered.

    The lock belongs to the open file: it ends when the process does, however that ends.
    """

    def __init__(self, target: Path):
        self.target = target
        while True:
            self.path = target.with_name(f".fewbits-{secrets.token_hex(8)}.part")
            self.raw = open(self.path, "xb", buffering=0)  # noqa: SIM115
            if _lock(self.raw.fileno()) is not False and _still_there(self.raw, self.path):
                return
            self.raw.close()  # taken for a leftover before it was locked

    def publish(self) -> None:
        """Flush, and give the file its name; what stood there before is replaced as a whole."""
        os.fsync(self.raw.fileno())
        if fcntl is None:
            self.raw.close()
        os.replace(self.path, self.target)
        self.raw.close()
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove what was written; nothing after `publish`."""
        if fcntl is None:
            self.raw.close()
        self.path.unlink(missing_ok=True)
        self.raw.close()


def write_whole(target: Path, data: bytes) -> None:
    """Replace a small file by other bytes, or leave it as it was; a link is replaced, not followed.

    Raises:
        OSError: the folder or the disk does not allow it.
    """
    remove_leftovers(target.parent)
    part = PartFile(target)
    try:
        view = memoryview(data)
        while view:
            view = view[part.raw.write(view) :]
        part.publish()
    except BaseException:
        part.discard()
        raise


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the parts in a folder that no living process writes.

    Returns:
        Those that were removed.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        parts = [Path(entry.path) for entry in entries if NAME.fullmatch(entry.name)]
        return [path for path in parts if _remove_if_left(path)]
    return []


def _remove_if_left(path: Path) -> bool:
    try:
        if fcntl is None:
            if time.time() - path.stat().st_mtime > CLOSED_FOR:
                path.unlink()
                return True
            return False
        with open(path, "r+b") as file:  # network folders lock only what may be written
            if _lock(file.fileno()) and _still_there(file, path):
                path.unlink()
                return True
    except OSError:  # gone already, or somebody else's
        pass
    return False


def _lock(descriptor: int) -> bool | None:
    """True: locked by us. False: by somebody else. None: this system or folder has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _still_there(file: object, path: Path) -> bool:
    """Whether the name still means the file that is open."""
    if fcntl is None:
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder."""
    if os.name == "posix":  # Windows has no directory handles to flush
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
