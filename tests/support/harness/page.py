"""ComfyUI's page as tests of it see and use it. Screenshots go to demo_output/browser/, those of another version of the
page than ComfyUI's own to a folder of its name there.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from .emoji import ROOT

_other = os.environ.get("FEWBITS_FRONTEND")  # .../<version>/comfyui_frontend_package/static
VERSION = Path(_other).parts[-3] if _other else ""
SCREENSHOTS = ROOT / "demo_output" / "browser" / VERSION
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


def ready(page) -> None:
    """Wait until the page can be used."""
    page.wait_for_function(
        "window.app?.graph && window.app.canvas && window.app.extensionManager", timeout=120_000
    )


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
