"""Tables in the README that a test measures: between `<!-- table: NAME -->` and `<!-- end -->`.

`FEWBITS_WRITE_TABLES=1 python3 dev.py test tests/e2e` writes what was measured; otherwise the tests hold the README to it.
"""

from __future__ import annotations

import os
import re

from .emoji import ROOT

README = ROOT / "README.md"
WRITE = bool(os.environ.get("FEWBITS_WRITE_TABLES"))


def _pattern(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- table: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def block(name: str) -> str:
    """What stands between the two marks."""
    return _pattern(name).search(README.read_text(encoding="utf-8"))[2]


def write_block(name: str, text: str) -> None:
    whole = README.read_text(encoding="utf-8")
    README.write_text(
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
