"""What several nodes share: inputs, the recipe they build, the report they return, schemas for
every ComfyUI.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from comfy_api.latest import io

from ..quant_ops.calibration import Calibration, Observer
from ..quant_ops.doors import Conversion, Inspection
from ..quant_ops.doors.advise import chosen_wish
from ..quant_ops.errors import QuantError, RecipeError, visible
from ..quant_ops.formats import FORMATS, find_format, option_values, own_methods
from ..quant_ops.methods import METHODS
from ..quant_ops.planning.gpus import card_here
from ..quant_ops.planning.model_family import preset_names
from ..quant_ops.planning.recipe import Draft, Recipe, Rule, Wish
from ..quant_ops.report.report import Report
from ..quant_ops.sources import TensorSource
from . import bridge
from .bridge import host
from .bridge.compat import core_version

AUTO, NONE = "auto", "none"
AUTO_FORMAT = "auto (best for this GPU)"  # a format: what the advisor says of model and GPU
ON, OFF = "on", "off"
RECIPE = io.Custom("FEWBITS_RECIPE")  # carries a Draft
CALIBRATION = io.Custom(
    "FEWBITS_CALIBRATION"
)  # carries a Calibration, or an Observer that fills one
# Types of sockets whose values no prompt can write, and what it can.
OBJECTS = {"MODEL", "CLIP", "VAE", RECIPE.io_type, CALIBRATION.io_type}
WRITTEN = (str, int, float, list, dict)
SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


# What people search for who want a smaller model
QUANTIZE_ALIASES = [
    "quantize",
    "quantization",
    "convert",
    "compress",
    "low vram",
    "vram",
    "smaller model",
    "model size",
    "fewbits",
]


def format_aliases(formats: Iterable[str]) -> list[str]:
    """Names of the formats as people search for them: `float8_e4m3fn`, `float8`, `fp8`."""
    words = []
    for name in formats:
        family = name.split("_")[0]
        words += [name, family, family.replace("float", "fp"), FORMATS[name].short]
        words += ["convrot"] if "convrot" in FORMATS[name].Options.names() else []
    return list(dict.fromkeys(filter(None, words)))


def connected(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, which now refuses what a prompt has written in place of a connection: ComfyUI hands
    that on as it is. Its errors show marks that turn text around as escapes.
    """

    @functools.cache
    def sockets() -> list[io.Input]:  # a schema lists the model folders
        return [item for item in node.define_schema().inputs if item.get_io_type() in OBJECTS]

    for name in ("check_lazy_status", "execute"):
        called = getattr(node, name).__func__
        if called is not getattr(io.ComfyNode, name).__func__:
            setattr(node, name, classmethod(_refusing_written(called, sockets)))
    return node


def _refusing_written(
    called: Callable[..., object], sockets: Callable[[], list[io.Input]]
) -> Callable[..., object]:
    @functools.wraps(called)
    def checked(cls: type[io.ComfyNode], *args: object, **inputs: object) -> object:
        for item in sockets():
            _refuse_written(item, inputs, called.__name__ == "execute")
        try:
            return called(cls, *args, **inputs)
        except QuantError as error:  # what it quotes of the prompt may turn the page's text around
            lines = str(error).split("\n")
            if all(line.isprintable() for line in lines):
                raise
            text = "\n".join(map(visible, lines))
            raise type(error)(text, error.option) from None

    return checked


def _refuse_written(item: io.Input, inputs: dict, complete: bool) -> None:
    """Raise for a socket without an object; null stands for what is left out, or not loaded yet."""
    value = inputs.get(item.id)
    missing = value is None and complete and not item.optional
    if missing or isinstance(value, WRITTEN):
        shown = "null" if value is None else repr(str(value)[:100])
        raise RecipeError(
            f"{item.id} is {shown}, allowed: a connection to an output of type {item.get_io_type()}"
        )


def schema(**fields: object) -> io.Schema:
    """A Schema without the fields that an older ComfyUI does not have."""
    return io.Schema(**{name: value for name, value in fields.items() if name in SCHEMA_FIELDS})


def model_input() -> io.Model.Input:
    """Lazy: wishes that cannot be fulfilled are refused before the model is loaded."""
    return io.Model.Input(
        "model",
        lazy=True,
        tooltip="The model to convert. LoRAs and other weight patches on it are baked in first. It "
        "is not changed.",
    )


