"""Quality Report: the report of a conversion as pictures and as Markdown."""

from __future__ import annotations

import io as bytes_io
import json
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..quant_ops.checkpoint.reader import FileSource
from ..quant_ops.errors import RecipeError
from ..quant_ops.report.histograms import histograms
from ..quant_ops.report.markdown import to_markdown
from ..quant_ops.report.plots import LAYERS, THEMES, histogram_picture, report_pictures
from .bridge import host
from .common import schema

# What the page shows of a report: the node that made it shows the layers.
SHOWN = (
    "meaning", "patches", "family", "family_title", "loads_in", "requires_pack",
    "bytes_before", "bytes_after", "rel_l2", "summary", "worst", "warnings",
)  # fmt: skip


class FewBitsQualityReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsQualityReport",
            display_name="Quality Report",
            category="FewBits/tools",
            description="Draws what a conversion gave up: error by depth and kind of layer, the "
            "worst layers, bytes by format; and writes it out as Markdown.",
            search_aliases=["error", "plot", "quality", "what was lost", "fewbits"],
            inputs=[
                io.String.Input(
                    "report",
                    force_input=True,
                    tooltip="The report of a Quantize node or of Quantize File.",
                ),
                io.Combo.Input(
                    "theme",
                    optional=True,
                    options=sorted(THEMES),
                    default="dark",
                    tooltip="Background of the pictures: dark as ComfyUI's page, or light.",
                ),
                io.String.Input(
                    "path",
                    force_input=True,
                    optional=True,
                    tooltip="The path of Quantize File: also draws the weights and codes of the "
                    "layers with the largest error, which are read from the file.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="Three pictures of 1024 x 640, with a path four, for Preview Image.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The report as Markdown, to read."
                ),
            ],
        )

    @classmethod
    def execute(cls, report: str, theme: str = "dark", path: str = "") -> io.NodeOutput:
        data = conversion_of(report)
        pictures = report_pictures(data, theme)
        if path:
            pictures["histograms"] = _histograms(host.written_file(path), data, theme)
        text = to_markdown(data)
        images = torch.stack(list(map(_image, pictures.values())))
        ui = {"fewbits_quality": [{name: data.get(name) for name in SHOWN}]}
        return io.NodeOutput(images, text, ui=ui)


def conversion_of(report: str) -> dict:
    """The JSON of a conversion's report.

    Raises:
        RecipeError: some other text.
    """
    try:
        data = json.loads(report)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or "meaning" not in data or "layers" not in data:
        raise RecipeError(
            "this is no report of a conversion: connect the report of a Quantize node or of "
            "Quantize File"
        )
    return data


def _histograms(path: Path, data: dict, theme: str) -> bytes:
    """Of the layers that the report calls worst, read from the file."""
    with FileSource(path) as file:
        layers = histograms([row["name"] for row in data["worst"][:LAYERS]], file)
    return histogram_picture(layers, [path.name], theme)


def _image(png: bytes) -> torch.Tensor:
    """(H, W, 3) float32 from 0 to 1."""
    with Image.open(bytes_io.BytesIO(png)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)
