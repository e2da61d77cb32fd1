"""Fit to Size: a format for every layer of a file, so that it gets a wanted size or error."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..quant_ops.calibration import Calibration, Observer
from ..quant_ops.doors.fit import default_wishes, fit_file
from ..quant_ops.errors import RecipeError
from ..quant_ops.planning.goal import Goal, error_goal, memory_goal, size_goal
from ..quant_ops.planning.recipe import Draft, draft_from_text, parse_wish, recipe_to_toml
from .bridge import host
from .common import (
    AUTO,
    RECIPE,
    WorksOnAFile,
    calibration_input,
    device_input,
    recipe_input,
    report_output,
    schema,
    settled,
)

SIZE, MEMORY, ERROR = "file size", "GPU memory", "error"
GOALS = {SIZE: size_goal, MEMORY: memory_goal, ERROR: lambda text, _: error_goal(text)}


def goal_of(whole: int, target: str = "50%", goal: str = SIZE) -> Goal:
    """What to fit a file of `whole` bytes to.

    Raises:
        RecipeError: not a size, or not an error.
    """
    if goal not in GOALS:
        raise RecipeError(f"goal is {goal!r}; it may be {', '.join(GOALS)}")
    return GOALS[goal](str(target), whole)


class FewBitsFitToSize(WorksOnAFile):
    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = "\n".join(wish.to_text() for wish in default_wishes())
        return schema(
            node_id="FewBitsFitToSize",
            display_name="Fit to Size",
            category="FewBits/quantize",
            description="Chooses a format for every layer of a model file, so that the new file "
            "fits and the error is as small as that allows. Gives a recipe for Quantize File.",
            search_aliases=[
                "low vram",
                "target size",
                "mixed precision",
                "smaller model",
                "budget",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.all_model_files(),
                    tooltip="The safetensors file to fit. Its weights are read and rounded in "
                    "every allowed format; nothing is written.",
                ),
                io.String.Input(
                    "target",
                    optional=True,
                    default="50%",
                    tooltip="How large the file may be: 6GB, 900 MB, or 40% of the original. With "
                    "goal at error: how large the error of the layers may be, as 0.02.",
                ),
                io.Combo.Input(
                    "goal",
                    optional=True,
                    options=list(GOALS),
                    default=SIZE,
                    tooltip="What the target is about: the size of the file, the memory of the "
                    "GPU (a fifth of it is left for activations), or the error.",
                ),
                recipe_input(
                    "Rules for single layers, from Layer Rules; they are not chosen anew."
                ),
                io.String.Input(
                    "allow",
                    optional=True,
                    advanced=True,
                    multiline=True,
                    default="",
                    placeholder=defaults,
                    tooltip="Formats to choose among, one a line, options after a colon. Empty: "
                    "those shown. Keeping a layer is always allowed.",
                ),
                device_input(),
                calibration_input(),
            ],
            outputs=[
                report_output(),
                RECIPE.Output(
                    "recipe",
                    display_name="recipe",
                    tooltip="The choice, for the recipe input of Quantize File; Save Recipe writes "
                    "it down.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        file: str,
        target: str = "50%",
        goal: str = SIZE,
        recipe: Draft | None = None,
        allow: str = "",
        device: str = AUTO,
        calibration: Calibration | Observer | None = None,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        found = fit_file(
            host.model_path(*host.split_choice(file)),
            lambda whole: goal_of(whole, target, goal),
            recipe or Draft(),
            allowed=tuple(map(parse_wish, filter(None, map(str.strip, allow.splitlines())))),
            calibration=settled(calibration),
            device=host.pick_device(device),
            on_progress=run.on_progress,
        )
        run.on_plan(found.plan)
        data = found.to_json()
        draft = draft_from_text(recipe_to_toml(found.recipe), "fit")
        return io.NodeOutput(json.dumps(data, indent=2), draft, ui={"fewbits_fit": [data]})
