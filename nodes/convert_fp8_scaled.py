"""Convert FP8 Scaled: a file in ComfyUI's old scaled_fp8 dialect -> the same codes as every ComfyUI
since 0.8 reads.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..quant_ops.checkpoint.importers import ImportOptions
from ..quant_ops.doors import convert_file
from .bridge import host
from .common import (
    WorksOnAFile,
    filename_input,
    full_precision_input,
    overwrite_input,
    path_output,
    report_result,
    schema,
    verify_input,
)


class FewBitsConvertFP8Scaled(WorksOnAFile):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsConvertFP8Scaled",
            display_name="Convert FP8 Scaled",
            category="FewBits/tools",
            description="Rewrites an old scaled FP8 file with the names and metadata that ComfyUI "
            "uses today. No weight is rounded again, and e5m2 stays e5m2.",
            search_aliases=[
                "scaled_fp8",
                "fp8 scaled",
                "legacy fp8",
                "fp8",
                "comfy_quant",
                "convert",
                "fewbits",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.all_model_files(),
                    tooltip="The scaled FP8 file: one with a scaled_fp8 tensor or with "
                    "scale_weight beside its layers. It is only read.",
                ),
                filename_input("comfy_quant"),
                overwrite_input(),
                io.String.Input(
                    "high_precision",
                    optional=True,
                    advanced=True,
                    default="",
                    placeholder="regular expression",
                    tooltip="A check: every layer whose name this regular expression finds must be "
                    "high precision in the file, otherwise nothing is written and the error lists "
                    "the others. Empty: no check.",
                ),
                full_precision_input(),
                verify_input(),
            ],
            outputs=[
                path_output(),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Layers by dialect, formats, sizes and notes, as JSON.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        file: str,
        filename: str = "",
        overwrite: bool = False,
        high_precision: str = "",
        full_precision_matmul: bool = False,
        verify: bool = False,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        target = host.output_path(
            filename or host.automatic_name(file, "comfy_quant"), overwrite=overwrite
        )
        result = convert_file(
            host.model_path(*host.split_choice(file)),
            target,
            options=ImportOptions(full_precision_mm=full_precision_matmul),
            only="fp8_scaled",
            hp_filter=high_precision or None,
            overwrite=overwrite,
            verify=verify,
            on_progress=run.on_progress,
        )
        return report_result(str(target), report=result, written=target)
