"""The list of layers, and what a choice in it writes into the graph."""

from __future__ import annotations

import pytest

from support.harness.panel import GRAPH, PLAN, REPORT, answer, finish, load, send

pytestmark = pytest.mark.browser


def quantize_node(page, keep: str = "") -> object:
    """Node 12 with the inputs that a click on a layer may write to, and the formats of the server."""
    answer(page, "/fewbits/formats", {"int8_tensorwise": {}, "bnb_nf4": {}, "other": {}})
    page.evaluate(GRAPH)
    load(page)
    page.wait_for_function("host.app.extensions.length === 1")
    page.evaluate(
        """(keep) => addNode(12, host.app.rootGraph, "FewBitsQuantizeINT8", [
          { name: "format", value: "int8_tensorwise" },
          { name: "keep", value: keep, options: {} },
        ], [{ name: "model" }, { name: "recipe" }])""",
        keep,
    )
    page.wait_for_function("requests.some(([route]) => route === '/fewbits/formats')")
    return page.locator(".fewbits-panel")


def open_layers(page, panel, **changed: object) -> None:
    layers = [{**row, "rel_l2": i / 1000, **changed} for i, row in enumerate(REPORT["layers"])]
    finish(page, {**REPORT, "layers": layers})
    panel.get_by_text("All 30 layers").click()


def names(panel) -> list[str]:
    return panel.locator(".fewbits-layers li .fewbits-name").all_inner_texts()


def give(panel, layer: str, format: str) -> None:
    menu = panel.get_by_label(f"Format of {layer}")
    menu.focus()
    menu.select_option(format)


def widgets(page, node: int) -> dict:
    return page.evaluate(
        "(id) => Object.fromEntries(host.app.rootGraph.getNodeById(id).widgets"
        ".filter((w) => w.name !== 'fewbits_panel').map((w) => [w.name, w.value]))",
        node,
    )


def test_the_layer_list_is_made_when_opened_and_filters_by_every_word(page, panel):
    finish(page, REPORT)
    layers = panel.locator(".fewbits-layers li")
    assert layers.count() == 0
    panel.get_by_text("All 30 layers").click()
    assert layers.count() == 30
    texts = layers.nth(0).inner_text().split("\n")
    assert texts == [
        "single_blocks.0.linear1",
        "0.0077",
        "keep",
        "256 × 1280 BF16",
        "655.36 kB",
        "preset flux: first projection",
    ]
    assert (
        layers.nth(1).locator(".fewbits-facts").inner_text().split("\n")[2]
        == "655.36 kB → 328.77 kB"
    )
    panel.get_by_label("Filter layers").fill("linear2 PRIMARY")
    assert panel.locator(".fewbits-layers li:visible").count() == 15
    assert panel.locator(".fewbits-count").inner_text() == "15 of 30"


def test_the_layer_list_sorts_by_error_size_and_depth(page):
    panel = quantize_node(page)
    open_layers(page, panel)
    assert names(panel)[0] == "single_blocks.0.linear1"
    order = panel.get_by_label("Order of the layers")
    order.select_option("Largest error first")
    assert names(panel)[0] == "single_blocks.29.linear2"
    order.select_option("Largest size first")
    assert names(panel)[0] == "single_blocks.0.linear1"
    shuffled = ["img_in", "blocks.10.a", "blocks.2.b", "blocks.2.a", "out.0"]
    rows = [{**REPORT["layers"][1], "name": name} for name in shuffled]
    finish(page, {**REPORT, "layers": rows})
    order.select_option("From the first block to the last")
    assert names(panel) == ["img_in", "blocks.2.b", "blocks.2.a", "blocks.10.a", "out.0"]


def test_a_layer_is_kept_by_its_menu_and_let_go_again(page):
    panel = quantize_node(page, keep="a.*")
    open_layers(page, panel, rule="primary")
    layer = "single_blocks.3.linear2"
    give(panel, layer, "keep")
    give(panel, "single_blocks.1.linear2", "keep")
    assert widgets(page, 12)["keep"] == f"a.*\n{layer}\nsingle_blocks.1.linear2"
    give(panel, layer, "int8_tensorwise")  # nobody said anything else about it
    assert widgets(page, 12)["keep"] == "a.*\nsingle_blocks.1.linear2"
    assert page.evaluate("host.app.rootGraph.nodes.length") == 1


def test_a_layer_gets_another_format_from_rules_that_are_put_before_the_node(page):
    panel = quantize_node(page)
    open_layers(page, panel, rule="primary")
    give(panel, "single_blocks.3.linear2", "bnb_nf4")
    give(panel, "single_blocks.5.linear2", "bnb_nf4")
    assert widgets(page, 100) == {
        "pattern": "single_blocks.3.linear2\nsingle_blocks.5.linear2",
        "format": "bnb_nf4",
        "options": "",
    }
    assert page.evaluate("links(12)") == ["100:0 -> 1"]
    # another format does not fit into those: new rules, which count before them
    give(panel, "single_blocks.3.linear2", "int8_tensorwise")
    give(panel, "single_blocks.9.linear2", "other")
    assert widgets(page, 100)["pattern"] == "single_blocks.5.linear2"
    assert widgets(page, 101) == {
        "pattern": "single_blocks.9.linear2",
        "format": "other",
        "options": "",
    }
    assert page.evaluate("links(12)") == ["101:0 -> 1"]
    assert page.evaluate("links(101)") == ["100:0 -> 0"]
    assert page.evaluate("overlapping()") == []


