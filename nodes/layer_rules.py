"""Layer Rules: what becomes of which layers, as a recipe for the Quantize nodes; Save Recipe: that
recipe as a file.
"""

from __future__ import annotations

import json
import re

from comfy_api.latest import io

from ..quant_ops.errors import RecipeError
from ..quant_ops.formats import FORMATS
from ..quant_ops.planning.layer_config import parse_layer_config_text
from ..quant_ops.planning.recipe import Draft, Rule, draft_from_text, rule_from
from .bridge import host
from .common import AUTO, RECIPE, overwrite_input, preset_input, recipe_input, saved_result, schema

KEEP = "keep"


class FewBitsLayerRules(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsLayerRules",
            display_name="Layer Rules",
            category="FewBits/quantize",
            description="Says what becomes of single layers: another format, other options, or "
            "nothing. Connect it to a Quantize node, or to more Layer Rules.",
            search_aliases=[
                "recipe",
                "mixed precision",
                "exclude layers",
                "layer config",
                "fewbits",
            ],
            inputs=[
                recipe_input(
                    "An earlier recipe. The lines of this node come before its rules; the first "
                    "match decides."
                ),
                io.String.Input(
                    "pattern",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="layers, one pattern a line",
                    tooltip="Which layers, one pattern a line: a layer name, a glob such as "
                    "double_blocks.0.*, a regular expression for the whole name after re:, or for "
                    "a part of it after search:",
                ),
                io.Combo.Input(
                    "format",
                    options=[KEEP, *FORMATS],
                    default=KEEP,
                    optional=True,
                    tooltip="What these layers become. keep: they stay as they are.",
                ),
                io.String.Input(
                    "options",
                    optional=True,
                    default="",
                    placeholder="scaling=row, method=svd",
                    tooltip="Options of the format and the method, as name=value with commas "
                    "between: scaling=tensor, block_size=128, convrot=true, method=svd, top_p=0.1; "
                    "heuristics=true keeps layers too small to gain.",
                ),
                preset_input(
                    "Which sensitive layers stay as they are. It counts in place of the Quantize "
                    "node's auto."
                ),
                io.String.Input(
                    "text",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="or paste a recipe (TOML) or a layer-config (JSON)",
                    tooltip="A recipe file's TOML, or a layer-config's JSON, which starts with a "
                    "brace. Its rules come after the patterns above; a layer-config comes before "
                    "all rules.",
                ),
                io.Boolean.Input(
                    "fullmatch",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="The keys of the pasted layer-config are regular expressions for the "
                    "whole name, not globs.",
                ),
            ],
            outputs=[
                RECIPE.Output(
                    "recipe",
                    display_name="recipe",
                    tooltip="For the recipe input of a Quantize node or Inspect File.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        recipe: Draft | None = None,
        pattern: str = "",
        format: str = KEEP,
        options: str = "",
        preset: str = AUTO,
        text: str = "",
        fullmatch: bool = False,
    ) -> io.NodeOutput:
        own = Draft(
            rules=_rules(pattern, format, options), preset=None if preset == AUTO else preset
        )
        return io.NodeOutput(own.over(_pasted(text, fullmatch)).over(recipe or Draft()))


def _rules(pattern: str, format: str, options: str) -> tuple[Rule, ...]:
    """One rule per line of `pattern`."""
    patterns = [line.strip() for line in pattern.splitlines() if line.strip()]
    items = ["".join(item.split()) for item in re.split(r"[,\n]", options) if item.strip()]
    if items and (not patterns or format == KEEP):
        raise RecipeError(
            f"options {options.strip()!r} need a pattern and a format to belong to; write both, or "
            "leave options empty"
        )
    return tuple(
        rule_from(line, ":".join(filter(None, (format, ",".join(items))))) for line in patterns
    )


def _pasted(text: str, fullmatch: bool) -> Draft:
    """TOML, or JSON of a layer-config; no TOML starts with a brace."""
    if text.lstrip().startswith("{"):
        return Draft(layer_config=parse_layer_config_text(text, "pasted", fullmatch=fullmatch))
    if fullmatch:
        raise RecipeError(
            "fullmatch is about the keys of a pasted layer-config (JSON), and there is none"
        )
    return draft_from_text(text, "pasted")


class FewBitsSaveRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsSaveRecipe",
            display_name="Save Recipe",
            category="FewBits/quantize",
            description="Writes down how a model was quantized, so that `fewbits quantize "
            "--recipe` or a Layer Rules node does exactly the same again.",
            search_aliases=["export recipe", "toml", "command line", "fewbits"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "report",
                    force_input=True,
                    tooltip="The report of a Quantize node, Quantize File, or Inspect File with a "
                    "preview.",
                ),
                io.String.Input(
                    "filename",
                    optional=True,
                    default="",
                    placeholder="recipes/my_model; empty: only the text",
                    tooltip="Name of a TOML file inside ComfyUI's output folder; subfolders are "
                    "made. Empty: no file.",
                ),
                overwrite_input(),
            ],
            outputs=[
                io.String.Output(
                    "path",
                    display_name="path",
                    tooltip="Full path of the written file; empty where none was.",
                ),
                io.String.Output(
                    "recipe", display_name="recipe", tooltip="The recipe as TOML text."
                ),
            ],
        )

    @classmethod
    def execute(cls, report: str, filename: str = "", overwrite: bool = False) -> io.NodeOutput:
        text = recipe_of(report)
        path = None
        if filename.strip():
            path = host.save_text(filename, ".toml", text, overwrite=overwrite)
        return saved_result(str(path or ""), text, written=path, text="recipe", recipe=text)


def recipe_of(report: str) -> str:
    """The recipe in a report's JSON, or in the plan that an inspection previewed.

    Raises:
        RecipeError: no report, or one of something that quantized nothing.
    """
    try:
        data = json.loads(report)
    except (ValueError, RecursionError):
        data = None
    plan = data.get("plan", data) if isinstance(data, dict) else None
    found = plan.get("recipe") if isinstance(plan, dict) else None
    if not found or not isinstance(found, str):
        raise RecipeError(
            "this report has no recipe: connect the report of a Quantize node, of Quantize File, "
            "or of Inspect File with a preview"
        )
    return found