def recipe_inputs(
    formats: list[str], choice: str, default: str, *, auto: bool = False
) -> tuple[list[io.Input], list[io.Input]]:
    """Inputs that describe a Recipe: (shown, advanced). `recipe_from` takes the values by name.

    All but the format are optional, so that an API prompt states what matters and outlives inputs
    that come later. An option that none of the formats has gets no input.

    Args:
        choice: helps to choose among the formats.
        auto: whether the advisor may choose.
    """
    offered = [AUTO_FORMAT, *formats] if auto else formats
    scaled = [name for name in formats if "scaling" in FORMATS[name].layout_options]
    rotated = [name for name in formats if "convrot" in FORMATS[name].Options.names()]
    sizes = sorted(_values(formats, "block_size"))
    shown = [
        recipe_input(
            "Rules for single layers, from Layer Rules. What it says counts before the inputs of "
            "this node."
        ),
        io.Combo.Input(
            "format", options=offered, default=default, tooltip=f"What the layers become. {choice}"
        ),
        *([scaling_input(scaled)] if scaled else []),
        preset_input("Which sensitive layers stay as they are."),
        keep_input(),
    ]
    advanced = [
        *([block_size_input(sizes)] if sizes else []),
        fallback_input(),
        method_input(formats),
        full_precision_input(),
        *([convrot_input(rotated)] if rotated else []),
    ]
    return shown, advanced


def recipe_input(tooltip: str) -> io.Input:
    return RECIPE.Input("recipe", optional=True, tooltip=tooltip)


def scaling_input(formats: list[str]) -> io.Combo.Input:
    """For formats that are stored in more than one way."""
    return io.Combo.Input(
        "scaling",
        options=[AUTO, *_values(formats, "scaling")],
        optional=True,
        tooltip=f"How many weights share a scale in {', '.join(formats)}: one scale per row is "
        "more exact, one per tensor smaller by a few kilobytes. auto: row. Leave it at auto for "
        "the other formats.",
    )


def preset_input(what: str, *, advanced: bool | None = None) -> io.Combo.Input:
    return io.Combo.Input(
        "preset",
        options=[AUTO, NONE, *preset_names()],
        optional=True,
        advanced=advanced,
        tooltip=f"{what} auto: recognise the model and use its own list; none: convert every layer "
        "that fits.",
    )


def keep_input() -> io.String.Input:
    return io.String.Input(
        "keep",
        optional=True,
        multiline=True,
        default="",
        placeholder="layers to keep, one pattern a line",
        tooltip="More layers to keep as they are, one pattern a line: a layer name, a glob such as "
        "double_blocks.0.*, or a regular expression after re:",
    )


def block_size_input(sizes: list[int]) -> io.Combo.Input:
    return io.Combo.Input(
        "block_size",
        options=[AUTO, *map(str, sizes)],
        optional=True,
        advanced=True,
        tooltip="Weights per block in the formats that have blocks; smaller is more exact and "
        "larger on disk. auto: the format's default.",
    )


def fallback_input() -> io.Combo.Input:
    return io.Combo.Input(
        "fallback",
        options=[NONE, *FORMATS],
        optional=True,
        advanced=True,
        tooltip="Convert the layers that the preset would keep to this format. none: keep them.",
    )


def method_input(formats: list[str]) -> io.Combo.Input:
    return io.Combo.Input(
        "method",
        options=[AUTO, *METHODS],
        optional=True,
        advanced=True,
        tooltip="How each weight's code is chosen. nearest: the closest code, fast; mse_clip: the "
        "scales with the smallest weight error, slower; svd: learned rounding, much slower; gptq: "
        "rounded for your own prompts, with a calibration; adaround: the same by gradient, slower. "
        "auto: "
        f"{own_methods(formats)}.",
    )


def full_precision_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "full_precision_matmul",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Make ComfyUI compute these layers with unrounded activations: closer to the "
        "original, and slower on GPUs that could multiply in low precision.",
    )


