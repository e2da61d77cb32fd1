"""Quantize Model, and the nodes of single kinds: MODEL -> quantized MODEL. A row makes a node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from comfy_api.latest import io

from ..quant_ops.calibration import Calibration, Observer
from ..quant_ops.errors import RecipeError
from ..quant_ops.formats import FORMATS
from ..quant_ops.planning.recipe import Draft, Recipe, Wish
from .bridge import host, model_io
from .common import (
    AUTO,
    QUANTIZE_ALIASES,
    TakesASwitch,
    advised_for,
    calibration_input,
    device_input,
    format_aliases,
    model_input,
    recipe_from,
    recipe_inputs,
    report_output,
    report_result,
    schema,
    settled,
)


@dataclass(frozen=True)
class Row:
    """One node: its id, its name, which formats it offers (the default first), how to choose, and
    whether the advisor may.
    """

    node_id: str
    name: str
    formats: tuple[str, ...]
    about: str
    choice: str
    auto: bool = False


EVERY = Row(
    node_id="FewBitsQuantizeModel",
    name="Quantize Model",
    formats=("int8_tensorwise", *(name for name in FORMATS if name != "int8_tensorwise")),
    about="Every format in one node: 8 or 4 bits, integers or floating point.",
    choice="auto: what suits this model, this GPU and this ComfyUI best; int8_tensorwise: half the "
    "size of 16 bit, the least loss in 8 bits; float8_e4m3fn: the same size, opens in the most "
    "versions of ComfyUI; nvfp4 and mxfp8: multiplied as they are by Blackwell GPUs; "
    "asym_w4a8_int8: the least loss in 4 bits.",
    auto=True,
)
ROWS = (
    EVERY,
    Row(
        node_id="FewBitsQuantizeFP8",
        name="Quantize FP8",
        formats=tuple(name for name in FORMATS if name.startswith("float8_")),
        about="8-bit floating point: half the size of 16 bit, multiplied as it is by GPUs with "
        "FP8 units.",
        choice="float8_e4m3fn opens in stock ComfyUI; the row and block formats have more scales "
        "and need FewBits.",
    ),
    Row(
        node_id="FewBitsQuantizeINT8",
        name="Quantize INT8",
        formats=tuple(name for name in FORMATS if name.startswith("int8_")),
        about="8-bit integers: half the size of 16 bit, multiplied as they are by NVIDIA GPUs "
        "since Turing.",
        choice="int8_tensorwise opens in stock ComfyUI 0.27 or newer; the block formats need "
        "FewBits.",
    ),
    Row(
        node_id="FewBitsQuantizeNF4",
        name="Quantize NF4",
        formats=("bnb_nf4",),
        about="4-bit codes of bitsandbytes' NF4 table: just over a quarter of the size of 16 bit, "
        "on every GPU.",
        choice="bnb_nf4 needs FewBits to open.",
    ),
    Row(
        node_id="FewBitsQuantizeFP4",
        name="Quantize FP4",
        formats=("nvfp4", "bnb_fp4"),
        about="4-bit floating point, in one of two formats of that name: just over a quarter of "
        "the size of 16 bit.",
        choice="nvfp4: NVIDIA's, a scale for 16 weights; opens in stock ComfyUI and is multiplied "
        "as it is by Blackwell GPUs. bnb_fp4: bitsandbytes' table, a scale for 64 weights; needs "
        "FewBits; bnb_nf4 of Quantize NF4 is more exact.",
    ),
)


class QuantizeModel(TakesASwitch):
    """Base of the nodes; a subclass is its row."""

    ROW: Row

    @classmethod
    def define_schema(cls) -> io.Schema:
        row = cls.ROW
        shown, advanced = recipe_inputs(
            list(row.formats), row.choice, row.formats[0], auto=row.auto
        )
        return schema(
            node_id=cls.ROW.node_id,
            display_name=cls.ROW.name,
            category="FewBits/quantize",
            description=f"Makes a model smaller in the graph. {cls.ROW.about} The model that comes "
            "in stays as it is.",
            search_aliases=[*QUANTIZE_ALIASES, *format_aliases(cls.ROW.formats)],
            has_intermediate_output=True,
            inputs=[model_input(), *shown, *advanced, device_input(), calibration_input()],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The quantized model, ready to sample or save.",
                ),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(
        cls,
        model: io.Model.Type | None = None,
        device: str = AUTO,
        calibration: Calibration | Observer | None = None,
        **wish: object,
    ) -> list[str]:
        """Refuse what cannot be fulfilled before the model is loaded."""
        cls.recipe(**wish)
        host.pick_device(device)
        if model is None:
            return ["model"]
        return []

    @classmethod
    def recipe(cls, choose: Callable[[Draft], Wish] | None = None, **wish: object) -> Recipe:
        """The recipe that the inputs state; `choose` as `recipe_from` takes it.

        Raises:
            RecipeError: see `recipe_from`; and a connected recipe of another node's format.
        """
        recipe = recipe_from(choose=choose, **wish)
        if recipe.primary.format not in cls.ROW.formats:
            raise RecipeError(
                f"the connected recipe's primary format is {recipe.primary.format}, {cls.ROW.name} "
                f"makes {', '.join(cls.ROW.formats)}; take the node of that format, or delete "
                "[primary] from the recipe"
            )
        return recipe

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        device: str = AUTO,
        calibration: Calibration | Observer | None = None,
        **wish: object,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        recipe = cls.recipe(advised_for(lambda: model_io.ModelSource(model)), **wish)
        quantized, report = model_io.quantize_model(
            model,
            recipe,
            device=host.pick_device(device),
            calibration=settled(calibration),
            on_plan=run.on_plan,
            on_progress=run.on_progress,
        )
        return report_result(quantized, report=report)


NODES = [type(row.node_id, (QuantizeModel,), {"ROW": row, "__doc__": row.about}) for row in ROWS]
