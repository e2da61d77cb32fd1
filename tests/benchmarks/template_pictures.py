"""The templates' pictures: each run with the emoji model in its place, then before, after, and what differs.

    python3 dev.py bench template_pictures [NAME ...]

Every picture is a run of the template as it is saved; only the model is the emoji model, under the name the template has.
Templates that draw nothing are shown as ComfyUI's page shows them after a run; that needs Chrome or Chromium on PATH.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from support.harness import EMOJI_NODES, PACK, ComfyServer, emoji_models, emoji_workflow
from support.harness.emoji import ORIGINAL
from support.harness.page import ready
from support.harness.stand_ins import add_stand_ins
from support.harness.workflow import graph_of, prompt_of

FOLDER = PACK / "example_workflows"
SIDE, FOOT = 256, 36
AMPLIFIED = 8


@dataclass(frozen=True)
class Row:
    """What the emoji model draws for a template, and what the second picture is called."""

    template: str
    draws: str
    label: str
    first: str = ""  # a template whose output this one needs


ROWS = (
    Row("Flux.1 file to INT8", "grinning face with big eyes", "INT8, half the size"),
    Row("Qwen-Image file to INT8", "pizza", "INT8, half the size"),
    Row("SDXL checkpoint to INT8", "rocket", "INT8, half the size"),
    Row("Wan 2.2 files to INT8", "sunflower", "INT8, half the size"),
    Row("Z-Image file to INT8", "cat with tears of joy", "INT8, half the size"),
    Row("Convert old scaled FP8", "red apple", "FP8, same codes"),
    Row("Mixed precision by rules", "fire engine", "NF4 and FP8"),
    Row("Calibrated 4 bit, file to file", "panda", "NF4, calibrated", "Calibrate, then quantize"),
)


# Templates that draw nothing: what of the page is shown, as left, top and scale of the graph.
IN_THE_PAGE = {
    "Calibrate a text encoder": (40, 40, 1.0),
    "Quantize a text encoder": (60, -90, 0.7),
}
WIDE, HIGH, BARS = 1280, 640, 96  # of the picture, and of the page's own bars


def main() -> None:
    wanted = sys.argv[1:] or [*(row.template for row in ROWS), *IN_THE_PAGE]
    with tempfile.TemporaryDirectory(prefix="fewbits-pictures-") as folder:
        nodes = [PACK, EMOJI_NODES]
        with ComfyServer(Path(folder), custom_nodes=nodes, models=emoji_models()) as server:
            add_stand_ins(server, Path(folder))
            for row in ROWS:
                if row.template in wanted:
                    picture(server, row).save(FOLDER / f"{row.template}.jpg", quality=88)
                    print(row.template, flush=True)
            for template in filter(wanted.__contains__, IN_THE_PAGE):
                in_the_page(server, template).save(FOLDER / f"{template}.jpg", quality=88)
                print(template, flush=True)


def in_the_page(server: ComfyServer, template: str) -> Image.Image:
    """The nodes of a template after a run, without the page around them."""
    left, top, scale = IN_THE_PAGE[template]
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": True}
    server.post("/settings", {**settings, "Comfy.Minimap.Visible": False})
    graph = graph_of(template)
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDE + BARS, "height": HIGH + 2 * BARS})
        page.goto(f"http://127.0.0.1:{server.port}")
        ready(page)
        page.evaluate("(graph) => app.loadGraphData(graph)", graph)
        page.evaluate(
            "([left, top, scale]) => { app.canvas.ds.scale = scale;"
            " app.canvas.ds.offset = [left, top]; app.canvas.setDirty(true, true); }",
            [left + BARS / scale, top + BARS / scale, scale],
        )
        page.evaluate("app.queuePrompt(0)")
        page.wait_for_selector(".fewbits-panel[data-phase=done]", timeout=120_000)
        page.wait_for_timeout(15_000)  # until ComfyUI's own notes about the finished job are gone
        picture = page.screenshot(clip={"x": BARS, "y": BARS, "width": WIDE, "height": HIGH})
        browser.close()
    return Image.open(io.BytesIO(picture)).convert("RGB").resize((WIDE // 2, HIGH // 2))


def picture(server: ComfyServer, row: Row) -> Image.Image:
    if row.first:
        run(server, prompt_of(server, graph_of(row.first)))
    outputs = run(server, prompt_of(server, graph_of(row.template)))
    (saved, *_) = [data["saved"] for output in outputs for data in output.get("fewbits_report", ())
                   if "saved" in data]  # fmt: skip
    before, after = draw(server, row.draws), draw(server, row.draws, saved)
    apart = ImageChops.difference(before, after).point(lambda value: min(255, AMPLIFIED * value))
    panels = [("16 bit", before), (row.label, after), (f"difference x {AMPLIFIED}", apart)]
    sheet = Image.new("RGB", (SIDE * len(panels), SIDE + FOOT), "#1e1e1e")
    pen = ImageDraw.Draw(sheet)
    for at, (label, image) in enumerate(panels):
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (at * SIDE, 0))
        middle = (at * SIDE + SIDE // 2, SIDE + FOOT // 2)
        pen.text(middle, label, fill="white", font=ImageFont.load_default(20), anchor="mm")
    return sheet


def draw(server: ComfyServer, prompt: str, saved: dict | None = None) -> Image.Image:
    """What a saved file draws, or the original, through ComfyUI's own loader."""
    workflow = emoji_workflow(ORIGINAL, prompt)
    if saved and saved["loader"] == "Load Checkpoint":
        inputs = {"ckpt_name": saved["name"]}
        workflow["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": inputs}
    elif saved:
        workflow["1"]["inputs"]["unet_name"] = saved["name"]
    (image,) = server_run(server, workflow).images()
    return image


def run(server: ComfyServer, workflow: dict) -> list[dict]:
    """Outputs of all nodes, in the order of their ids."""
    outputs = server_run(server, workflow).history["outputs"]
    return [outputs[id] for id in sorted(outputs, key=int)]


def server_run(server: ComfyServer, workflow: dict) -> object:
    found = server.run(workflow)
    if found.status != "success":
        raise RuntimeError(found.error["exception_message"])
    return found


if __name__ == "__main__":
    main()
