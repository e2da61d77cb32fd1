"""Quantize File: a model file -> a quantized file, streamed layer by layer, whatever its size."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant_ops.calibration import Calibration, Observer
from ..quant_ops.checkpoint.importers.source import open_checkpoint
from ..quant_ops.doors import quantize_file
from ..quant_ops.formats import FORMATS
from .bridge import host
from .common import (
    AUTO,
    QUANTIZE_ALIASES,
    TakesASwitch,
    WorksOnAFile,
    advised_for,
    calibration_input,
    device_input,
    filename_input,
    format_aliases,
    overwrite_input,
    path_output,
    recipe_from,
    recipe_inputs,
    report_output,
    report_result,
    schema,
    settled,
    verify_input,
)

DEFAULT = "float8_e4m3fn"  # what the most versions of ComfyUI open
CHOICE = (
    "auto: what suits this model, this GPU and this ComfyUI best; the report says what that was, "
    "and which ComfyUI opens the result."
)


class FewBitsQuantizeFile(TakesASwitch, WorksOnAFile):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shown, advanced = recipe_inputs(list(FORMATS), CHOICE, DEFAULT, auto=True)
        return schema(
            node_id="FewBitsQuantizeFile",
            display_name="Quantize File",
            category="FewBits/quantize",
            description="Writes a smaller copy of a model file. It reads and writes one layer at a "
            "time, so the model may be larger than the memory.",
            search_aliases=[*QUANTIZE_ALIASES, *format_aliases(FORMATS), "smaller file", "gguf"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.all_model_files(),
                    tooltip="The safetensors file to convert: a diffusion model, a text encoder or "
                    "a whole checkpoint. It is only read.",
                ),
                *shown,
                filename_input("<format>"),
                overwrite_input(),
                *advanced,
                device_input(),
                calibration_input(),
                verify_input(),
                io.Boolean.Input(
                    "requantize",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Take layers that are quantized in another format too: they are "
                    "decoded and rounded again, and keep the error of the first format. For models "
                    "that exist as FP8 only. Off: such a file is refused.",
                ),
                io.Boolean.Input(
                    "input_scales",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Store how large each layer's inputs get, from the calibration, for "
                    "formats that round them (FP8, NVFP4): ComfyUI then does not measure them at "
                    "each call. Inputs are rounded about 1 % worse.",
                ),
            ],
            outputs=[path_output(), report_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        file: str,
        filename: str = "",
        overwrite: bool = False,
        device: str = AUTO,
        calibration: Calibration | Observer | None = None,
        verify: bool = False,
        requantize: bool = False,
        input_scales: bool = False,
        **wish: object,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        source = host.model_path(*host.split_choice(file))
        recipe = recipe_from(choose=advised_for(lambda: open_checkpoint(source)), **wish)
        name = filename or host.automatic_name(file, recipe.mark)
        target = host.output_path(name, overwrite=overwrite)
        report = quantize_file(
            source,
            target,
            recipe,
            overwrite=overwrite,
            verify=verify,
            requantize=requantize,
            device=host.pick_device(device),
            calibration=settled(calibration),
            input_scales=input_scales,
            sidecar=True,
            on_plan=run.on_plan,
            on_progress=run.on_progress,
        )
        return report_result(str(target), report=report, written=target)
