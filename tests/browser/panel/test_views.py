"""Nodes that show neither plan nor file."""

from __future__ import annotations

import pytest

from support.harness.panel import (
    PLAN,
    REPORT,
    answer,
    cells,
    line,
    phase,
    progress,
    send,
    set_prompt,
)

pytestmark = pytest.mark.browser


ADVICE = {
    "model": "flux.safetensors",
    "family": "Flux.1",
    "bytes_before": 13_611_136,
    "gpu": {"name": "RTX 4090 24GB"},
    "formats": [
        {"wish": "int8_tensorwise:convrot=auto", "file_bytes": 7_412_318, "fits": True, "product": "native",
         "ssim": 0.998, "loads_in": "loads in stock ComfyUI >= 0.27.0", "reason": "fits; native"},
        {"wish": "bnb_nf4", "file_bytes": 4_590_000, "fits": False, "product": "emulated", "ssim": None,
         "loads_in": "needs FewBits in ComfyUI >= 0.8.0", "reason": "does not fit"},
    ],
}  # fmt: skip


def test_the_advisor_lists_the_formats_before_and_after_a_run(page, panel):
    page.evaluate("addNode(13, host.app.rootGraph, 'FewBitsFormatAdvisor')")
    other = panel.nth(1)
    answer(page, "/fewbits/plan", {"advice": ADVICE})
    set_prompt(page, {"13": {"class_type": "FewBitsFormatAdvisor", "inputs": {"file": "x"}}})
    send(page, "graphChanged", {})
    page.wait_for_function(
        "document.querySelectorAll('.fewbits-panel')[1].dataset.phase === 'preview'"
    )
    listed = cells(other, ".fewbits-ways")
    assert listed[1:] == [
        ["int8_tensorwise:convrot=auto", "7.41 MB", "native", "0.998"],
        ["bnb_nf4", "4.59 MB", "emulated", "–"],
    ]
    page.evaluate(
        "(advice) => host.app.rootGraph.getNodeById(13).onExecuted({ fewbits_advice: [advice] })",
        ADVICE,
    )
    assert phase(other) == "done" and cells(other, ".fewbits-ways") == listed
    assert "Take int8_tensorwise:convrot=auto" in other.inner_text()
    assert other.locator(".fewbits-loads").inner_text() == (
        "Flux.1 · RTX 4090 24GB · Loads in stock ComfyUI >= 0.27.0"
    )


def add(page, panel, kind: str) -> object:
    """The panel of another node, 13."""
    page.evaluate("(kind) => addNode(13, host.app.rootGraph, kind)", kind)
    return panel.nth(1)


def sent(page, name: str, data: dict) -> None:
    page.evaluate(
        "([name, data]) => host.app.rootGraph.getNodeById(13).onExecuted({ [name]: [data] })",
        [name, data],
    )


FIT = {
    **PLAN,
    "file_bytes": 6_700_000,
    "fit": {
        "goal": {"said": "a file of at most 50%", "bytes": 6_805_568, "error": None},
        "error": 0.0213,
        "basis": "of weights; without a calibration nobody knows which layers matter most",
        "layers": [
            {"name": f"single_blocks.{i}.linear{1 + i % 2}", "chosen": "nvfp4" if i else "keep",
             "bytes": 1, "error": i / 1000, "ways": {}}
            for i in range(30)
        ],
    },
}  # fmt: skip


def test_a_fit_says_what_was_asked_what_came_out_and_what_it_cost(page, panel):
    other = add(page, panel, "FewBitsFitToSize")
    assert line(other) == "Run the workflow to choose the formats"
    asked = {"said": "a file of at most 50%", "bytes": 6_805_568}
    answer(page, "/fewbits/plan", {"inspection": {"name": "a", "bytes": 13}, "asked": asked})
    set_prompt(page, {"13": {"class_type": "FewBitsFitToSize", "inputs": {"file": "a"}}})
    send(page, "graphChanged", {})
    page.wait_for_function(
        "document.querySelectorAll('.fewbits-panel')[1].dataset.phase === 'preview'"
    )
    assert line(other) == "Asked for: a file of at most 50% (6.81 MB)"
    send(page, "fewbits.progress", progress(1, node_id="13"))
    sent(page, "fewbits_fit", FIT)
    assert other.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 6.70 MB", "0.0213"]
    assert other.locator(".fewbits-advice").inner_text() == (
        "A file of at most 50%: 6.70 MB, 1.6% below the limit"
    )
    worst = [["Largest errors", "rel_l2"]]
    worst += [
        [f"single_blocks.{i}.linear{1 + i % 2}", f"{i / 1000:.4f}"] for i in range(29, 24, -1)
    ]
    assert cells(other, ".fewbits-worst") == worst
    other.get_by_text("All 30 layers").click()
    assert "0.0010" in other.locator(".fewbits-layers li").nth(1).inner_text()
    assert line(other) == "Chosen, nothing was written"


