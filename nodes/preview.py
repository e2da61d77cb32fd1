"""What a node would do, before a prompt runs: from a graph's values and the headers of files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath

from comfy_api.latest import io

from ..quant_ops.checkpoint.importers.source import open_checkpoint
from ..quant_ops.doors import inspect_file
from ..quant_ops.doors.quantize import layers_to_round_again, with_warning
from ..quant_ops.errors import QuantError, RecipeError
from ..quant_ops.formats import FORMATS
from ..quant_ops.pipeline import plan_source
from ..quant_ops.planning.recipe import Draft, Recipe, Wish
from ..quant_ops.sources import TensorSource
from .bridge import host
from .bridge.model_io import name_for
from .common import NONE, advised_for, recipe_from
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
    "FewBitsLoadTextEncoder": (ENCODERS, "file"),
}
MORE_FILES = ("file2", "file3", "file4")  # of Load Text Encoder
SAVES, CONVERTS = "FewBitsSaveComfyQuant", "FewBitsConvertFP8Scaled"
QUANTIZES_ENCODERS = "FewBitsQuantizeTextEncoder"
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
    a file, or a list of them, with `"asked": ...` for Fit to Size; `{"advice": ...}` for the
    advisor, else `{"plan": ..., "sizes": format -> bytes}`; `"target": ...` for one that writes;
    `{}` where no file can be found from here.

    Args:
        prompt: id -> class_type and inputs, as a page sends it; only values and links are read.

    Raises:
        QuantError: a wish that cannot be fulfilled, or a file that cannot be read.
    """
    try:
        node = _node(prompt, node_id)
        return _answer(prompt, node_id, node)
    except NothingToShow:
        return {}


def _answer(prompt: Mapping[str, dict], node_id: str, node: dict) -> dict:
    kind = node.get("class_type")
    if kind == SAVES:
        return _saving(prompt, node_id, node)
    if not node["inputs"].keys() & {"file", "format"}:
        return {}  # what it is given is not the file that it came from
    if kind == FewBitsFormatAdvisor.__name__:
        return {"advice": _advised(prompt, node["inputs"], DEPTH).ui["fewbits_advice"][0]}
    path = host.model_path(*_source(prompt, node_id))
    if "format" not in node["inputs"]:
        return _inspected(node, path)
    recipe = _recipe(prompt, node["inputs"], path)
    again = node["inputs"].get("requantize") is True
    twice = layers_to_round_again(path, recipe) if again else frozenset()
    with open_checkpoint(path, decoded=twice) as source:
        plan = with_warning(plan_source(source, recipe), twice)
        sizes = {name: _bytes(source, recipe, name) for name in FORMATS}
    answer = {"plan": plan.to_json(), "sizes": {k: v for k, v in sizes.items() if v is not None}}
    if kind == QUANTIZES_ENCODERS:
        return _of_encoder(answer, node["inputs"])
    if isinstance(node["inputs"].get("file"), str):
        answer["target"] = _target(node["inputs"], recipe.mark)
    return answer


def _inspected(node: dict, path: Path) -> dict:
    """What is inside, and for some nodes what they would make of it."""
    kind, inputs = node.get("class_type"), node["inputs"]
    found = {"inspection": inspect_file(path).to_json()}
    more = [inputs[name] for name in MORE_FILES if inputs.get(name, NONE) != NONE]
    if more:
        others = (inspect_file(host.model_path(ENCODERS, str(name))) for name in more)
        found["inspection"] = [found["inspection"], *(other.to_json() for other in others)]
    if kind == CONVERTS:
        found["target"] = _target(inputs, "comfy_quant")
    if kind == FewBitsFitToSize.__name__:
        found["asked"] = _goal(inputs, path)
    return found


