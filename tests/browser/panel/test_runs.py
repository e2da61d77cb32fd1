"""How runs end."""

from __future__ import annotations

import pytest

from support.harness.panel import PLAN, REPORT, cells, finish, line, phase, progress, send

pytestmark = pytest.mark.browser


def test_a_cancelled_run_keeps_its_plan_and_says_where_it_stopped(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    send(page, "execution_interrupted", {"node_id": "12"})
    assert (phase(panel), line(panel)) == ("stopped", "Cancelled at 42%")
    assert panel.get_by_role("progressbar").get_attribute("aria-valuenow") == "42"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]


def test_a_failed_run_shows_the_whole_message(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(420_000_000))
    message = "model.safetensors: layer 'a': weight has non-finite values\nsecond line\n"
    send(page, "execution_error", {"node_id": "12", "exception_message": message})
    assert (phase(panel), line(panel)) == ("failed", "Failed at 42%")
    assert panel.locator(".fewbits-error li").inner_text() == message.strip()


def test_a_failure_before_the_plan_does_not_show_the_run_before(page, panel):
    finish(page, REPORT)
    send(page, "execution_start", {})
    send(page, "execution_error", {"node_id": "12", "exception_message": "no such file"})
    assert (phase(panel), line(panel)) == ("failed", "Failed")
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "–", "–", "–"]


def test_an_error_in_another_node_leaves_a_finished_report_alone(page, panel):
    finish(page, REPORT)
    send(page, "execution_error", {"node_id": "99", "exception_message": "boom"})
    assert phase(panel) == "done"


def test_a_run_that_starts_again_clears_the_old_error(page, panel):
    finish(page, REPORT)
    send(page, "execution_start", {})
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    assert panel.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "–"]
    assert panel.locator(".fewbits-worst").count() == 0


def test_a_lost_connection_is_said_and_progress_resumes(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(100_000_000))
    send(page, "reconnecting", {})
    assert line(panel) == "Connection lost at 10%"
    send(page, "fewbits.progress", progress(200_000_000))
    assert phase(panel) == "running"


def test_an_empty_panel_says_when_comfyui_reuses_an_earlier_result(page, panel):
    send(page, "execution_cached", {"nodes": ["3", "12"]})
    assert line(panel) == "Unchanged: ComfyUI reuses its earlier result"
    finish(page, REPORT)
    send(page, "execution_cached", {"nodes": ["12"]})
    assert phase(panel) == "done"


def test_a_success_without_a_report_is_done(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "execution_success", {})
    assert (phase(panel), line(panel)) == ("done", "Done")
