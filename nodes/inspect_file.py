"""Inspect File: what is in a model file, and what a conversion would do to it."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..quant_ops.checkpoint.importers.source import open_checkpoint
from ..quant_ops.doors import inspect_file
from ..quant_ops.errors import RecipeError
from ..quant_ops.formats import FORMATS
from ..quant_ops.pipeline import plan_source
from ..quant_ops.planning.recipe import Draft, Recipe
from ..quant_ops.report.report import layer_lines, plan_lines
from .bridge import host
from .common import (
    AUTO,
    NONE,
    WorksOnAFile,
    inspection_text,
    preset_input,
    recipe_from,
    recipe_input,
    schema,
)


class FewBitsInspectFile(WorksOnAFile):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsInspectFile",
            display_name="Inspect File",
            category="FewBits/tools",
            description="Shows model family, layers per format, sizes and problems of a file, and "
            "previews a conversion. It reads the header only, so it takes a moment even for the "
            "largest file.",
            search_aliases=[
                "info",
                "metadata",
                "what is inside",
                "model size",
                "which format",
                "gguf",
                "fewbits",
            ],
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
                    tooltip="Also show what a conversion to this format would do to every layer, "
                    "and the new size.",
                ),
                preset_input("Which layers the previewed conversion keeps.", advanced=True),
                recipe_input(
                    "Preview with the rules of Layer Rules. A recipe with a primary format needs "
                    "no preview."
                ),
            ],
            outputs=[
                io.String.Output(
                    "text",
                    display_name="text",
                    tooltip="What is inside, and the preview, layer by layer, to read.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The same and every layer's plan, as JSON.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, file: str, preview: str = NONE, preset: str = AUTO, recipe: Draft | None = None
    ) -> io.NodeOutput:
        path = host.model_path(*host.split_choice(file))
        inspection = inspect_file(path)
        text, data = inspection_text(inspection), inspection.to_json()
        if preview != NONE or recipe:
            wanted = _previewed(preview, preset, recipe)
            with open_checkpoint(path) as source:
                plan = plan_source(source, wanted)
            host.Run(cls.hidden.unique_id).on_plan(plan)
            title = f"as {wanted.primary.to_text()}:"
            text = "\n".join([text, "", title, *plan_lines(plan), "", *layer_lines(plan)])
            data["plan"] = plan.to_json()
        return io.NodeOutput(text, json.dumps(data, indent=2), ui={"fewbits_inspection": [data]})


def _previewed(preview: str, preset: str, recipe: Draft | None) -> Recipe:
    """The recipe to preview; the format comes from the input or from a recipe that has one, never
    from both.
    """
    stated = recipe.primary if recipe else None
    if stated and preview not in (NONE, stated.format):
        raise RecipeError(
            f"the connected recipe says {stated.format} and preview says {preview}; set preview to "
            "none"
        )
    if not stated and preview == NONE:
        raise RecipeError(
            "the connected recipe has no [primary] table; choose in preview what the other layers "
            "become"
        )
    return recipe_from(format=preview, preset=preset, recipe=recipe)