def convrot_input(formats: list[str]) -> io.Combo.Input:
    return io.Combo.Input(
        "convrot",
        options=[AUTO, ON, OFF],
        optional=True,
        advanced=True,
        tooltip=f"Rotate the weights of {', '.join(formats)} layers before rounding (ConvRot), "
        "which evens out large values. ComfyUI rotates the activations to match, which takes some "
        "time at every step. auto: where there is a scale per row, and the width can be divided by "
        "16; other layers are stored as plain rows.",
    )


class WorksOnAFile(io.ComfyNode):
    """A node that runs again when its file's content changed, or another of its inputs."""

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: object) -> tuple:
        return host.wish_state(file, others)


class TakesASwitch(io.ComfyNode):
    """Base of nodes with the input `convrot`. It was a switch before it had an auto: workflows and
    prompts that say true or false still mean on and off.
    """

    @classmethod
    def validate_inputs(cls, convrot: str | bool = AUTO) -> bool | str:
        allowed = (AUTO, ON, OFF)
        known = isinstance(convrot, bool) or convrot in allowed
        return known or f"convrot is {convrot!r}, allowed: {', '.join(allowed)}"


def calibration_input() -> io.Input:
    return CALIBRATION.Input(
        "calibration",
        optional=True,
        tooltip="What the layers are given while the model runs, from Save or Load Calibration. "
        "The methods gptq and adaround need it; others do not look at it.",
    )


def settled(calibration: Calibration | Observer | None) -> Calibration | None:
    """A calibration as it is now, also straight from a Calibrate node."""
    if isinstance(calibration, Observer):
        return calibration.finish()
    return calibration


def kernels_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "quantized_kernels",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Multiply the quantized layers of the text encoder by their own kernels, where "
        "format and GPU have one, as in a diffusion model. Off: each layer is decoded at every "
        "prompt, as ComfyUI does; closest to the original. The report says what runs.",
    )


def device_input() -> io.Combo.Input:
    return io.Combo.Input(
        "device",
        options=[AUTO, "cpu", "cuda"],
        optional=True,
        advanced=True,
        tooltip="Where the conversion is computed. auto: the NVIDIA or AMD GPU that ComfyUI uses, "
        "else the CPU.",
    )


def overwrite_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "overwrite",
        default=False,
        optional=True,
        tooltip="Replace the file if it exists. Off: an existing file is an error and stays as it "
        "is.",
    )


def verify_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "verify",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Before the file gets its name, read every layer a second time, by a decoder that "
        "shares no code with what wrote it. Takes longer; if the two differ, no file is kept.",
    )


def filename_input(mark: str) -> io.String.Input:
    """Where a file made of another file goes; empty: `host.automatic_name` with this mark."""
    return io.String.Input(
        "filename",
        optional=True,
        default="",
        placeholder=f"automatic: <folder>/<file>_{mark}",
        tooltip="Name of the new file inside ComfyUI's output folder; subfolders are made. Empty: "
        f"the old name with _{mark}, in the folder where the loaders find it.",
    )


def report_output() -> io.String.Output:
    return io.String.Output(
        "report",
        display_name="report",
        tooltip="What was done to every layer, with sizes and errors, as JSON.",
    )


def path_output() -> io.String.Output:
    return io.String.Output("path", display_name="path", tooltip="Full path of the written file.")


