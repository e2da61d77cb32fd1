"""Quantize nodes in ComfyUI's real page: plan, progress, report, cancel and error, in both renderers and both themes.

Screenshots go to demo_output/browser/.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from PIL import Image

from support.harness import EMOJI_NODES, PACK, ComfyServer, emoji_models, emoji_workflow

pytestmark = pytest.mark.browser

SCREENSHOTS = Path(__file__).resolve().parents[2] / "demo_output" / "browser"
RENDERERS = {"classic": False, "nodes2": True}
LAYERS = [f"blocks.{i}.{name}" for i in range(512) for name in ("attn.qkv", "mlp.fc1")]
SLOW = "slow.safetensors"  # 4 GB of zeros, a sparse file: long enough to watch and to cancel on any machine
# What arrived, and what the panel showed right after each progress message: its script listens before this one.
COLLECT = """async () => {
  const { api } = await import("/scripts/api.js");
  window.received = { "fewbits.plan": [], "fewbits.progress": [], executed: [] };
  for (const type in received) api.addEventListener(type, (event) => received[type].push(event.detail));
  window.drawn = [];
  api.addEventListener("fewbits.progress", ({ detail }) => {
    const panel = document.querySelector(".fewbits-panel");
    const now = panel.querySelector("[role=progressbar]").getAttribute("aria-valuenow");
    drawn.push([panel.dataset.phase, detail.layer, panel.querySelector(".fewbits-left").textContent, Number(now)]);
  });
}"""
# WCAG contrast of every visible text in the panel against the panel's surface, the smallest first.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const panel = document.querySelector(".fewbits-panel");
  const surface = luminance(getComputedStyle(panel).backgroundColor);
  const texts = [...panel.querySelectorAll("*")].filter((e) => [...e.childNodes].some((n) => n.nodeType === 3));
  const ratios = texts.map((element) => {
    const text = luminance(getComputedStyle(element).color);
    return [(Math.max(text, surface) + 0.05) / (Math.min(text, surface) + 0.05), element.className || element.tagName];
  });
  return ratios.sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("page")
    slow = base / SLOW
    write_slow_model(slow)
    with ComfyServer(base, custom_nodes=[PACK, EMOJI_NODES], models=emoji_models(slow)) as server:
        yield server


def write_slow_model(path: Path) -> None:
    shape = (1024, 2048)
    size = 2 * shape[0] * shape[1]
    header = {
        f"{name}.weight": {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i, name in enumerate(LAYERS)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + len(LAYERS) * size)


@pytest.fixture
def open_page(server, new_page):
    """`open_page(renderer, theme)` -> ComfyUI's page, ready; the test then fails on any complaint that concerns us."""
    pages = []

    def open_page(renderer: str, theme: str = "dark", **size: int):
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.ColorPalette": theme,
            "Comfy.VueNodes.Enabled": RENDERERS[renderer],
            "Comfy.Minimap.Visible": False,
        }
        server.post("/settings", settings)
        page = new_page(**({"width": 1400, "height": 900} | size))
        pages.append(page)
        page.goto(f"http://127.0.0.1:{server.port}")
        page.wait_for_function(
            "window.app?.graph && window.app.canvas && window.app.extensionManager", timeout=120_000
        )
        page.evaluate(COLLECT)
        return page

    yield open_page
    for page in pages:
        assert [message for message in page.messages if "fewbits" in message.lower()] == []


def load(page, workflow: dict, node: str, tab: str = "quantize") -> object:
    """Open an API workflow as a new tab, with one node in view at full size; returns its panel."""
    page.evaluate("([workflow, tab]) => app.loadApiJson(workflow, tab)", [workflow, tab])
    page.evaluate(
        """(id) => {
          const node = app.graph.getNodeById(id);
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [420 - node.pos[0], 120 - node.pos[1]];
          app.canvas.setDirty(true, true);
        }""",
        node,
    )
    panel = page.locator(".fewbits-panel")
    panel.wait_for()
    return panel


def run(page) -> None:
    page.evaluate("app.queuePrompt(0)")


def wait_for(page, phase: str) -> None:
    page.wait_for_selector(f'.fewbits-panel[data-phase="{phase}"]', timeout=120_000)


def shot(page, name: str, **options: object) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", **options)


def line(panel) -> str:
    return panel.locator(".fewbits-line").inner_text().replace("\n", " ").strip()


def rows(panel, table: str) -> list[list[str]]:
    return [
        [c.strip() for c in row.locator("th, td").all_inner_texts()]
        for row in panel.locator(f"{table} tr").all()
    ]


def sizes(row: dict) -> list[str]:
    """Before and after as the table shows them."""
    return [f"{row[key] / 1e6:.2f}" for key in ("bytes_before", "bytes_after")]


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
    """Also makes the README's picture (docs/images/quantize_node.png)."""
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