def model(name: str, decibels: float, *suspects: str, **changed: object) -> dict:
    return {
        "name": name, "seconds_per_step": 0.5, "peak_bytes": 2_000_000_000, "identical": False,
        "final": {"snr_db": {"mean": decibels}}, "pictures": {"ssim": {"mean": 0.9}},
        "suspects": suspects, "worst_layers": [{"name": f"a.{i}", "rel_l2": i / 100} for i in range(9, 0, -1)],
        **changed,
    }  # fmt: skip


def test_a_comparison_names_the_closest_model_and_the_layers_to_blame(page, panel):
    other = add(page, panel, "FewBitsCompareModels")
    assert line(other) == "Run the workflow to compare the models"
    assert not other.locator(".fewbits-metrics").is_visible()
    send(page, "fewbits.progress", {**progress(1, 3, node_id="13"), "layer": "B"})
    assert line(other) == "Sampling B 33% · 4 s left"  # no bytes
    report = {
        "reference": {"name": "A", "seconds_per_step": 1.0, "peak_bytes": None},
        "models": [model("B", 12.3, "a.9"), model("C", 45.6), model("D", 0, identical=True)],
        "ranking": ["D", "C", "B"],
        "metrics": "piq",
        "sentence": "D is identical to A. C differs, with an SNR of 45.6 dB.",
    }
    sent(page, "fewbits_comparison", report)
    assert other.locator(".fewbits-value").all_inner_texts() == ["D: none", "0.900"]
    assert cells(other, ".fewbits-models") == [
        ["Model", "Difference", "SSIM", "Per step", "Memory"],
        ["A", "–", "–", "1.0 s", "–"],
        ["B", "12.3 dB", "0.900", "0.5 s", "2.00 GB"],
        ["C", "45.6 dB", "0.900", "0.5 s", "2.00 GB"],
        ["D", "none", "0.900", "0.5 s", "2.00 GB"],
    ]
    assert report["sentence"] in other.inner_text()
    tables = other.locator(".fewbits-worst")
    assert tables.count() == 3 and "Largest errors of B" in tables.first.inner_text()
    assert tables.first.locator("tbody tr").count() == 5
    assert other.locator(".fewbits-outlier").all_inner_texts() == ["0.0900"]


def test_a_drawn_report_says_what_its_pictures_show(page, panel):
    other = add(page, panel, "FewBitsQualityReport")
    sent(page, "fewbits_quality", {**REPORT, "layers": None, "meaning": "the same pictures"})
    assert other.locator(".fewbits-value").all_inner_texts() == ["13.61 MB → 7.40 MB", "0.0077"]
    assert "The same pictures." in other.inner_text()
    assert len(cells(other, ".fewbits-worst")) == 6
    assert line(other) == "Drawn: three pictures and a text"


def test_a_recipe_without_a_file_is_shown_and_can_be_copied(page, panel):
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard',"
        " { value: { writeText: async (text) => { window.copied = text; } } })"
    )
    other = add(page, panel, "FewBitsSaveRecipe")
    assert line(other) == "Run the workflow to see the recipe"
    sent(page, "fewbits_saved", {"text": "recipe", "recipe": "version = 1\n"})
    assert other.locator(".fewbits-recipe").inner_text().strip() == "version = 1"
    other.get_by_role("button", name="Copy recipe").click()
    assert page.evaluate("copied") == "version = 1\n"
    assert line(other) == "Done"
