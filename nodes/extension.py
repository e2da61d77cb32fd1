"""The pack's face to ComfyUI: the list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    bridge,
    calibrate,
    compare_models,
    convert_fp8_scaled,
    fit_to_size,
    format_advisor,
    inspect_file,
    layer_rules,
    load,
    preview,
    quality_report,
    quantize_file,
    quantize_model,
    quantize_text_encoder,
    save,
)
from .bridge import routes
from .common import connected

NODES = [
    load.FewBitsLoadModel,
    load.FewBitsLoadTextEncoder,
    load.FewBitsLoadCheckpoint,
    *quantize_model.NODES,
    quantize_text_encoder.FewBitsQuantizeTextEncoder,
    calibrate.FewBitsCalibrate,
    calibrate.FewBitsCalibrateTextEncoder,
    calibrate.FewBitsSaveCalibration,
    calibrate.FewBitsLoadCalibration,
    quantize_file.FewBitsQuantizeFile,
    fit_to_size.FewBitsFitToSize,
    layer_rules.FewBitsLayerRules,
    layer_rules.FewBitsSaveRecipe,
    save.FewBitsSaveComfyQuant,
    convert_fp8_scaled.FewBitsConvertFP8Scaled,
    inspect_file.FewBitsInspectFile,
    format_advisor.FewBitsFormatAdvisor,
    quality_report.FewBitsQualityReport,
    compare_models.FewBitsCompareModels,
]


class FewBitsExtension(ComfyExtension):
    async def on_load(self) -> None:
        # free when the pack's root did it; a second chance for hosts that import in another order
        bridge.register()
        routes.add_routes(preview.preview)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [connected(node) for node in NODES]
