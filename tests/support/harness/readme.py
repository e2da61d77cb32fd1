"""Blocks of the README and of docs/ that code writes: between `<!-- table: NAME -->` and `<!-- end -->`.

`FEWBITS_WRITE_TABLES=1 python3 dev.py test tests/e2e` writes what was measured; otherwise the tests hold the pages to it.
A block stands on one page, whichever that is: moving the two marks moves the block.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .emoji import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITE = bool(os.environ.get("FEWBITS_WRITE_TABLES"))


def _pattern(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- \w+: {re.escape(name)} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def page(name: str) -> Path:
    """The one page that has a block of this name.

    Raises:
        LookupError: none has it, or several.
    """
    found = [path for path in PAGES if _pattern(name).search(path.read_text(encoding="utf-8"))]
    if len(found) != 1:
        raise LookupError(f"{name!r} stands on {[path.name for path in found] or 'no page'}")
    return found[0]


def block(name: str) -> str:
    """What stands between the two marks."""
    return _pattern(name).search(page(name).read_text(encoding="utf-8"))[2]


def write_block(name: str, text: str) -> None:
    path = page(name)
    whole = path.read_text(encoding="utf-8")
    path.write_text(
        _pattern(name).sub(lambda match: match[1] + text + match[3], whole),
        encoding="utf-8",
        newline="\n",
    )


def table(name: str) -> list[list[str]]:
    """The cells of a table, header first, without the line of dashes."""
    lines = block(name).strip().splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines)
        if i != 1
    ]


def write(name: str, header: list[str], rows: list[list[str]]) -> None:
    lines = [header, ["---"] * len(header), *rows]
    write_block(name, "".join(f"| {' | '.join(line)} |\n" for line in lines))
