"""A plan and a calibration: layers of which too little is known are rounded without one."""

from __future__ import annotations

from dataclasses import replace

from ..calibration import Calibration
from ..errors import RecipeError
from ..formats import FORMATS, get_format
from ..methods import get_method
from ..spec import LayerPlan, ModelPlan, TensorSpec

# Of a stored input scale, x the largest input that was seen: other prompts have larger ones (emoji
# model, 1.12 x in one of 22 layers). Error of rounded inputs, x that of scales made while running:
# fp8 1.007 with 1, 1.006 with 2, 1.83 with 1/2; nvfp4 1.011, 1.011 and 1.13.
HEADROOM = 2.0


def calibrated(plan: ModelPlan, calibration: Calibration | None, name: str) -> ModelPlan:
    """The plan where layers that the calibration does not know take their format's own method.

    Args:
        name: of the model, for errors.

    Raises:
        RecipeError: a layer's method needs a calibration and there is none.
        CheckpointError: the calibration was made of another model.
    """
    wanting = [layer for layer in plan.layers if _wants(layer)]
    if not wanting:
        return plan
    if calibration is None:
        raise RecipeError(
            f"{name}: method {wanting[0].method} needs a calibration, what the layers are given "
            "while the model runs; make one with the Calibrate node while you sample"
        )
    calibration.refuse_another_model({layer.name: _shape(layer) for layer in wanting}, name)
    return replace(plan, layers=tuple(_settled(layer, calibration) for layer in plan.layers))


def with_input_scales(plan: ModelPlan, calibration: Calibration | None, name: str) -> ModelPlan:
    """The plan where each layer that rounds its inputs, and that the calibration knows, stores the
    scale for it.

    Args:
        name: of the model, for errors.

    Raises:
        RecipeError: there is no calibration, or no layer to store a scale for.
    """
    if calibration is None:
        raise RecipeError(
            f"{name}: input scales need a calibration, what the layers are given while the model "
            "runs; make one with the Calibrate node while you sample"
        )
    layers = tuple(_with_input_scale(layer, calibration) for layer in plan.layers)
    if layers == plan.layers:
        formats = ", ".join(sorted(name for name, each in FORMATS.items() if each.largest_input))
        raise RecipeError(
            f"{name}: no layer takes an input scale that the calibration knows; formats that do, "
            f"unless they multiply in full precision: {formats}"
        )
    return replace(plan, layers=layers)


def _with_input_scale(layer: LayerPlan, calibration: Calibration) -> LayerPlan:
    if layer.action != "quantize" or layer.options.full_precision_matrix_mult:
        return layer
    if not get_format(layer.format).largest_input:
        return layer
    if calibration.largest_input(layer.name, _shape(layer)) is None:
        return layer
    return replace(layer, outputs=(*layer.outputs, _input_scale(layer)))


def _input_scale(layer: LayerPlan) -> TensorSpec:
    return TensorSpec(f"{layer.name}.input_scale", "F32", ())


def input_scale(layer: LayerPlan, calibration: Calibration | None) -> float | None:
    """The scale under which the layer's inputs are rounded; None where the plan stores none."""
    if _input_scale(layer) not in layer.outputs:
        return None
    largest = calibration.largest_input(layer.name, _shape(layer))
    return HEADROOM * largest / get_format(layer.format).largest_input


def _wants(layer: LayerPlan) -> bool:
    return layer.action == "quantize" and get_method(layer.method).needs_inputs


def _settled(layer: LayerPlan, calibration: Calibration) -> LayerPlan:
    missing = calibration.missing(layer.name, _shape(layer)) if _wants(layer) else None
    if missing is None:
        return layer
    own = get_format(layer.format).method
    return replace(
        layer,
        method=own,
        method_options=(),
        reason=f"{layer.reason}; {own} instead of {layer.method}: {missing}",
    )


def _shape(layer: LayerPlan) -> tuple[int, int]:
    rows, columns = layer.inputs[0].shape
    return rows, columns
