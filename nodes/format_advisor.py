"""Format Advisor: which format suits a model file and a GPU, the best first, and why."""

from __future__ import annotations

import json
from dataclasses import replace

from comfy_api.latest import io

from ..quant_ops.doors.advise import advise_file
from ..quant_ops.planning.gpus import card_here, card_names, find_card
from ..quant_ops.planning.recipe import Draft
from .bridge import host
from .common import RECIPE, WorksOnAFile, recipe_input, schema, this_comfyui

HERE = "this GPU"


class FewBitsFormatAdvisor(WorksOnAFile):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsFormatAdvisor",
            display_name="Format Advisor",
            category="FewBits/tools",
            description="Says which format suits a model file and a GPU, the best first: size, "
            "what fits into memory, what multiplies it, what opens it. Reads the header only.",
            search_aliases=["which format", "best format", "which gpu", "recommend", "fewbits"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.all_model_files(),
                    tooltip="The safetensors file to advise about, in 16 bit. It is only read.",
                ),
                io.Combo.Input(
                    "gpu",
                    optional=True,
                    options=[HERE, *card_names()],
                    default=HERE,
                    tooltip="The GPU that the model shall run on: the one in this machine, or "
                    "another one by its name.",
                ),
                io.String.Input(
                    "comfyui",
                    optional=True,
                    advanced=True,
                    default="",
                    placeholder="this one",
                    tooltip="The version of the ComfyUI that shall open the file, such as 0.30.0. "
                    "Empty: this one.",
                ),
                recipe_input("Rules for single layers, from Layer Rules: they count for sizes."),
            ],
            outputs=[
                io.String.Output(
                    "text",
                    display_name="text",
                    tooltip="The formats in order, with sizes and reasons, to read.",
                ),
                RECIPE.Output(
                    "recipe",
                    display_name="recipe",
                    tooltip="The first of them, for the recipe input of a Quantize node.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The same in full, as JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, file: str, gpu: str = HERE, comfyui: str = "", recipe: Draft | None = None
    ) -> io.NodeOutput:
        draft = replace(recipe or Draft(), primary=None)
        found = advise_file(
            host.model_path(*host.split_choice(file)),
            card_here() if gpu == HERE else find_card(gpu),
            draft=draft,
            comfyui=comfyui.strip() or this_comfyui(),
        )
        data = found.to_json()
        chosen = replace(draft, primary=found.best.wish)
        ui = {"fewbits_advice": [data]}
        return io.NodeOutput(found.to_text(), chosen, json.dumps(data, indent=2), ui=ui)
