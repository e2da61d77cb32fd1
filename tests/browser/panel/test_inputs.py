"""The node around the panel: its inputs and its room."""

from __future__ import annotations

import pytest

from support.harness.panel import answer, load

pytestmark = pytest.mark.browser


def test_inputs_that_the_format_lacks_are_switched_off_with_the_reason(page):
    load(page)
    answer(
        page,
        "/fewbits/formats",
        {
            "int8_tensorwise": {"scaling": ["row", "tensor"]},
            "int8_blockwise": {"block_size": ["64", "128"]},
        },
    )
    page.wait_for_function("host.app.extensions.length === 1")
    page.evaluate(
        """() => addNode(12, host.app.rootGraph, "FewBitsQuantizeINT8", [
          { name: "format", value: "int8_tensorwise" },
          { name: "scaling", value: "tensor", tooltip: "rows" },
          { name: "block_size", value: "64", tooltip: "blocks" },
        ])"""
    )
    state = "() => addedWidgets().map((w) => [w.value, Boolean(w.disabled), w.tooltip ?? ''])"
    page.evaluate(
        "window.addedWidgets = () => host.app.rootGraph.getNodeById(12).widgets.slice(1, 3)"
    )
    page.wait_for_function("addedWidgets()[1].disabled === true")
    assert page.evaluate(state) == [
        ["tensor", False, "rows"],
        ["auto", True, "int8_tensorwise has no such option"],
    ]
    page.evaluate(
        "const format = host.app.rootGraph.getNodeById(12).widgets[0];"
        "format.value = 'int8_blockwise'; format.callback()"
    )
    assert page.evaluate(state) == [
        ["auto", True, "int8_blockwise has no such option"],
        ["auto", False, "blocks"],
    ]


CONVROT = {"convrot": ["off", "on", "auto"], "full_precision_matmul": ["false", "true"]}


@pytest.mark.parametrize(
    ("format", "stated", "wanted"),
    [
        ("int8_tensorwise", ["off", True], [["off", False], [True, False]]),
        ("int8_tensorwise", ["on", False], [["on", False], [False, False]]),
        ("int8_tensorwise", [False, False], [["off", False], [False, False]]),
        ("auto (best for this GPU)", ["off", True], [["auto", True], [True, False]]),
    ],
    ids=["off", "on", "a switch of old", "chosen by the advisor"],
)
def test_what_a_person_set_stays_where_it_fits(page, format, stated, wanted):
    answer(page, "/fewbits/formats", {"int8_tensorwise": CONVROT})
    load(page)
    page.wait_for_function("host.app.extensions.length === 1")
    page.evaluate(
        """([format, [convrot, precise]]) => addNode(12, host.app.rootGraph, "FewBitsQuantizeModel", [
          { name: "format", value: format },
          { name: "convrot", value: convrot },
          { name: "full_precision_matmul", value: precise },
        ])""",
        [format, stated],
    )
    page.wait_for_function("'disabled' in host.app.rootGraph.getNodeById(12).widgets[1]")
    assert wanted == page.evaluate(
        "host.app.rootGraph.getNodeById(12).widgets.slice(1, 3).map((w) => [w.value, w.disabled])"
    )


def test_the_side_panel_of_the_page_neither_lists_nor_narrows_the_panel(page, panel):
    found = page.evaluate(
        "(() => { const widget = host.app.rootGraph.getNodeById(12).widgets[0]; widget.width = 120;"
        " return [widget.width ?? null, widget.options.hideInPanel]; })()"
    )
    assert found == [None, True]


def test_a_tall_node_gives_its_room_to_the_panel_alone(page, panel):
    page.evaluate(
        """() => {
          const grid = document.createElement("div");
          grid.className = "lg-node-widgets";
          grid.style.cssText = "display: grid; height: 900px; width: 340px";
          window.show = (rows) => { grid.style.gridTemplateRows = rows; };
          const text = document.createElement("textarea");
          text.style.cssText = "min-height: 64px; height: 64px; box-sizing: border-box";
          const row = document.createElement("div");
          row.append(document.querySelector(".fewbits-panel"));
          row.style.cssText = "display: grid";
          grid.append(document.createElement("p"), text, row);
          document.body.append(grid);
          show("min-content auto auto");
        }"""
    )
    page.wait_for_function("document.querySelector('.fewbits-panel').offsetHeight > 750")
    page.evaluate("show('min-content  auto auto')")  # the page writes them again
    page.wait_for_function(
        "document.querySelector('.lg-node-widgets').style.gridTemplateRows ==="
        " 'min-content min-content auto'"
    )
