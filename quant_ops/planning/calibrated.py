"""A plan and a calibration: layers of which too little is known are rounded without one."""

from __future__ import annotations

from dataclasses import replace

from ..calibration import Calibration
from ..errors import RecipeError
from ..formats import get_format
from ..methods import get_method
from ..spec import LayerPlan, ModelPlan


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
