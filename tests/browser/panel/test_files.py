"""Files that were written or looked into."""

from __future__ import annotations

import pytest

from support.harness.panel import REPORT, SAVED, cells, finish, line, phase, send

pytestmark = pytest.mark.browser


def test_a_written_file_is_named_with_its_loader_and_can_be_copied(page, panel):
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard',"
        " { value: { writeText: async (text) => { window.copied = text; } } })"
    )
    output = {"fewbits_report": [{**REPORT, **SAVED}]}
    send(page, "executed", {"node": "12", "output": output, "prompt_id": "p1"})
    assert panel.locator(".fewbits-saved code").inner_text() == SAVED["saved"]["path"]
    assert (
        "Loads with Load Diffusion Model as flux_int8.safetensors"
        in panel.locator(".fewbits-saved").inner_text()
    )
    panel.get_by_role("button", name="Copy path").click()
    assert page.evaluate("copied") == SAVED["output"]
    assert page.evaluate("refreshed") == 1  # the loaders list the new file


def test_a_recipe_is_no_model_and_has_no_sizes(page, panel):
    page.evaluate("addNode(13, host.app.rootGraph, 'FewBitsSaveRecipe')")
    other = panel.nth(1)
    assert other.inner_text().strip() == "Run the workflow to see the recipe"
    saved = {"path": "output/recipes/a.toml", "loader": None, "name": None}
    page.evaluate(
        "(saved) => host.app.rootGraph.getNodeById(13).onExecuted({ fewbits_saved: [saved] })",
        {"output": "/comfy/output/recipes/a.toml", "saved": saved, "text": "recipe"},
    )
    shown = other.inner_text()
    assert "paste into Layer Rules" in shown and "model folders" not in shown
    assert "–" not in shown


def test_a_page_without_a_clipboard_selects_the_path(page, panel):
    finish(page, {**REPORT, **SAVED})
    panel.get_by_role("button", name="Copy path").click()
    page.wait_for_function(
        "getSelection().toString() === 'output/diffusion_models/flux_int8.safetensors'"
    )


INSPECTION = {
    "name": "flux_nf4.safetensors",
    "bytes": 7_000_000,
    "tensors": 99,
    "family": "Flux.1",
    "formats": {"bnb_nf4": 22},
    "dialects": {},
    "dtypes": {"U8": [22, 6_000_000], "BF16": [77, 1_000_000]},
    "loads_in": "needs FewBits in ComfyUI >= 0.18.0",
    "findings": ["layer 'a': odd"],
}


@pytest.mark.parametrize("kind", ["FewBitsLoadModel", "FewBitsInspectFile"])
def test_a_node_that_looks_into_a_file_shows_what_is_inside(page, panel, kind):
    page.evaluate("(kind) => addNode(13, host.app.rootGraph, kind)", kind)
    other = panel.nth(1)
    assert line(other) == "Run the workflow to see what is inside"
    page.evaluate(
        "(found) => host.app.rootGraph.getNodeById(13).onExecuted({ fewbits_inspection: [found] })",
        INSPECTION,
    )
    assert phase(other) == "done"
    assert other.locator(".fewbits-loads").inner_text() == (
        "Flux.1 · Needs FewBits in ComfyUI >= 0.18.0"
    )
    assert cells(other, ".fewbits-contents") == [
        ["bnb_nf4", "22 layers", ""],
        ["U8", "22 tensors", "6.00 MB"],
        ["BF16", "77 tensors", "1.00 MB"],
    ]
    assert other.locator(".fewbits-notes li").all_inner_texts() == ["layer 'a': odd"]
