"""Results of earlier runs, and plans before one."""

from __future__ import annotations

import pytest

from support.harness.panel import (
    PLAN,
    PROMPT,
    REPORT,
    answer,
    cells,
    changed,
    finish,
    history,
    line,
    phase,
    progress,
    send,
    set_prompt,
    wait_for,
)

pytestmark = pytest.mark.browser


def reload(page) -> None:
    """What the page does with a stored workflow after a reload: outputs are gone."""
    page.evaluate("host.app.extensions[0].loadedGraphNode(host.app.rootGraph.getNodeById(12))")


def test_a_reload_brings_back_the_report_of_the_same_settings(page, panel):
    answer(page, "/history?max_items=64", history(PROMPT))
    set_prompt(page, PROMPT)
    reload(page)
    wait_for(page, "dataset.phase === 'done'")
    assert line(panel) == "Done in 12 s on cpu"
    assert panel.get_by_text("All 30 layers").is_visible()


@pytest.mark.parametrize("node, inputs", [("12", {"keep": "x"}), ("1", {"unet_name": "b"})])
def test_a_report_of_other_settings_does_not_come_back(page, panel, node, inputs):
    answer(page, "/history?max_items=64", history(changed(PROMPT, node, **inputs)))
    set_prompt(page, PROMPT)
    reload(page)
    page.wait_for_timeout(600)
    assert phase(panel) == "idle"


def test_a_run_answered_from_the_cache_shows_its_earlier_report(page, panel):
    send(page, "execution_start", {})
    send(page, "execution_cached", {"nodes": ["1", "12"]})
    send(page, "executed", {"node": "12", "output": {"fewbits_report": [REPORT]}, "prompt_id": "p"})
    assert line(panel) == "Unchanged · Done in 12 s on cpu"
    finish(page, REPORT)
    assert phase(panel) == "done"
    assert page.evaluate("refreshed") == 0


def test_an_older_comfyui_that_sends_nothing_for_the_cache_is_asked_for_its_history(page, panel):
    answer(page, "/history?max_items=64", history(PROMPT))
    set_prompt(page, PROMPT)
    send(page, "execution_start", {})
    send(page, "execution_cached", {"nodes": ["1", "12"]})
    send(page, "execution_success", {})
    wait_for(page, "dataset.phase === 'done'")
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]


def test_a_page_reloaded_during_a_run_gets_the_plan(page, panel):
    answer(page, "/fewbits/running", {"12": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    page.wait_for_function(
        "document.querySelector('.fewbits-formats tfoot').textContent.includes('13.61')"
    )
    send(page, "fewbits.progress", progress(430_000_000))
    assert phase(panel) == "running"


def test_a_failure_is_gone_when_the_next_run_starts(page, panel):
    answer(page, "/history?max_items=64", history(PROMPT))
    set_prompt(page, changed(PROMPT, "12", keep="re:("))
    send(page, "execution_error", {"node_id": "12", "exception_message": "boom"})
    assert phase(panel) == "failed"
    set_prompt(page, PROMPT)
    send(page, "execution_start", {})
    assert phase(panel) == "idle" and panel.locator(".fewbits-error").count() == 0
    send(page, "execution_cached", {"nodes": ["1", "12"]})
    wait_for(page, "dataset.phase === 'done'")


def test_a_failure_is_gone_when_the_loader_before_it_fails(page, panel):
    send(page, "execution_error", {"node_id": "12", "exception_message": "boom"})
    send(page, "execution_start", {})
    send(page, "execution_error", {"node_id": "1", "exception_message": "no such file"})
    assert phase(panel) == "idle" and panel.locator(".fewbits-error").count() == 0


def test_a_result_is_greyed_when_a_setting_changes_and_back_when_it_returns(page, panel):
    answer(page, "/history/p1", history(PROMPT))
    set_prompt(page, PROMPT)
    send(
        page, "executed", {"node": "12", "output": {"fewbits_report": [REPORT]}, "prompt_id": "p1"}
    )
    for prompt in (changed(PROMPT, "12", keep="x"), changed(PROMPT, "1", unet_name="b")):
        set_prompt(page, prompt)
        send(page, "graphChanged", {})
        wait_for(page, "hasAttribute('data-stale')")
        assert line(panel) == "Settings changed: run again for their result"
        set_prompt(page, PROMPT)
        send(page, "graphChanged", {})
        wait_for(page, "hasAttribute('data-stale') === false")
        assert line(panel) == "Done in 12 s on cpu"


def test_the_plan_is_shown_before_a_run_and_again_when_a_setting_changes(page, panel):
    target = {"path": "output/diffusion_models/a_int8.safetensors", "exists": True}
    sizes = {"int8_tensorwise": 7_396_468, "nvfp4": 4_000_000}
    answer(page, "/fewbits/plan", {"plan": PLAN, "sizes": sizes, "target": target})
    set_prompt(page, {**PROMPT, "99": {"class_type": "KSampler", "inputs": {"model": ["12", 0]}}})
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'preview'")
    assert line(panel) == "Before running, from the file's header"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]
    assert "This file exists" in panel.inner_text()
    panel.get_by_text("Size in every format").first.click()
    assert cells(panel, ".fewbits-sizes") == [
        ["nvfp4", "4.00 MB"],
        ["int8_tensorwise", "7.40 MB"],
    ]
    asked = page.evaluate("requests.filter(([route]) => route === '/fewbits/plan')")
    assert asked == [["/fewbits/plan", {"prompt": PROMPT, "id": "12"}]]  # and nothing after it
    send(page, "graphChanged", {})
    page.wait_for_timeout(500)
    assert page.evaluate("requests.filter(([route]) => route === '/fewbits/plan').length") == 1
    set_prompt(page, changed(PROMPT, "12", keep="x"))
    answer(page, "/fewbits/plan", {"error": "pattern 're:(' is not a regular expression"})
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'idle'")
    assert "is not a regular expression" in panel.locator(".fewbits-notes").inner_text()


def test_a_file_that_may_be_replaced_is_no_warning_and_a_name_needs_no_plan(page, panel):
    path = "output/diffusion_models/a_int8.safetensors"
    target = {"path": path, "exists": True, "overwrite": True}
    answer(page, "/fewbits/plan", {"target": target})
    set_prompt(page, PROMPT)
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'preview'")
    assert panel.locator(".fewbits-saved").inner_text().split("\n") == ["Will replace", path]
    assert panel.locator(".fewbits-notes").count() == 0
    assert line(panel) == "Run the workflow to see the plan"


def test_a_preview_gives_way_to_the_run(page, panel):
    answer(page, "/fewbits/plan", {"plan": PLAN, "sizes": {}})
    set_prompt(page, PROMPT)
    send(page, "graphChanged", {})
    wait_for(page, "dataset.phase === 'preview'")
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    assert phase(panel) == "planned"


def test_what_is_typed_into_rules_is_planned_at_once(page, panel):
    answer(page, "/fewbits/plan", {"plan": PLAN, "sizes": {}})
    page.evaluate(
        "addNode(13, host.app.rootGraph, 'FewBitsLayerRules', [{ name: 'pattern', value: '' }])"
    )
    set_prompt(page, PROMPT)
    page.evaluate("host.app.rootGraph.getNodeById(13).widgets[0].callback('blocks.*')")
    wait_for(page, "dataset.phase === 'preview'")