def _of_encoder(answer: dict, inputs: dict) -> dict:
    """Of a text encoder the totals: in a CLIP its layers have other names than in its file, so that
    rules that name some decide about others.

    Raises:
        NothingToShow: there are such rules.
    """
    if inputs.get("keep") or inputs.get("recipe"):
        raise NothingToShow("the rules name layers of the CLIP")
    return {**answer, "plan": {**answer["plan"], "layers": [], "rules": []}}


def _target(inputs: dict, mark: str) -> dict:
    """Where a node that takes a file writes."""
    name = str(inputs.get("filename") or "").strip()
    return _planned(name or host.automatic_name(inputs["file"], mark), inputs)


def _planned(name: str, inputs: dict) -> dict:
    return {**host.planned(name), "overwrite": bool(inputs.get("overwrite"))}


def _saving(prompt: Mapping[str, dict], node_id: str, node: dict) -> dict:
    """Where Save comfy_quant writes: a name of its own comes from the node that quantizes."""
    inputs = node["inputs"]
    name = str(inputs.get("filename") or "").strip()
    if name:
        return {"target": _planned(name, inputs)}
    maker = _quantizer(prompt, node_id)
    path = host.model_path(*_source(prompt, maker))
    with open_checkpoint(path) as source:
        plan = plan_source(source, _recipe(prompt, _node(prompt, maker)["inputs"], path))
    formats = Counter(layer.format for layer in plan.layers if layer.format)
    return {"target": _planned(name_for(PurePath(source.name).stem, formats), inputs)}


def _quantizer(prompt: Mapping[str, dict], node_id: str) -> str:
    """The node before this one that quantizes its model."""
    for _ in range(DEPTH):
        link = _node(prompt, node_id)["inputs"].get("model")
        if not _is_link(link):
            break
        node_id = str(link[0])
        if "format" in _node(prompt, node_id)["inputs"]:
            return node_id
    raise NothingToShow("no node before this one quantizes")


def _node(prompt: Mapping[str, dict], node_id: str) -> dict:
    node = prompt.get(node_id) if isinstance(prompt, Mapping) else None
    if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
        raise NothingToShow(f"the graph has no node {node_id!r}")
    return node


def _source(prompt: Mapping[str, dict], node_id: str) -> tuple[str, str]:
    """(folder, name) of the file that a node is given, through nodes that hand a model on."""
    for depth in range(DEPTH):
        node = _node(prompt, node_id)
        inputs = node["inputs"]
        if node.get("class_type") in LOADERS:
            if depth and any(inputs.get(name, NONE) != NONE for name in MORE_FILES):
                raise NothingToShow("it comes from more than one file")
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


def _advised(prompt: Mapping[str, dict], inputs: dict, depth: int) -> io.NodeOutput:
    """What Format Advisor gives, which reads headers only."""
    wish = {name: inputs[name] for name in ADVICE_INPUTS if isinstance(inputs.get(name), str)}
    if _is_link(inputs.get("recipe")):
        wish["recipe"] = _draft(prompt, str(inputs["recipe"][0]), depth - 1)
    return FewBitsFormatAdvisor.execute(**wish)


def _goal(inputs: dict, path: Path) -> dict | None:
    """What a file is fitted to, in words and bytes; None where a link says it.

    Raises:
        RecipeError: not a size, or not an error.
    """
    wish = {name: inputs[name] for name in GOAL_INPUTS if name in inputs}
    if any(map(_is_link, wish.values())):
        return None
    with open_checkpoint(path) as source:
        whole = sum(spec.nbytes for spec in source.header.tensors.values())
    goal = goal_of(whole, **wish)
    return {"said": goal.said, "bytes": goal.bytes}


def _draft(prompt: Mapping[str, dict], node_id: str, depth: int) -> Draft:
    """The recipe of a chain of Layer Rules, whose inputs are all values, or of Format Advisor."""
    node = _node(prompt, node_id)
    if node.get("class_type") == FewBitsFormatAdvisor.__name__ and depth:
        return _advised(prompt, node["inputs"], depth).args[1]
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
