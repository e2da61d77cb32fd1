"""Numbers as text."""

from __future__ import annotations

import json

import pytest

from support.harness.panel import PACK

pytestmark = pytest.mark.browser


TEXTS = {
    "bytes(0)": "0 B",
    "bytes(999)": "999 B",
    "bytes(66606)": "66.61 kB",
    "bytes(13611136)": "13.61 MB",
    "bytes(23.8e9)": "23.80 GB",
    "bytes(undefined)": "–",
    "change(100, 54)": "46% smaller",
    "change(100, 150)": "50% larger",
    "change(1000, 1001)": "same size",
    "change(0, 5)": "",
    "percent(999, 1000)": "99",
    "percent(1000, 1000)": "100",
    "percent(1, 0)": "0",
    "rate(1e9, 2)": "500 MB/s",
    "rate(4.5e6, 1)": "4.5 MB/s",
    "rate(0, 0)": "",
    "duration(0.207)": "0.2 s",
    "duration(9.96)": "10 s",
    "duration(59.6)": "1 min 0 s",
    "duration(75)": "1 min 15 s",
    "duration(7320)": "2 h 2 min",
    "timeLeft(0.3)": "under 1 s left",
    "timeLeft(1.2)": "2 s left",
    "timeLeft(75)": "1 min 15 s left",
    "timeLeft(null)": "",
    "relL2(0.00768)": "0.0077",
    "relL2(0.00001)": "1e-5",
    "relL2(0)": "0",
    "relL2(NaN)": "–",
    "decibels(42.31)": "42.3 dB",
    "decibels(null)": "exact",
    "sentence('loads in stock ComfyUI')": "Loads in stock ComfyUI",
}


def test_numbers_read_as_people_write_them(page):
    calls = ", ".join(f"[{json.dumps(call)}, String({call})]" for call in TEXTS)
    names = ", ".join(sorted({call.split("(")[0] for call in TEXTS}))
    assert (
        dict(page.evaluate(f"import('{PACK}/text.mjs').then(({{ {names} }}) => [{calls}])"))
        == TEXTS
    )
