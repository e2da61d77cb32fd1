"""Quantize Text Encoder: CLIP -> quantized CLIP, smaller in memory, in any format."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant_ops.calibration import Calibration, Observer
from ..quant_ops.formats import FORMATS
from .bridge import clip_io, host, kernels
from .common import (
    AUTO,
    QUANTIZE_ALIASES,
    TakesASwitch,
    calibration_input,
    device_input,
    format_aliases,
    kernels_input,
    recipe_from,
    recipe_inputs,
    report_output,
    report_result,
    schema,
    settled,
)

# text encoders compute at full precision, and its error is the smallest at this size
DEFAULT = "int8_tensorwise"
CHOICE = (
    "int8_tensorwise and float8_e4m3fn halve a 16-bit encoder and open in stock ComfyUI, INT8 with "
    "the smaller error; bnb_nf4 leaves just over a quarter of it and needs FewBits."
)


class FewBitsQuantizeTextEncoder(TakesASwitch):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shown, advanced = recipe_inputs(list(FORMATS), CHOICE, DEFAULT)
        return schema(
            node_id="FewBitsQuantizeTextEncoder",
            display_name="Quantize Text Encoder",
            category="FewBits/quantize",
            description="Makes text encoders smaller in the graph, all that the CLIP holds. The "
            "CLIP that comes in stays as it is.",
            search_aliases=[
                "quantize clip",
                "t5",
                "smaller text encoder",
                *QUANTIZE_ALIASES,
                *format_aliases(FORMATS),
            ],
            has_intermediate_output=True,
            inputs=[
                io.Clip.Input(
                    "clip",
                    lazy=True,
                    tooltip="The text encoders to convert. LoRAs and other weight patches on them "
                    "are baked in first. They are not changed.",
                ),
                *shown,
                *advanced,
                kernels_input(),
                device_input(),
                calibration_input(),
            ],
            outputs=[
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="The quantized text encoders, ready to encode or save.",
                ),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(
        cls,
        clip: io.Clip.Type | None = None,
        quantized_kernels: bool = False,
        device: str = AUTO,
        calibration: Calibration | Observer | None = None,
        **wish: object,
    ) -> list[str]:
        """Refuse what cannot be fulfilled before the text encoders are loaded."""
        recipe_from(**wish)
        host.pick_device(device)
        if clip is None:
            return ["clip"]
        return []

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        quantized_kernels: bool = False,
        device: str = AUTO,
        calibration: Calibration | Observer | None = None,
        **wish: object,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        quantized, report = clip_io.quantize_clip(
            clip,
            recipe_from(**wish),
            kernels=quantized_kernels,
            device=host.pick_device(device),
            calibration=settled(calibration),
            on_plan=run.on_plan,
            on_progress=run.on_progress,
        )
        return report_result(
            quantized, report=report, kernels=kernels.kernel_lines(quantized.cond_stage_model)
        )
