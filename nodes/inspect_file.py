"""Inspect File: what is in a model file, and what a conversion would do to it."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..quant_ops.checkpoint.importers.source import open_checkpoint
from ..quant_ops.formats import FORMATS
from ..quant_ops.inspection import inspect_file
from ..quant_ops.pipeline import plan_source
from ..quant_ops.planning.recipe import Recipe, Wish
from ..quant_ops.report.report import plan_lines
from .bridge import host
from .common import AUTO, NONE, inspection_text, preset_input, schema


class FewBitsInspectFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsInspectFile",
            display_name="Inspect File",
            category="FewBits/tools",
            description="Shows model family, layers per format, sizes and problems of a file, and previews a "
            "conversion. It reads the header only, so it takes a moment even for the largest file.",
            search_aliases=["info", "metadata", "what is inside", "fewbits"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.all_model_files(),
                    tooltip="The safetensors file to look into. It is only read.",
                ),
                io.Combo.Input(
                    "preview",
                    optional=True,
                    options=[NONE, *FORMATS],
                    tooltip="Also show what a conversion to this format would do to every layer, and the new size.",
                ),
                preset_input("Which layers the previewed conversion keeps.", advanced=True),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="What is inside, and the preview's totals, to read."
                ),
                io.String.Output("report", display_name="report", tooltip="The same and every layer's plan, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: object) -> tuple:
        return (*host.file_state(file), *sorted(others.items()))

    @classmethod
    def execute(cls, file: str, preview: str = NONE, preset: str = AUTO) -> io.NodeOutput:
        path = host.model_path(*host.split_choice(file))
        inspection = inspect_file(path)
        text, data = inspection_text(inspection), inspection.to_json()
        if preview != NONE:
            with open_checkpoint(path) as source:
                plan = plan_source(source, Recipe(primary=Wish(preview), preset=preset))
            host.Run(cls.hidden.unique_id).on_plan(plan)
            text = "\n".join([text, "", f"as {preview}:", *plan_lines(plan)])
            data["plan"] = plan.to_json()
        return io.NodeOutput(text, json.dumps(data, indent=2), ui={"fewbits_inspection": [data]})
