"""Quantize nodes in ComfyUI's real page: plan, progress, report, cancel and error, in both renderers and both themes."""

from __future__ import annotations

import pytest
from PIL import Image

from support.harness import emoji_workflow
from support.harness.page import (
    CONTRAST,
    LAYERS,
    RENDERERS,
    SCREENSHOTS,
    SLOW,
    line,
    load,
    rows,
    run,
    shot,
    sizes,
    wait_for,
)
from support.harness.workflow import graph_of

pytestmark = pytest.mark.browser

SIZE = "(panel) => [panel.offsetWidth, panel.offsetHeight]"


def in_graph(seed: int) -> dict:
    """The emoji workflow with Quantize INT8 (node 20) between LoRA and sampler."""
    workflow = emoji_workflow(seed=seed, steps=2, lora=seed / 100)
    workflow["20"] = {
        "class_type": "FewBitsQuantizeINT8",
        "inputs": {"model": ["3", 0], "format": "int8_tensorwise"},
    }
    workflow["7"]["inputs"]["model"] = ["20", 0]
    return workflow


def file_to_file(name: str, **inputs: object) -> dict:
    wish = {
        "file": f"diffusion_models/{SLOW}",
        "format": "int8_tensorwise",
        "filename": name,
        **inputs,
    }
    return {"20": {"class_type": "FewBitsQuantizeFile", "inputs": wish}}


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_node_in_the_graph_shows_the_plan_and_error_it_was_sent(open_page, renderer, theme):
    page = open_page(renderer, theme)
    seed = (
        1 + 2 * list(RENDERERS).index(renderer) + (theme == "light")
    )  # never answered from ComfyUI's cache
    panel = load(page, in_graph(seed), "20")
    wait_for(page, "preview")  # what a run would do, before there is one
    assert line(panel) == "Before running, from the file's header"
    before_run = rows(panel, ".fewbits-formats")
    width = page.evaluate("app.graph.getNodeById(20).size[0]")
    shot(page, f"{renderer}_{theme}_idle")
    run(page)
    wait_for(page, "done")
    page.wait_for_timeout(1000)  # let the picture of the other nodes settle
    shot(page, f"{renderer}_{theme}_done")

    plan = page.evaluate("received['fewbits.plan'][0].plan")
    report = page.evaluate(
        "received.executed.find((detail) => detail.node === '20').output.fewbits_report[0]"
    )
    layers = str(sum(row["layers"] for row in plan["summary"]))
    assert rows(panel, ".fewbits-formats")[1:] == [
        *([row["format"], str(row["layers"]), *sizes(row)] for row in plan["summary"]),
        ["Total", layers, *sizes(plan)],
    ]
    assert rows(panel, ".fewbits-formats") == before_run
    worst = [
        [row["name"], f"{row['rel_l2']:.4f}", f"{row['sqnr_db']:.1f} dB"] for row in report["worst"]
    ]
    assert rows(panel, ".fewbits-worst")[1:] == worst
    assert len(worst) == 5
    before, after = sizes(plan)
    assert panel.locator(".fewbits-value").all_inner_texts() == [
        f"{before} MB → {after} MB",
        f"{report['rel_l2']:.4f}",
    ]
    assert plan["loads_in"][1:] in panel.locator(".fewbits-loads").inner_text()
    assert page.evaluate("app.graph.getNodeById(20).size[0]") == width
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where  # WCAG AA for small text


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_long_run_shows_progress_and_can_be_cancelled(open_page, server, renderer):
    page = open_page(renderer)
    panel = load(page, file_to_file(f"cancelled_{renderer}"), "20")
    size = page.evaluate("[...app.graph.getNodeById(20).size]")
    run(page)
    page.wait_for_function("drawn.length >= 5", timeout=120_000)
    shot(page, f"{renderer}_dark_running")
    server.interrupt()
    wait_for(page, "stopped")
    shot(page, f"{renderer}_dark_cancelled")
    assert line(panel).startswith("Cancelled at ")
    phases, sent, shown, shares = zip(*page.evaluate("drawn"), strict=True)
    assert set(phases) == {"running"}
    assert shown == sent and set(sent) <= set(LAYERS)
    assert list(shares) == sorted(shares)
    assert page.evaluate("[...app.graph.getNodeById(20).size]") == size
    assert rows(panel, ".fewbits-formats")[-1][:2] == ["Total", str(len(LAYERS))]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_side_panel_of_the_page_leaves_the_node_as_it_is(open_page, renderer):
    page = open_page(renderer)
    panel = load(page, in_graph(9), "20")
    wait_for(page, "preview")
    page.evaluate("app.canvas.selectNode(app.graph.getNodeById(20))")
    size = panel.evaluate(SIZE)
    parameters = page.get_by_test_id("panel-tab-parameters")
    if not parameters.count():
        page.get_by_label("Toggle properties panel").first.click()
    parameters.wait_for()
    page.wait_for_timeout(500)
    shot(page, f"{renderer}_dark_side_panel")
    assert panel.evaluate(SIZE) == size
    assert page.get_by_text("fewbits_panel").count() == 0
    page.get_by_label("Toggle properties panel").first.click()
    parameters.wait_for(state="detached")
    page.evaluate("app.canvas.setDirty(true, true)")
    page.wait_for_timeout(500)
    assert panel.evaluate(SIZE) == size


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_tall_node_is_panel_and_not_keep(open_page, renderer):
    page = open_page(renderer)
    panel = load(page, in_graph(9), "20")
    wait_for(page, "preview")
    before = panel.evaluate(SIZE)[1]
    page.evaluate(
        """() => {
          const node = app.graph.getNodeById(20);
          node.setSize([node.size[0], node.size[1] + 400]);
          app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(1000)
    shot(page, f"{renderer}_dark_tall")
    assert panel.evaluate(SIZE)[1] - before > 380  # of 400: `keep` is four lines high


def test_a_report_survives_a_change_of_tabs_and_an_error_shows_its_message(open_page):
    page = open_page("classic")
    panel = load(page, file_to_file("kept", file="diffusion_models/emoji_flux.safetensors"), "20")
    run(page)
    wait_for(page, "done")
    done = line(panel)
    failing = file_to_file(
        "kept", file="diffusion_models/emoji_flux.safetensors", format="float8_e4m3fn"
    )
    panel = load(page, failing, "20", tab="fails")
    run(page)
    wait_for(page, "failed")
    shot(page, "classic_dark_failed")
    assert line(panel) == "Failed"
    assert "kept.safetensors" in panel.locator(".fewbits-error").inner_text()
    page.locator(".workflow-label", has_text="quantize").click()
    wait_for(page, "done")
    assert line(panel) == done


def test_the_quantized_model_draws_in_the_same_run(open_page):
    """Also makes a picture of docs/walk.md (docs/images/quantize_node.png)."""
    page = open_page("nodes2", width=1600, height=980, scale=2)
    workflow = emoji_workflow(lora=0.0)
    del workflow["3"]
    workflow["20"] = {
        "class_type": "FewBitsQuantizeINT8",
        "inputs": {"model": ["1", 0], "format": "int8_tensorwise"},
    }
    workflow["7"]["inputs"]["model"] = ["20", 0]
    load(page, workflow, "20")
    places = {  # left, top, width, height
        "1": [0, 0, 270, 90], "4": [0, 150, 270, 120], "5": [0, 320, 270, 120], "6": [0, 490, 270, 110],
        "2": [0, 660, 270, 60], "20": [320, 0, 400, 560], "7": [770, 0, 270, 260], "8": [770, 310, 270, 50],
        "9": [770, 410, 270, 300],
    }  # fmt: skip
    page.evaluate(
        """(places) => {
          for (const [id, [left, top, width, height]] of Object.entries(places)) {
            const node = app.graph.getNodeById(id);
            node.pos = [left, top];
            node.setSize([width, height]);
          }
          app.canvas.ds.offset = [280, 140];
          app.canvas.setDirty(true, true);
        }""",
        places,
    )
    run(page)
    wait_for(page, "done")
    picture = page.locator('.lg-node[data-node-id="9"] img')
    picture.wait_for(timeout=60_000)
    page.wait_for_timeout(6000)  # until ComfyUI's own notes about the finished job are gone
    shot(page, "quantize_node", clip={"x": 260, "y": 96, "width": 1080, "height": 776})
    image = Image.open(SCREENSHOTS / "quantize_node.png")
    image.quantize(256, dither=Image.Dither.NONE).save(
        SCREENSHOTS / "quantize_node.png", optimize=True
    )
    assert picture.evaluate("(image) => image.naturalWidth") == 128


PROOF = {  # ids of the templates that have them
    "Fit to a size": {"FewBitsFitToSize": 1, "FewBitsQualityReport": 3},
    "Compare models by figures": {"FewBitsCompareModels": 8},
}
VALUES = """(values) => {
  for (const [id, name, value] of values) {
    app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value = value;
  }
}"""
QUICK = {"Compare models by figures": [[8, "seeds", 1], [8, "steps", 2]]}
ALL = """() => {
  const { nodes } = app.graph;
  const right = Math.max(...nodes.map(({ pos, size }) => pos[0] + size[0]));
  const bottom = Math.max(...nodes.map(({ pos, size }) => pos[1] + size[1]));
  app.canvas.ds.scale = Math.min(1380 / (right + 40), 1000 / (bottom + 60));
  app.canvas.ds.offset = [60, 90];
  app.canvas.setDirty(true, true);
}"""
OF = "app.graph.getNodeById({})?.widgets?.find((w) => w.name === 'fewbits_panel')?.element"


@pytest.mark.parametrize("renderer", RENDERERS)
def test_what_proves_a_model_has_panels_like_all_others(open_page, renderer):
    page = open_page(renderer, width=1500, height=1100)
    for template, shown in PROOF.items():
        page.evaluate(
            "([graph, name]) => app.loadGraphData(graph, true, true, name)",
            [graph_of(template), template],
        )
        page.evaluate(VALUES, QUICK.get(template, []))
        page.evaluate(ALL)
        run(page)
        for node in shown.values():
            page.wait_for_function(f"{OF.format(node)}?.dataset.phase === 'done'", timeout=240_000)
        page.wait_for_function(
            "Object.values(app.nodeOutputs).some((output) => output?.images?.length)",
            timeout=60_000,
        )
        page.wait_for_timeout(1500)
        for kind, node in shown.items():
            panel = f"({OF.format(node)})"
            assert page.evaluate(f"{panel}.querySelectorAll('.fewbits-worst tbody tr').length") >= 5
            said = page.evaluate(
                f"{panel}.querySelector('.fewbits-whole, .fewbits-advice').textContent"
            )
            assert said, kind
            left_out = page.evaluate(f"[{panel}].map((e) => e.scrollWidth - e.clientWidth)")
            assert left_out == [0], kind
        shot(page, f"{renderer}_dark_{template.split()[0].lower()}")
        page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
        page.wait_for_timeout(1000)
        shot(page, f"{renderer}_light_{template.split()[0].lower()}")
        page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
