"""docs/speed.md: the table of kernels is the one that decides, and the command prints what the page shows."""

import re
import shlex

from fewbits.kernels.choice import ANY, HOPPER, MILLION, Row
from support.harness import readme
from support.helpers import fewbits

PAGE = readme.page("kernel-rows").read_text(encoding="utf-8")
SHOWN = re.findall(r"<!-- output: (fewbits .*?) -->", PAGE)


def bounds(numbers: range, unit: int = 1) -> str:
    """A range in words, in millions where that is its unit; nothing where everything is in it."""
    name = " M" if unit > 1 else ""
    first, last = numbers.start // unit, (numbers.stop - 1) // unit
    if numbers == ANY:
        return ""
    if numbers.stop == ANY.stop:
        return f"from {first}{name}"
    if numbers.start == 0:
        return f"up to {last}"
    below = numbers.stop % unit == 0 and unit > 1
    return f"{first} to {last + below}{name}"


def cells(kind: str, row: Row) -> list[str]:
    weight = [bounds(row.size, MILLION), row.height != ANY and f"{bounds(row.height)} rows"]
    return [kind, bounds(row.rows), ", ".join(filter(None, weight)), row.path, row.why]


def test_the_rows_of_the_page_are_those_that_decide():
    header = ["codes", "M", "weight", "path", "measured"]
    alike: dict[tuple[Row, ...], list[str]] = {}  # kinds of codes that share their rows
    for kind, table in HOPPER.items():
        alike.setdefault(table, []).append(kind)
    rows = [cells(", ".join(kinds), row) for table, kinds in alike.items() for row in table]
    if readme.WRITE:
        readme.write("kernel-rows", header, rows)
    assert readme.table("kernel-rows") == [header, *rows]


def test_the_command_prints_what_the_page_shows():
    for command in SHOWN:
        done = fewbits(*shlex.split(command)[1:])
        assert done.returncode == 0
        # the first line says which torch is here
        text = "```\n" + "\n".join([f"$ {command}", *done.stdout.splitlines()[1:]]) + "\n```\n"
        if readme.WRITE:
            readme.write_block(command, text)
        assert readme.block(command) == text
    assert SHOWN
