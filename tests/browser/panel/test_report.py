"""Plan, progress and report as a panel draws them."""

from __future__ import annotations

import json

import pytest

from support.harness.panel import PLAN, REPORT, cells, finish, line, phase, progress, send

pytestmark = pytest.mark.browser


def test_a_new_node_has_an_empty_panel_with_room_reserved(page, panel):
    assert phase(panel) == "idle"
    assert line(panel) == "Run the workflow to see the plan"
    assert cells(panel, ".fewbits-formats") == [
        ["Format", "Layers", "Before", "After"],
        ["Total", "–", "–", "–"],
    ]
    assert page.evaluate("host.app.rootGraph.getNodeById(12).size") == [360, 464]
    widget = page.evaluate(
        "(({ options, serialize }) => [options.serialize, serialize, options.getMinHeight()])"
        "(host.app.rootGraph.getNodeById(12).widgets[0])"
    )
    assert widget == [False, False, 364]


def test_the_plan_shows_every_format_and_the_total(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    assert phase(panel) == "planned"
    assert cells(panel, ".fewbits-formats") == [
        ["Format", "Layers", "Before, MB", "After, MB"],
        ["int8_tensorwise", "22", "12.58", "6.37"],
        ["keep", "8", "1.03", "1.03"],
        ["Total", "30", "13.61", "7.40"],
    ]
    assert panel.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "–"]
    assert panel.locator(".fewbits-label").first.inner_text() == "46% smaller"
    assert (
        panel.locator(".fewbits-loads").inner_text() == "Flux.1 · Loads in stock ComfyUI >= 0.27.0"
    )
    assert panel.locator(".fewbits-notes li").all_inner_texts() == [
        "rule 'img_mlp' matched nothing",
        "'double_stream.*' matched no layer",
    ]


def test_progress_shows_layer_percent_rate_and_time_left(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    bar = panel.get_by_role("progressbar")
    assert phase(panel) == "running"
    assert line(panel) == "single_blocks.8.linear1 42% · 210 MB/s · 3 s left"
    assert bar.get_attribute("aria-valuenow") == "42"
    assert bar.get_attribute("aria-valuetext") == "42%, single_blocks.8.linear1"
    assert panel.get_attribute("aria-busy") == "true"
    send(page, "fewbits.progress", progress(1_000_000_000))
    assert line(panel) == "Finishing 100% · 500 MB/s"


def test_progress_makes_no_elements(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(1))
    page.evaluate(
        "window.made = 0; new MutationObserver((records) => { for (const { addedNodes } of records) for (const node of"
        " addedNodes) made += node.nodeType === 1; }).observe(document.body, { childList: true, subtree: true })"
    )
    for done in range(50_000_000, 1_000_000_001, 50_000_000):
        send(page, "fewbits.progress", progress(done))
    assert page.evaluate("made") == 0


def test_the_report_shows_the_error_and_the_five_worst_layers(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(1_000_000_000))
    finish(page, REPORT)
    assert phase(panel) == "done"
    assert line(panel) == "Done in 12 s on cpu"
    assert panel.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "0.0077"]
    assert cells(panel, ".fewbits-worst")[:3] == [
        ["Largest errors", "rel_l2", "SQNR"],
        ["single_blocks.0.linear2", "0.0100", "40.0 dB"],
        ["single_blocks.1.linear2", "0.0090", "41.0 dB"],
    ]
    assert len(cells(panel, ".fewbits-worst")) == 6
    assert panel.get_by_role("progressbar").get_attribute("aria-valuenow") == "100"


def test_nothing_a_run_sends_changes_the_size_of_the_panel(page, panel):
    long = {
        **REPORT,
        "family": "f" * 300,
        "warnings": ["w" * 500] * 9,
        "worst": [{"name": "n." * 200, "rel_l2": 1.0}],
    }
    long["summary"] = [
        {"format": "format_" * 40, "layers": 1, "bytes_before": 10**15, "bytes_after": 1}
    ] * 30
    steps = (
        lambda: None,
        lambda: send(page, "fewbits.plan", {"node_id": "12", "plan": long}),
        lambda: send(page, "fewbits.progress", {**progress(1), "layer": "layer." * 100}),
        lambda: finish(page, long),
        lambda: panel.locator("summary").click(),
    )
    for width in (180, 240, 340, 900):
        page.evaluate(f"document.querySelector('.fewbits-panel').style.width = '{width}px'")
        for step in steps:
            step()
            box = panel.bounding_box()
            assert (box["width"], box["height"]) == (width, 344)
            sideways = "(e) => [e, ...e.querySelectorAll('.fewbits-scroll')].map((e) => e.scrollWidth - e.clientWidth)"
            assert panel.evaluate(sideways) == [0, 0]


def test_text_from_a_file_is_never_markup(page, panel):
    bad = "<img src=x onerror=send('hit')>"
    finish(
        page,
        json.loads(
            json.dumps(REPORT).replace("single_blocks", bad).replace("int8_tensorwise", bad)
        ),
    )
    panel.locator("summary").click()
    assert panel.locator("img").count() == 0
    assert bad in panel.inner_text()


def test_a_node_that_saves_does_not_say_that_nothing_was_lost(page, panel):
    layers = [{**row, "action": "keep"} for row in PLAN["layers"]]
    saved = {
        **PLAN,
        "layers": layers,
        "rel_l2": 0.0,
        "meaning": "no weight has changed",
        "worst": [],
    }
    finish(page, saved)
    assert panel.locator(".fewbits-value").all_inner_texts()[1] == "–"
    assert "Nothing is rounded here" in panel.inner_text()
    assert "weight has changed" not in panel.inner_text()


def test_an_almost_empty_report_still_draws(page, panel):
    finish(page, {})
    assert phase(panel) == "done"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "0", "–", "–"]
