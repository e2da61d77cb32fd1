"""Which node a message is for; pages that lack something, where nothing is logged or thrown."""

from __future__ import annotations

import pytest

from support.harness.panel import PLAN, REPORT, cells, load, phase, progress, send

pytestmark = pytest.mark.browser


def test_a_node_inside_subgraphs_is_found_by_its_path(page, panel):
    page.evaluate(
        "const sub = new Graph('uuid-1'); host.app.rootGraph.subgraphs.set(sub.id, sub);"
        "host.app.rootGraph.add({ id: 5, subgraph: sub }); addNode(7, sub)"
    )
    panel, inner = panel.nth(0), panel.nth(1)
    send(page, "fewbits.plan", {"node_id": "5:7", "plan": PLAN})
    assert (phase(panel), phase(inner)) == ("idle", "planned")
    page.evaluate(
        "(report) => host.app.extensions[0].onNodeOutputsUpdated({ 'uuid-1:7': { fewbits_report: [report] } })",
        REPORT,
    )
    assert (phase(panel), phase(inner)) == ("idle", "done")


def test_a_node_recreated_while_it_runs_gets_its_plan_back(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    page.evaluate("document.body.replaceChildren(); addNode(12)")  # what undo does
    send(page, "fewbits.progress", progress(420_000_000))
    assert phase(panel) == "running"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "30", "13.61", "7.40"]


def test_progress_without_a_plan_shows_progress(page, panel):
    send(page, "fewbits.progress", progress(420_000_000))  # the page was reloaded during the run
    assert phase(panel) == "running"
    assert cells(panel, ".fewbits-formats")[-1] == ["Total", "–", "–", "–"]


@pytest.mark.parametrize(
    "hook",
    [
        "loadedGraphNode(host.app.rootGraph.getNodeById(12))",
        "onNodeOutputsUpdated(host.app.nodeOutputs)",
    ],
)
def test_stored_outputs_come_back(page, panel, hook):
    page.evaluate(
        "(report) => { host.app.nodeOutputs = { 12: { fewbits_report: [report] } }; }", REPORT
    )
    page.evaluate(f"host.app.extensions[0].{hook}")
    assert phase(panel) == "done"


def test_other_nodes_get_no_panel(page, panel):
    page.evaluate(
        "addNode(13, host.app.rootGraph, 'KSampler'); addNode(14, host.app.rootGraph, 'FewBitsLayerRules')"
    )
    assert panel.count() == 1


def test_messages_about_unknown_nodes_and_broken_ones_change_nothing(page, panel):
    for event in (
        "fewbits.plan",
        "fewbits.progress",
        "execution_error",
        "execution_interrupted",
        "execution_cached",
    ):
        for detail in ({}, {"node_id": None}, {"node_id": "999"}, {"node_id": "5:6:7"}):
            send(page, event, detail)
    send(page, "fewbits.plan", {"node_id": "12", "plan": None})
    page.evaluate("host.app.rootGraph.getNodeById(12).onExecuted(null)")
    page.evaluate("host.app.extensions[0].onNodeOutputsUpdated(undefined)")
    assert phase(panel) == "idle"


@pytest.mark.parametrize(
    "missing",
    [
        "delete host.app.registerExtension",
        "delete host.api.addEventListener",
        "delete host.app.rootGraph",
        "host.app.rootGraph = {}",
        "delete host.app.nodeOutputs",
    ],
)
def test_the_script_is_silent_where_the_host_lacks_something(page, missing):
    page.evaluate(f"window.kept = host.app.rootGraph; {missing}")
    load(page)
    page.evaluate("addNode(12, kept)")
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    send(page, "fewbits.progress", progress(1))
    send(page, "execution_error", {"node_id": "12", "exception_message": "x"})
    page.evaluate("for (const e of host.app.extensions) e.loadedGraphNode(kept.getNodeById(12))")
    page.evaluate("for (const e of host.app.extensions) e.onNodeOutputsUpdated({ 12: {} })")


@pytest.mark.parametrize("missing", ["addDOMWidget", "computeSize", "setSize"])
def test_the_script_is_silent_where_a_node_lacks_something(page, missing):
    load(page)
    page.evaluate(
        "(missing) => { const add = host.app.extensions[0].nodeCreated; host.app.extensions[0].nodeCreated ="
        " (node) => { delete node[missing]; add(node); }; addNode(12); }",
        missing,
    )
    assert page.locator(".fewbits-panel").count() == (missing != "addDOMWidget")