def test_a_choice_that_another_rule_beats_says_which(page):
    panel = quantize_node(page, keep="single_blocks.*")
    open_layers(page, panel, rule="primary")
    layer = "single_blocks.3.linear2"
    give(panel, layer, "bnb_nf4")
    give(panel, "single_blocks.5.linear2", "bnb_nf4")
    assert panel.locator(".fewbits-beaten").count() == 0
    rows = [
        {**REPORT["layers"][3], "format": None, "action": "keep", "rule": "single_blocks.*"},
        {**REPORT["layers"][5], "format": "bnb_nf4", "rule": "single_blocks.5.linear2"},
    ]
    finish(page, {**REPORT, "layers": rows})
    assert panel.locator(".fewbits-beaten").all_text_contents() == [
        "bnb_nf4 was chosen here, but rule 'single_blocks.*' counts first: change that rule"
    ]


def test_rules_that_a_person_wrote_options_for_are_not_added_to(page):
    panel = quantize_node(page)
    page.evaluate(
        """() => {
          const rules = LiteGraph.createNode("FewBitsLayerRules");
          host.app.rootGraph.add(rules);
          rules.widgets.find((w) => w.name === "pattern").value = "blocks.*";
          rules.widgets.find((w) => w.name === "format").value = "bnb_nf4";
          rules.widgets.find((w) => w.name === "options").value = "method=svd";
          rules.connect(0, host.app.rootGraph.getNodeById(12), 1);
        }"""
    )
    open_layers(page, panel, rule="primary")
    give(panel, "single_blocks.3.linear2", "bnb_nf4")
    assert widgets(page, 100)["pattern"] == "blocks.*"
    assert widgets(page, 101)["pattern"] == "single_blocks.3.linear2"
    assert page.evaluate("links(101)") == ["100:0 -> 0"]


def test_the_filter_stays_readable_above_a_scrolled_list(page):
    panel = quantize_node(page)
    open_layers(page, panel, rule="primary")
    panel.locator(".fewbits-layers li").last.scroll_into_view_if_needed()
    seen = "(field) => { const box = field.getBoundingClientRect();" \
           " return document.elementFromPoint(box.x + 9, box.y + box.height / 2) === field; }"  # fmt: skip
    assert panel.get_by_label("Filter layers").evaluate(seen)


def test_what_can_not_be_quantized_has_no_menu(page):
    panel = quantize_node(page)
    open_layers(page, panel, rule="", reason="not a linear layer")
    assert panel.locator(".fewbits-choice").count() == 0
    assert panel.locator(".fewbits-reason").first.inner_text() == "not a linear layer"


def test_that_a_layer_is_like_all_is_not_said(page):
    panel = quantize_node(page)
    open_layers(page, panel, reason="primary")
    assert panel.locator(".fewbits-reason").count() == 0
    open_again = [{**row, "reason": "primary; narrow"} for row in REPORT["layers"]]
    finish(page, {**REPORT, "layers": open_again})
    assert panel.locator(".fewbits-reason").first.inner_text() == "narrow"


def test_unusual_errors_have_a_colour(page, panel):
    errors = [0.02 if i == 7 else 0.01 + i / 100_000 for i in range(30)]
    layers = [
        {**row, "format": "int8_tensorwise", "rel_l2": error}
        for row, error in zip(REPORT["layers"], errors, strict=True)
    ]
    worst = sorted(layers, key=lambda row: -row["rel_l2"])[:5]
    finish(page, {**REPORT, "layers": layers, "worst": worst})
    panel.get_by_text("All 30 layers").click()
    unusual = panel.locator(".fewbits-outlier")
    assert unusual.all_text_contents() == ["0.0200", "0.0200"]  # among the worst, and in the list
    assert "unusually much for int8_tensorwise" in unusual.first.get_attribute("title")


def test_an_open_list_keeps_filter_and_focus_when_the_report_arrives(page, panel):
    send(page, "fewbits.plan", {"node_id": "12", "plan": PLAN})
    panel.get_by_text("All 30 layers").click()
    panel.get_by_label("Filter layers").press_sequentially("linear2")
    finish(page, REPORT)
    assert page.evaluate("document.activeElement.value") == "linear2"
    assert panel.locator(".fewbits-layers li:visible").count() == 15
    assert "0.0077" in panel.locator(".fewbits-layers li:visible").first.inner_text()
