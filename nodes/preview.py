"""What a node would do, before a prompt runs: from a graph's values and the headers of files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ..quant_ops.checkpoint.importers.source import open_checkpoint
from ..quant_ops.doors import inspect_file
from ..quant_ops.doors.quantize import layers_to_round_again, with_warning
from ..quant_ops.errors import QuantError, RecipeError
from ..quant_ops.formats import FORMATS
from ..quant_ops.pipeline import plan_source
from ..quant_ops.planning.recipe import Draft, Recipe, Wish
from ..quant_ops.sources import TensorSource
from .bridge import host
from .common import advised_for, recipe_from
from .fit_to_size import FewBitsFitToSize, goal_of
from .format_advisor import FewBitsFormatAdvisor
from .layer_rules import FewBitsLayerRules

MODELS, ENCODERS, CHECKPOINTS = host.MODEL_FOLDERS
# class of a loader -> the folder it looks into, and its input that names the file
LOADERS = {
    "UNETLoader": (MODELS, "unet_name"),
    "FewBitsLoadModel": (MODELS, "file"),
    "CheckpointLoaderSimple": (CHECKPOINTS, "ckpt_name"),
    "FewBitsLoadCheckpoint": (CHECKPOINTS, "file"),
    "CLIPLoader": (ENCODERS, "clip_name"),
}
RECIPE_INPUTS = (
    "format",
    "scaling",
    "preset",
    "keep",
    "block_size",
    "fallback",
    "method",
    "full_precision_matmul",
    "convrot",
)
ADVICE_INPUTS = ("file", "gpu", "comfyui")
GOAL_INPUTS = ("target", "goal")
THROUGH = ("model", "clip")  # inputs through which a node hands on what it was given
DEPTH = 64  # nodes between a loader and the node that is asked about


class NothingToShow(RecipeError):
    """The graph does not say enough yet; nobody did anything wrong."""


def preview(prompt: Mapping[str, dict], node_id: str) -> dict:
    """What the page shows of a node that has not run: `{"inspection": ...}` for one that looks into
    a file, with `"asked": ...` for Fit to Size; `{"advice": ...}` for the advisor, else `{"plan":
    ..., "sizes": format -> bytes, "target": ...}`; `{}` where no file can be found from here.

    Args:
        prompt: id -> class_type and inputs, as a page sends it; only values and links are read.

    Raises:
        QuantError: a wish that cannot be fulfilled, or a file that cannot be read.
    """
    try:
        node = _node(prompt, node_id)
        if not node["inputs"].keys() & {"file", "format"}:
            return {}  # it saves what it is given, and that is not the file it came from
        path = host.model_path(*_source(prompt, node_id))
        if node.get("class_type") == FewBitsFormatAdvisor.__name__:
            return {"advice": _advice(prompt, node["inputs"])}
    except NothingToShow:
        return {}
    if "format" not in node["inputs"]:
        found = {"inspection": inspect_file(path).to_json()}
        asked = _goal(node, path)
        return {**found, "asked": asked} if asked else found
    try:
        recipe = _recipe(prompt, node["inputs"], path)
    except NothingToShow:
        return {}
    again = node["inputs"].get("requantize") is True
    twice = layers_to_round_again(path, recipe) if again else frozenset()
    with open_checkpoint(path, decoded=twice) as source:
        plan = with_warning(plan_source(source, recipe), twice)
        sizes = {name: _bytes(source, recipe, name) for name in FORMATS}
    answer = {"plan": plan.to_json(), "sizes": {k: v for k, v in sizes.items() if v is not None}}
    choice = node["inputs"].get("file")
    if isinstance(choice, str):
        name = str(node["inputs"].get("filename") or "").strip()
        answer["target"] = host.planned(name or host.automatic_name(choice, recipe.mark))
    return answer


def _node(prompt: Mapping[str, dict], node_id: str) -> dict:
    node = prompt.get(node_id) if isinstance(prompt, Mapping) else None
    if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
        raise NothingToShow(f"the graph has no node {node_id!r}")
    return node


def _source(prompt: Mapping[str, dict], node_id: str) -> tuple[str, str]:
    """(folder, name) of the file that a node is given, through nodes that hand a model on."""
    for _ in range(DEPTH):
        node = _node(prompt, node_id)
        inputs = node["inputs"]
        if node.get("class_type") in LOADERS:
            folder, name = LOADERS[node["class_type"]]
            return folder, str(inputs.get(name, ""))
        if isinstance(inputs.get("file"), str):
            return host.split_choice(inputs["file"])
        links = (inputs.get(name) for name in THROUGH)
        node_id = next((str(link[0]) for link in links if _is_link(link)), "")
    raise NothingToShow("the graph leads to no file")


def _recipe(prompt: Mapping[str, dict], inputs: dict, path: Path) -> Recipe:
    wish = {
        name: inputs[name]
        for name in RECIPE_INPUTS
        if name in inputs and not _is_link(inputs[name])
    }
    if _is_link(inputs.get("recipe")):
        wish["recipe"] = _draft(prompt, str(inputs["recipe"][0]), DEPTH)
    return recipe_from(choose=advised_for(lambda: open_checkpoint(path)), **wish)


def _advice(prompt: Mapping[str, dict], inputs: dict) -> dict:
    wish = {name: inputs[name] for name in ADVICE_INPUTS if isinstance(inputs.get(name), str)}
    if _is_link(inputs.get("recipe")):
        wish["recipe"] = _draft(prompt, str(inputs["recipe"][0]), DEPTH)
    (advice,) = FewBitsFormatAdvisor.execute(**wish).ui["fewbits_advice"]
    return advice


def _goal(node: dict, path: Path) -> dict | None:
    """What a file is fitted to, in words and bytes; None for other nodes, and where a link says it.

    Raises:
        RecipeError: not a size, or not an error.
    """
    wish = {name: node["inputs"][name] for name in GOAL_INPUTS if name in node["inputs"]}
    if node.get("class_type") != FewBitsFitToSize.__name__ or any(map(_is_link, wish.values())):
        return None
    with open_checkpoint(path) as source:
        whole = sum(spec.nbytes for spec in source.header.tensors.values())
    goal = goal_of(whole, **wish)
    return {"said": goal.said, "bytes": goal.bytes}


def _draft(prompt: Mapping[str, dict], node_id: str, depth: int) -> Draft:
    """The recipe of a chain of Layer Rules, whose inputs are all values."""
    node = _node(prompt, node_id)
    if node.get("class_type") != "FewBitsLayerRules" or not depth:
        raise NothingToShow("the recipe comes from a node that has to run first")
    inputs = dict(node["inputs"])
    if _is_link(inputs.get("recipe")):
        inputs["recipe"] = _draft(prompt, str(inputs["recipe"][0]), depth - 1)
    return FewBitsLayerRules.execute(**inputs).args[0]


def _bytes(source: TensorSource, recipe: Recipe, format: str) -> int | None:
    """Size of the result with another primary format and the same rules; None if it does not
    fit.
    """
    try:
        return plan_source(source, dataclasses.replace(recipe, primary=Wish(format))).bytes_after
    except QuantError:
        return None


def _is_link(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2
