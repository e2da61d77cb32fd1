"""Every template of the pack runs as it is saved, headless; the emoji model stands in for the large ones."""

import pytest

from support.harness.stand_ins import add_stand_ins
from support.harness.workflow import TEMPLATES, graph_of, prompt_of

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.json"))
# Run with all of their steps, and looked at, in test_calibrated.py, test_nodes.py and test_text_encoders.py.
ELSEWHERE = {"Calibrate, then quantize", "Quantize, sample and save", "Quantize a text encoder"}


@pytest.fixture(scope="module")
def models(server, tmp_path_factory):
    """Everything that the templates name; where the calibration of one goes, which another needs."""
    add_stand_ins(server, tmp_path_factory.mktemp("stand_ins"))
    return server.output / "calibrations" / "emoji_flux.safetensors"


def quick(prompt):
    """The prompt with two steps where it has more: what is drawn is another test's business."""
    for item in prompt.values():
        if "steps" in item["inputs"]:
            item["inputs"]["steps"] = 2
    return prompt


def up_to(kind, prompt):
    """What the one node of this kind needs, and the node."""
    needed = [next(id for id, item in prompt.items() if item["class_type"] == kind)]
    for id in needed:
        links = [value for value in prompt[id]["inputs"].values() if isinstance(value, list)]
        needed += [source for source, _ in links if source not in needed]
    return {id: prompt[id] for id in needed}


@pytest.mark.parametrize("name", sorted({*NAMES} - ELSEWHERE))
def test_a_template_runs_as_it_is_saved(server, models, name):
    if name.startswith("Calibrated") and not models.exists():
        calibrate = quick(prompt_of(server, graph_of("Calibrate, then quantize")))
        server.run(up_to("FewBitsSaveCalibration", calibrate))
    run = server.run(quick(prompt_of(server, graph_of(name))))
    assert run.status == "success", run.error
    for output in run.history["outputs"].values():
        for written in (*output.get("fewbits_report", ()), *output.get("fewbits_saved", ())):
            if "saved" in written:
                assert (server.output / written["saved"]["path"].removeprefix("output/")).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_no_node_of_a_template_lies_on_another(name):
    """In the larger of both renderers: a title is 30 high, and Nodes 2.0 has a foot of 40."""
    boxes = [(node["id"], *node["pos"], *node["size"]) for node in graph_of(name)["nodes"]]
    for id, x, y, width, height in boxes:
        for other, left, top, w, h in boxes:
            apart = (
                x + width <= left or left + w <= x or y + height <= top - 30 or top + h <= y - 30
            )
            assert id == other or apart, (id, other)
