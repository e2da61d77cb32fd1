"""What end-to-end tests measured: one JSON per table in tests/results, which the tables of docs/ are made from.

`FEWBITS_WRITE_TABLES=1 python3 dev.py test tests/e2e tests/test_tables.py` measures, writes the results and then the
tables; otherwise the end-to-end tests hold the results to what they measure, and a fast test the tables to the results.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .harness.emoji import ROOT
from .harness.readme import WRITE

RESULTS = ROOT / "tests" / "results"


def load(table: str) -> dict[str, dict]:
    """Row -> what was measured."""
    return json.loads((RESULTS / f"{table}.json").read_text(encoding="utf-8"))


def stored(table: str, row: str, measured: dict) -> dict:
    """The stored values of one row, after they became `measured` if results are to be written.

    Raises:
        AssertionError: nothing is stored for this row.
    """
    rows = load(table)
    if WRITE:
        rows[row] = measured
        text = json.dumps(dict(sorted(rows.items())), indent=2)
        (RESULTS / f"{table}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    assert row in rows, f"{table}.json has no {row!r}: measure it with FEWBITS_WRITE_TABLES=1"
    return rows[row]


def append(path: Path, rows: list[dict]) -> None:
    """Rows of a benchmark to the end of its CSV, which is made where it is not there."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
