"""A first visit to ComfyUI's page, as .ci/run makes it: drop a template, edit a rule, queue, watch, reload, switch theme
and language.
"""

from __future__ import annotations

import pytest

from support.harness import PACK
from support.harness.page import RENDERERS, line, ready, rows, shot

pytestmark = pytest.mark.browser

TEMPLATE = PACK / "example_workflows" / "Mixed precision by rules.json"
RULE = "double_blocks.0.*\nfinal_layer*"
PANEL = (
    "app.graph.getNodeById(7)?.widgets.find((widget) => widget.name === 'fewbits_panel').element"
)
# Two steps are enough to see that what was quantized draws.
SHORTEN = """() => {
  const steps = app.graph.getNodeById(11).widgets.find((widget) => widget.name === "steps");
  steps.value = 2;
}"""
SHOW = """() => {
  const [left, top] = app.graph.getNodeById(7).pos;
  app.canvas.ds.scale = 0.85;
  app.canvas.ds.offset = [560 - left, 90 - top];
  const rules = app.graph.getNodeById(6);
  rules.pos = [left - 400, top];
  app.canvas.setDirty(true, true);
}"""
DROP = """([name, text]) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([text], name, { type: "application/json" }));
  const options = { dataTransfer, bubbles: true, cancelable: true, clientX: 700, clientY: 450 };
  for (const type of ["dragover", "drop"]) {
    document.querySelector("#graph-canvas").dispatchEvent(new DragEvent(type, options));
  }
}"""


def wait_for(page, condition: str) -> None:
    page.wait_for_function(f"{PANEL}?.{condition}", timeout=60_000)


def kept(page) -> str:
    """What the panel says of float8_e4m3fn, the format of the rule."""
    found = [row for row in rows(panel_of(page), ".fewbits-formats") if row[0] == "float8_e4m3fn"]
    return found[0][1] if found else "none"


def panel_of(page) -> object:
    return page.locator(".fewbits-panel", has_text="bnb_nf4").first


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_workflow_is_dropped_changed_run_reloaded_and_read_in_chinese(open_page, renderer):
    page = open_page(renderer)
    page.evaluate(DROP, [TEMPLATE.name, TEMPLATE.read_text(encoding="utf-8")])
    page.wait_for_function("app.graph.getNodeById(7)?.comfyClass === 'FewBitsQuantizeModel'")
    page.evaluate(SHORTEN)
    page.evaluate(SHOW)
    wait_for(page, "dataset.phase === 'preview'")
    before = kept(page)

    areas = page.locator("textarea").all()
    (pattern,) = (area for area in areas if area.input_value() == RULE)
    pattern.fill("double_blocks.0.*\nsingle_blocks.3.*")
    page.wait_for_function(
        f"[...{PANEL}.querySelectorAll('.fewbits-formats tr')].some((row) =>"
        f" row.textContent.startsWith('float8_e4m3fn') && row.cells[1].textContent !== '{before}')",
        timeout=60_000,
    )
    planned = rows(panel_of(page), ".fewbits-formats")
    shot(page, f"visit_{renderer}_rule")

    page.get_by_test_id("queue-button").click()
    wait_for(page, "dataset.phase === 'done'")
    assert rows(panel_of(page), ".fewbits-formats") == planned
    done = line(panel_of(page)).removeprefix("Unchanged · ")
    page.wait_for_function("app.nodeOutputs?.[13]?.images?.length === 1", timeout=120_000)

    page.wait_for_timeout(1500)  # the page stores its draft of the workflow after a while
    page.reload()
    ready(page)
    wait_for(page, "dataset.phase === 'done'")
    assert line(panel_of(page)) == done

    dark = page.evaluate(f"getComputedStyle({PANEL}).backgroundColor")
    for setting, value in (("Comfy.ColorPalette", "light"), ("Comfy.Locale", "zh")):
        page.evaluate(
            "([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value]
        )
    page.wait_for_function(f"getComputedStyle({PANEL}).backgroundColor !== '{dark}'")
    wait_for(page, "textContent.includes('完成')")
    shot(page, f"visit_{renderer}_light_chinese")
