"""Save comfy_quant: a MODEL, quantized or not, -> a safetensors file that ComfyUI's own loaders
open.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..quant_ops.doors.problems import checked_sink
from .bridge import host, model_io
from .common import overwrite_input, path_output, report_output, report_result, schema, verify_input


class FewBitsSaveComfyQuant(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsSaveComfyQuant",
            display_name="Save comfy_quant",
            category="FewBits/quantize",
            description="Writes a model to a file with its quantized layers as they are. LoRAs on "
            "it are baked in; layers that are quantized already are rounded a second time by that.",
            search_aliases=[
                "save quantized",
                "save quantized model",
                "save model",
                "save safetensors",
                "export",
                "comfy_quant",
                "fewbits",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", lazy=True, tooltip="The model to save. It is not changed."),
                io.String.Input(
                    "filename",
                    optional=True,
                    default="",
                    placeholder="automatic: diffusion_models/<file>_<format>",
                    tooltip="Name of the file inside ComfyUI's output folder; subfolders are made. "
                    "In diffusion_models/ the loaders find it. Empty: the name of the file that "
                    "the model came from, with its format, there.",
                ),
                overwrite_input(),
                verify_input(),
            ],
            outputs=[path_output(), report_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(
        cls,
        model: io.Model.Type | None = None,
        filename: str = "",
        overwrite: bool = False,
        verify: bool = False,
    ) -> list[str]:
        """Refuse the name before the model is loaded and quantized."""
        if filename.strip():
            host.output_path(filename, overwrite=overwrite)
        if model is None:
            return ["model"]
        return []

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        filename: str = "",
        overwrite: bool = False,
        verify: bool = False,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        name = filename.strip() or model_io.automatic_name(model)
        target = host.output_path(name, overwrite=overwrite)
        sink = checked_sink(target, overwrite=overwrite, verify=verify)
        report = model_io.save_model(model, sink, on_plan=run.on_plan, on_progress=run.on_progress)
        return report_result(str(target), report=report, written=target)
