"""Quantize FP8, INT8, NF4, FP4: MODEL -> quantized MODEL. One node per row of the table."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..quant_ops.errors import RecipeError
from ..quant_ops.formats import FORMATS
from .bridge import host, model_io
from .common import (
    AUTO,
    device_input,
    model_input,
    recipe_from,
    recipe_inputs,
    report_output,
    report_result,
    schema,
)


@dataclass(frozen=True)
class Row:
    """One node: its id, its name, which formats it offers (the default first), and how to
    choose.
    """

    node_id: str
    name: str
    formats: tuple[str, ...]
    about: str
    choice: str


ROWS = (
    Row(
        "FewBitsQuantizeFP8",
        "Quantize FP8",
        tuple(name for name in FORMATS if name.startswith("float8_")),
        "8-bit floating point: half the size of 16 bit, multiplied as it is by GPUs with FP8 "
        "units.",
        "float8_e4m3fn opens in stock ComfyUI; the row and block formats have more scales and need "
        "FewBits.",
    ),
    Row(
        "FewBitsQuantizeINT8",
        "Quantize INT8",
        tuple(name for name in FORMATS if name.startswith("int8_")),
        "8-bit integers: half the size of 16 bit, multiplied as they are by NVIDIA GPUs since "
        "Turing.",
        "int8_tensorwise opens in stock ComfyUI 0.27 or newer; the block formats need FewBits.",
    ),
    Row(
        "FewBitsQuantizeNF4",
        "Quantize NF4",
        ("bnb_nf4",),
        "4-bit codes of bitsandbytes' NF4 table: just over a quarter of the size of 16 bit, on "
        "every GPU.",
        "bnb_nf4 needs FewBits to open.",
    ),
    Row(
        "FewBitsQuantizeFP4",
        "Quantize FP4",
        ("nvfp4", "bnb_fp4"),
        "4-bit floating point, in one of two formats of that name: just over a quarter of the size "
        "of 16 bit.",
        "nvfp4: NVIDIA's, a scale for 16 weights; opens in stock ComfyUI and is multiplied as it "
        "is by Blackwell GPUs. bnb_fp4: bitsandbytes' table, a scale for 64 weights; needs "
        "FewBits; bnb_nf4 of Quantize NF4 is more exact.",
    ),
)


class QuantizeModel(io.ComfyNode):
    """Base of the nodes; a subclass is its row."""

    ROW: Row

    @classmethod
    def define_schema(cls) -> io.Schema:
        shown, advanced = recipe_inputs(list(cls.ROW.formats), cls.ROW.choice, cls.ROW.formats[0])
        return schema(
            node_id=cls.ROW.node_id,
            display_name=cls.ROW.name,
            category="FewBits/quantize",
            description=f"Makes a model smaller in the graph. {cls.ROW.about} The model that comes "
            "in stays as it is.",
            search_aliases=["quantize", "convert", "compress", "fewbits"],
            inputs=[model_input(), *shown, *advanced, device_input()],
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
    def execute(cls, model: io.Model.Type, device: str = AUTO, **wish: object) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        recipe = recipe_from(**wish)
        if recipe.primary.format not in cls.ROW.formats:
            raise RecipeError(
                f"the connected recipe's primary format is {recipe.primary.format}, {cls.ROW.name} "
                f"makes {', '.join(cls.ROW.formats)}; take the node of that format, or delete "
                "[primary] from the recipe"
            )
        quantized, report = model_io.quantize_model(
            model,
            recipe,
            device=host.pick_device(device),
            on_plan=run.on_plan,
            on_progress=run.on_progress,
        )
        return report_result(quantized, report=report)


NODES = [type(row.node_id, (QuantizeModel,), {"ROW": row, "__doc__": row.about}) for row in ROWS]