def recipe_from(
    *,
    choose: Callable[[Draft], Wish] | None = None,
    format: str,
    scaling: str = AUTO,
    preset: str = AUTO,
    keep: str = "",
    block_size: str = AUTO,
    fallback: str = NONE,
    method: str = AUTO,
    full_precision_matmul: bool = False,
    convrot: str | bool = AUTO,
    recipe: Draft | None = None,
) -> Recipe:
    """The Recipe that the inputs of `recipe_inputs` describe.

    A connected recipe brings rules, and perhaps a primary wish in place of this node's. The node's
    own layers to keep come before its rules; preset and fallback count where they are not left
    alone.

    Args:
        choose: what the format `auto` stands for, from what the recipe says besides; None where no
            model is known yet: then any stands for it.

    Raises:
        RecipeError: an unknown value, or one that a connected recipe's primary wish makes void.
    """
    base = recipe or Draft()
    named = find_format(format)
    if convrot is False and not (named and "convrot" in named.Options.names()):
        convrot = AUTO  # the switch of old stood at off for every format
    if base.primary:
        stated = {
            "scaling": scaling != AUTO,
            "block_size": block_size != AUTO,
            "method": method not in (AUTO, base.primary.method),
            "full_precision_matmul": full_precision_matmul,
            "convrot": convrot not in (AUTO, False),
        }
        for name in filter(stated.get, stated):
            raise RecipeError(
                "the connected recipe has a [primary] table, which says everything about "
                f"{base.primary.format}; leave {name} of this node alone, or delete [primary] from "
                "the recipe"
            )
    options = {
        "scaling": _chosen(scaling),
        "block_size": None if block_size == AUTO else int(block_size),
        "full_precision_matrix_mult": full_precision_matmul,
    }
    rotated = {ON: True, OFF: False}.get(convrot, convrot)
    if rotated != AUTO or (named and AUTO in named.Options.values("convrot")):
        options["convrot"] = rotated
    own = Draft(
        rules=tuple(Rule(line.strip(), None) for line in keep.splitlines() if line.strip()),
        fallback=None if fallback == NONE else Wish(fallback),
        preset=_chosen(preset),
    )
    draft = own.over(base)
    if base.primary:
        return draft.finish()
    if format == AUTO_FORMAT:
        primary = _advised(draft, choose, options, _chosen(method))
    else:
        primary = Wish(format, options, _chosen(method))
    return dataclasses.replace(draft, primary=primary).finish()


def _advised(
    draft: Draft,
    choose: Callable[[Draft], Wish] | None,
    options: Mapping[str, object],
    method: str | None,
) -> Wish:
    """What `choose` says, with the method and the precision of this node.

    Raises:
        RecipeError: an option of a format is stated, and no format.
    """
    for name in ("scaling", "block_size", "convrot"):
        if options.get(name) is not None:
            raise RecipeError(f"format auto chooses {name} too: leave it alone, or name a format")
    found = choose(draft) if choose else Wish(next(iter(FORMATS)))
    precise = options["full_precision_matrix_mult"]
    stated = {**found.options.stated(), "full_precision_matrix_mult": precise}
    return Wish(found.format, stated, method or found.method)


def advised_for(
    opened: Callable[[], AbstractContextManager[TensorSource]],
) -> Callable[[Draft], Wish]:
    """What the format `auto` stands for with a model, on this GPU, in this ComfyUI."""

    def choose(draft: Draft) -> Wish:
        with opened() as source:
            return chosen_wish(source, card_here(), draft, this_comfyui())

    return choose


def this_comfyui() -> str | None:
    """The version of the ComfyUI at hand as numbers; None where it has none."""
    found = re.match(r"\d+(\.\d+)+", core_version())
    return found and found[0]


def _chosen(value: str) -> str | None:
    """What an input says; None where it leaves that open."""
    if value == AUTO:
        return None
    return value


def report_result(
    *values: object, report: Report | Conversion, written: Path | None = None, **facts: object
) -> io.NodeOutput:
    """A node's outputs, the report last as text and, for the page, as JSON; with further facts of
    this node, and where the file is that it wrote.
    """
    where = host.whereabouts(written) if written else {}
    data = {**where, **report.to_json(), **facts}
    return io.NodeOutput(*values, json.dumps(data, indent=2), ui={"fewbits_report": [data]})


def saved_result(
    *values: object, written: Path | None, text: str, **facts: object
) -> io.NodeOutput:
    """The outputs of a node that wrote a file without a report; for the page, where it is, and
    further facts of this node.
    """
    where = host.whereabouts(written) if written else {}
    data = {**where, "text": text, **facts}
    return io.NodeOutput(*values, ui={"fewbits_saved": [data]})


def inspection_text(*inspections: Inspection, kernels: Iterable[str] = ()) -> str:
    """What is in the files, which kernels run, and what of FewBits is switched off in this
    ComfyUI.
    """
    texts = [inspection.to_text() for inspection in inspections]
    lines = list(kernels)
    if lines:
        texts.append("\n".join(["how quantized layers are multiplied:", *lines]))
    off = [
        f"FewBits: '{seam}' is off: {reason}" for seam, reason in bridge.status().items() if reason
    ]
    return "\n".join([*texts, *off])


def _values(formats: list[str], option: str) -> list:
    """Allowed values of an option over several formats."""
    return list(option_values(option, formats))
