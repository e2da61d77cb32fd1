"""Load Model: a diffusion model file -> MODEL, and what is inside."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant_ops.inspection import inspect_file
from .bridge import host, model_io
from .common import inspection_text, schema

FOLDER = "diffusion_models"


class FewBitsLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsLoadModel",
            display_name="Load Model",
            category="FewBits/load",
            description="Loads a diffusion model, quantized or not, as ComfyUI's own loader does; says what is inside.",
            search_aliases=["load diffusion model", "unet", "quantized", "fewbits"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_files(FOLDER),
                    tooltip="A safetensors file in a diffusion_models folder. Quantized files run as they are.",
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model, ready to sample."),
                io.String.Output(
                    "report", display_name="report", tooltip="Family, layers per format, sizes and problems, as text."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple:
        return host.file_state(f"{FOLDER}/{file}")

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = host.model_path(FOLDER, file)
        inspection = inspect_file(path)
        model = model_io.load_file(str(path))
        return io.NodeOutput(model, inspection_text(inspection), ui={"fewbits_inspection": [inspection.to_json()]})
