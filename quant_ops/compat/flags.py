"""The classic command as two tables: flag -> field of the recipe, (type, scaling, backend) ->
format.

Both spellings (`-` and `_`) of every flag are accepted. What a flag writes is named `group.field`;
`accepted` groups the flags that old scripts pass and that change nothing here, each with its
reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..planning.model_family import preset_names

TYPES = ("fp8", "int8", "nf4", "fp4")
SCALINGS = ("tensor", "row", "block", "block2d")
PRESET_FLAGS = tuple(name for name in preset_names() if name != "generic")


@dataclass(frozen=True)
class Flag:
    """One flag: where its value goes and what it may be.

    `value` is bool for a switch (then `means` is what it stands for), int, float, str or Path, or a
    tuple of choices. `without` is the value of a flag whose value may be left out.
    """

    name: str
    field: str
    value: type | tuple = bool
    help: str = ""
    means: object = True
    without: str | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """`--a-b` and `--a_b`, CLI.md's own first."""
        return tuple(
            dict.fromkeys(
                f"--{name}" for name in (self.name, dashed(self.name), underscored(self.name))
            )
        )


def dashed(name: str) -> str:
    return name.replace("_", "-")


def underscored(name: str) -> str:
    return name.replace("-", "_")


FLAGS = (
    Flag("input", "run.input", Path, "the model: a file, an index or a folder of shards"),
    Flag("output", "run.output", Path, "where to write; default "
                                       "<base>_<format>[_mixed].safetensors beside the input"),
    Flag("overwrite", "run.overwrite", help="replace an existing output"),
    Flag("device", "run.device", str, "auto (default), cpu, cuda, cuda:1"),
    Flag("quiet", "run.quiet", help="print nothing but errors"),
    Flag("json", "run.json", help="print the report or plan as JSON"),
    Flag("dry-run", "run.dry_run", ("analyze", "create-template"), "print the plan, or write a "
                                                                   "layer-config template",
         without="analyze"),
    # formats; the first of PRIORITY that was named is the primary
    Flag("int8", "primary.type", help="INT8", means="int8"),
    Flag("nf4", "primary.type", help="NF4, 4 bit", means="nf4"),
    Flag("fp4", "primary.type", help="FP4, 4 bit", means="fp4"),
    Flag("nvfp4", "primary.type", help="NVFP4, 4 bit, native", means="nvfp4"),
    Flag("mxfp8", "primary.type", help="MXFP8, native", means="mxfp8"),
    Flag("convrot", "primary.type", help="INT8 of the rotated weight, row scales", means="convrot"),
    Flag("convrot-group-size", "primary.convrot_groupsize", int, "rotation group of --convrot "
                                                                 "(256)"),
    Flag("scaling_mode", "primary.scaling", SCALINGS, "how many weights share a scale (tensor)"),
    Flag("block_size", "primary.block_size", int, "weights per block, where the format has blocks"),
    Flag("kernel_backend", "primary.backend", ("blockwise", "lodewise"), "int8: square tiles, or "
                                                                         "blocks of a row"),
    Flag("simple", "primary.simple", help="round to nearest everywhere, no learned rounding"),
    Flag("full_precision_matrix_mult", "primary.precise", help="multiply with unrounded "
                                                               "activations"),
    Flag("full-precision-mm", "primary.precise", help="the same"),
    # layers that presets and heuristics exclude
    Flag("fallback", "fallback.type", TYPES, "quantize them like this instead of keeping them"),
    Flag("fallback-block-size", "fallback.block_size", int),
    Flag("fallback-simple", "fallback.simple"),
    # layers named by the user
    Flag("custom-layers", "custom.layers", str, "regular expression, searched in the full key"),
    Flag("custom-type", "custom.type", TYPES, "their format"),
    Flag("custom-block-size", "custom.block_size", int),
    Flag("custom-scaling-mode", "custom.scaling", SCALINGS),
    Flag("custom-simple", "custom.simple"),
    Flag("custom-heur", "custom.heuristics", help="keep those that gain nothing by their shape"),
    Flag("exclude-layers", "recipe.exclude", str, "regular expression, searched in the full key: "
                                                  "keep these"),
    Flag("heur", "recipe.heuristics", help="layers that gain nothing by their shape count as "
                                           "excluded"),
    Flag("layer-config", "recipe.layer_config", Path, "JSON with settings per layer; goes before "
                                                      "everything else"),
    Flag("fullmatch", "recipe.fullmatch", help="its keys are regular expressions, matched whole"),
    Flag("preset", "recipe.preset", str, "auto (default), none, or presets joined by +"),
    *(Flag(name, "recipe.presets", help=f"preset {name}", means=name) for name in PRESET_FLAGS),
    Flag("manual_seed", "recipe.seed", int, "-1 (default) is 0: runs are reproducible"),
    Flag("seed", "recipe.seed", int, "the same"),
    # learned rounding
    *(
        Flag(name, f"svd.{underscored(name)}", value, "option of learned rounding")
        for name, value in {
            "optimizer": ("original", "adamw", "radam"), "num_iter": int, "lr": float,
            "lr_schedule": ("adaptive", "exponential", "plateau"), "lr_gamma": float,
            "lr_patience": int, "lr_factor": float, "lr_min": float, "lr_cooldown": int,
            "lr_threshold": float, "lr_adaptive_mode": ("simple-reset", "no-reset"),
            "top_p": float, "min_k": int, "max_k": int, "full_matrix": bool,
            "early-stop-loss": float, "early-stop-lr": float, "early-stop-stall": int,
        }.items()
    ),
    # converting instead of quantizing
    Flag("convert-fp8-scaled", "convert.fp8_scaled", help="legacy scaled_fp8 -> comfy_quant, same "
                                                          "codes"),
    Flag("hp-filter", "convert.hp_filter", str, "layers that must be high precision there, else "
                                                "nothing is written"),
    # no effect of their own
    Flag("input_scale", "refused.input_scale", help="needs calibration where it would matter"),
    Flag("legacy", "refused.legacy", help="refused: legacy scaled_fp8 files are read, never "
                                          "written"),
    Flag("comfy_quant", "accepted.comfy_quant", help="accepted: this layout is the only one "
                                                     "written"),
    Flag("low-memory", "accepted.low_memory", help="accepted: one layer at a time is always in "
                                                   "memory"),
    Flag("save-quant-metadata", "accepted.save_quant_metadata", help="accepted: always written"),
    Flag("calib_samples", "accepted.calib_samples", int, "accepted: nothing is fitted to random "
                                                         "samples"),
)  # fmt: skip
BY_NAME = {underscored(flag.name): flag for flag in FLAGS}
SHORT = {"input": "-i", "output": "-o"}

