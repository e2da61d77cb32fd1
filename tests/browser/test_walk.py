"""docs/walk.md, step by step in ComfyUI's page; `FEWBITS_WRITE_TABLES=1` puts its screenshots beside it."""

from __future__ import annotations

import pytest
from PIL import Image

from support.harness import readme
from support.harness.emoji import ROOT
from support.harness.page import SCREENSHOTS, VERSION, shot

pytestmark = pytest.mark.browser

WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
PANEL = "app.graph.nodes.find((n) => n.comfyClass === '{}')?.widgets.find((w) => w.name === 'fewbits_panel')?.element"
VIEW = """([left, top, scale]) => {
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [left, top];
  app.canvas.setDirty(true, true);
}"""


def said(words: str) -> str:
    """Words that the page of the documentation has in italics; nothing else may be clicked."""
    assert f"*{words}*" in WALK
    return words


def picture(page, name: str, **options: object) -> None:
    page.mouse.move(30, 600)  # where nothing has a tooltip
    page.wait_for_timeout(1500)
    shot(page, name, **options)
    if readme.WRITE and not VERSION:
        image = Image.open(SCREENSHOTS / f"{name}.png").convert("RGB")
        image.save(ROOT / "docs" / "images" / f"{name}.jpg", quality=72, optimize=True)


def choose(page, template: str) -> None:
    page.get_by_label(said("Templates")).first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(said("ComfyUI-FewBits"), exact=True).first.click()
    card = dialog.get_by_text(said(template), exact=True).first
    card.wait_for()
    if template == "Quantize, sample and save":
        card.scroll_into_view_if_needed()
        picture(page, "walk_templates")
    card.click()
    dialog.wait_for(state="detached")


def wait_for(page, node: str, phase: str, timeout: int = 60_000) -> None:
    panel = PANEL.format(node)
    page.wait_for_function(f"{panel}?.dataset.phase === '{phase}'", timeout=timeout)


def test_the_walk_of_the_documentation(open_page):
    page = open_page("nodes2", width=1200, height=1000, scale=1.4)
    choose(page, "Quantize, sample and save")
    wait_for(page, "FewBitsQuantizeINT8", "preview")
    page.evaluate(VIEW, [120, 520, 0.66])
    picture(page, "walk_plan")

    page.get_by_test_id("queue-button").click()
    assert "Press *Run*" in WALK
    wait_for(page, "FewBitsSaveComfyQuant", "done", 180_000)
    page.wait_for_function(
        "Object.values(app.nodeOutputs).some((output) => output?.images?.length)", timeout=180_000
    )
    page.wait_for_timeout(6000)  # until ComfyUI's own notes about the finished job are gone
    picture(page, "walk_done")
    saved = page.evaluate(
        "received.executed.map(({ output }) => output?.fewbits_report?.[0]?.saved).find(Boolean)"
    )
    assert saved["loader"] == said("Load Diffusion Model")
    page.wait_for_function(
        "(name) => app.graph.nodes.find((n) => n.comfyClass === 'UNETLoader').widgets[0]"
        ".options.values.includes(name)",
        arg=saved["name"],
    )

    choose(page, "Compare models by figures")
    page.wait_for_function("app.graph.nodes.some((n) => n.comfyClass === 'FewBitsCompareModels')")
    page.evaluate("received.executed.length = 0")
    page.evaluate(VIEW, [130, 530, 0.52])
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(
        "received.executed.some(({ output }) => output?.images?.length)", timeout=300_000
    )
    page.wait_for_timeout(6000)
    picture(page, "walk_compare", clip={"x": 0, "y": 0, "width": 1200, "height": 760})