PRIORITY = ("nf4", "fp4", "nvfp4", "mxfp8", "convrot", "int8", "fp8")
SIZED = "sized"  # a block size and no scaling mode
LODEWISE = "lodewise"


@dataclass(frozen=True)
class Target:
    """A format and the options that the classic combination implies."""

    format: str
    options: dict = field(default_factory=dict)


ROTATED = Target("int8_tensorwise", {"scaling": "row", "convrot": True})
TILES = Target("int8_blockwise")
# (type, scaling mode, kernel backend), None where not stated -> format. What is not here is a
# contradiction.
TARGETS = {
    ("fp8", None, None): Target("float8_e4m3fn"),
    ("fp8", "tensor", None): Target("float8_e4m3fn"),
    ("fp8", "row", None): Target("float8_e4m3fn_rowwise"),
    ("fp8", "block", None): Target("float8_e4m3fn_block3d"),
    ("fp8", "block2d", None): Target("float8_e4m3fn_blockwise"),
    ("int8", None, None): Target("int8_tensorwise", {"scaling": "tensor"}),
    ("int8", "tensor", None): Target("int8_tensorwise", {"scaling": "tensor"}),
    ("int8", "row", None): Target("int8_tensorwise", {"scaling": "row"}),
    ("int8", SIZED, None): TILES,
    ("int8", "block", None): TILES,
    ("int8", "block2d", None): TILES,
    ("int8", None, "blockwise"): TILES,
    ("int8", SIZED, "blockwise"): TILES,
    ("int8", "block", "blockwise"): TILES,
    ("int8", "block2d", "blockwise"): TILES,
    ("int8", None, LODEWISE): Target("int8_lodewise"),
    ("int8", SIZED, LODEWISE): Target("int8_lodewise"),
    ("int8", "block", LODEWISE): Target("int8_lodewise"),
    ("convrot", None, None): ROTATED,
    ("convrot", "row", None): ROTATED,
    ("nf4", None, None): Target("bnb_nf4"),
    ("nf4", SIZED, None): Target("bnb_nf4"),
    ("fp4", None, None): Target("bnb_fp4"),
    ("fp4", SIZED, None): Target("bnb_fp4"),
    ("nvfp4", None, None): Target("nvfp4"),
    ("mxfp8", None, None): Target("mxfp8"),
}
