"""Weights that a ModelPatcher holds as a tensor source, its weight patches applied; and what a
converted copy keeps.
"""

from __future__ import annotations

import os
import types
import uuid
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_ops.checkpoint.diffusers import RenamedSource
from ...quant_ops.checkpoint.importers.source import ImportedSource
from ...quant_ops.checkpoint.labels import EMBEDDING
from ...quant_ops.checkpoint.reader import FileSource
from ...quant_ops.errors import QuantError, UnsupportedLayerError
from ...quant_ops.files import InputFile
from ...quant_ops.sources import TensorSource, spec_of
from ...quant_ops.spec import TensorSpec


@dataclass(frozen=True)
class Entry:
    """One offered tensor: its key in the module, and where it lies as it was before ComfyUI loaded
    it.
    """

    key: str | None  # None for a tensor of the origin that ComfyUI puts into no weight
    origin: TensorSource | None = None
    stored: str | None = None  # its name in the origin


class PatchedWeights:
    """The weights of a module, weight patches applied by ComfyUI's own code in float32.

    ComfyUI casts weights while loading (bf16 becomes float32 on a CPU), so a module alone does not
    say what its file held. Where the file is known, dtypes are the file's, and so are the bytes of
    every tensor that the module holds unchanged, cast or not. Subclasses say which tensors are
    offered, by `_list`.

    A patched tensor is float32 and may thus be wider than its header entry: it is quantized from
    float32, and rounded once if it is kept.

    `quantized` maps the base names of quantized layers to their modules.
    """

    PREFIX = ""  # of the patcher's keys, before the module's own

    def __init__(self, patcher: ModelPatcher, module: torch.nn.Module, device: torch.device | str):
        unload(patcher)
        self.patcher, self.device = patcher, torch.device(device)
        self._state = module.state_dict()
        self._modules = dict(module.named_modules())
        _refuse_foreign_tensors(self._state)
        self.quantized = quantized_layers(module)
        self._replaced = self._replace_settings()
        self._origins: list[TensorSource] = []

    @property
    def files(self) -> tuple[InputFile, ...]:
        """The files of the origins, and those that whatever loaded the model was called with.

        Origins stay in memory here, or are read again: whether a file changed is theirs to say.
        """
        loaders = getattr(self.patcher, "cached_patcher_init", None)
        named = tuple(InputFile(path) for path in _paths_in(loaders))
        return (*chain(*(origin.files for origin in self._origins)), *named)

    def __enter__(self) -> PatchedWeights:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for origin in self._origins:
            if isinstance(origin, (FileSource, ImportedSource, RenamedSource)):
                origin.close()

    def _replace_settings(self) -> tuple[str, ...]:
        """Put what patches made of modules without weights in place of what the module says.

        ComfyUI keeps such settings (which attention a block prefers) as tensors; a LoRA may bring
        others.

        Returns:
            The names of the replaced modules, each with its dot.
        """
        replaced = []
        for key, patch in self.patcher.object_patches.items():
            name = key.removeprefix(self.PREFIX)
            if not key.startswith(self.PREFIX) or not _is_setting(patch, self._modules.get(name)):
                continue
            prefix = f"{name}."
            for old in [old for old in self._state if old.startswith(prefix)]:
                del self._state[old]
            self._state.update(patch.state_dict(prefix=prefix))
            replaced.append(prefix)
        return tuple(replaced)

    def _fixed(self, entries: dict[str, Entry]) -> dict[str, str]:
        """Of the offered weights that no module takes quantized, why not: base name -> words."""
        bases = {name.removesuffix(".weight"): entry for name, entry in entries.items()}
        found = {
            base: why_plain(base, self._module(entry.key))
            for base, entry in bases.items()
            if f"{base}.weight" in entries
        }
        return {base: why for base, why in found.items() if why}

    def _module(self, key: str | None) -> torch.nn.Module | None:
        if key is None:
            return None
        return self._modules.get(key.rpartition(".")[0])

    def _patches(self, key: str) -> list | None:
        return self.patcher.patches.get(self.PREFIX + key)

    def _spec(self, name: str, entry: Entry) -> TensorSpec:
        stored = entry.origin.header.tensors[entry.stored] if entry.stored else None
        if entry.key is None:
            return TensorSpec(name, stored.dtype, stored.shape)
        own = spec_of(name, self._state[entry.key])
        shape = own.shape
        if patches := self._patches(entry.key):  # some LoRAs widen a layer
            shape = tuple(
                comfy.lora.calculate_shape(patches, self._state[entry.key], self.PREFIX + entry.key)
            )
        return TensorSpec(name, stored.dtype if stored else own.dtype, shape)

    def unpatched(self, name: str) -> torch.Tensor:
        """A tensor as it is without its patches: what a LoRA was baked into."""
        with torch.no_grad():
            return self._value(self._entries[name])

    def _patched(self) -> frozenset[str]:
        """The offered tensors that patches change."""
        named = self._entries.items()
        return frozenset(name for name, entry in named if entry.key and self._patches(entry.key))

    def _value(self, entry: Entry) -> torch.Tensor:
        """A tensor that is not quantized and not patched: the origin's bytes if the module holds
        its values.
        """
        weight = self._state[entry.key]
        if entry.stored is not None:
            original = entry.origin.read(entry.stored)
            # The file may have changed, or somebody edited the module in place: then the module
            # counts.
            if same_values(original, weight):
                return original
        return weight

    def _plain(self, entry: Entry) -> torch.Tensor:
        """`_value`, patched if need be; never the module's own tensor."""
        weight, value = self._state[entry.key], self._value(entry)
        patches = self._patches(entry.key)
        if not patches:
            if value is weight:
                return weight.clone()
            return value
        key = self.PREFIX + entry.key
        return comfy.lora.calculate_weight(
            patches, value.to(self.device, torch.float32, copy=True), key
        )

    def refuse_quantized(self, what: str) -> None:
        """Raise for weights that were rounded once.

        Raises:
            QuantError: it says which formats there are.
        """
        if self.quantized:
            formats = sorted({module.quant_format for module in self.quantized.values()})
            raise QuantError(
                f"{self.name}: the {what} is quantized already ({', '.join(formats)}, "
                f"{len(self.quantized)} layers); rounding twice loses quality: connect the "
                "original model"
            )


def _paths_in(arguments: object) -> Iterator[Path]:
    """Files that are named anywhere in (nested) arguments."""
    if isinstance(arguments, (list, tuple)):
        for argument in arguments:
            yield from _paths_in(argument)
    elif isinstance(arguments, (str, os.PathLike)) and os.path.isfile(arguments):
        yield Path(arguments)


def why_plain(base: str, module: torch.nn.Module | None) -> str | None:
    """Why ComfyUI cannot load the weight of a module quantized, or None when it can.

    Args:
        base: the layer's name; the tables that the formats know are known by it.
        module: None for a tensor that becomes no weight as it is.
    """
    if module is None:
        return "ComfyUI puts it into no layer as it is"
    castable = isinstance(module, comfy.ops.CastWeightBiasOp)
    if isinstance(module, torch.nn.Embedding):
        known = castable and EMBEDDING.fullmatch(base)
        if known:
            return None
        return "a lookup table"
    if castable and hasattr(module, "in_features"):
        return None
    return f"ComfyUI loads no {type(module).__name__} of this model quantized"


def refuse_unread(state: dict[str, str], module: torch.nn.Module) -> None:
    """Raise where ComfyUI took codes for weights, without a word: in modules that do not know about
    markers.

    Args:
        state: base name of a quantized layer -> its module's name.

    Raises:
        UnsupportedLayerError: the first such layer.
    """
    modules = dict(module.named_modules())
    for base, name in state.items():
        found = modules.get(name)
        if not isinstance(getattr(found, "weight", None), QuantizedTensor):
            raise UnsupportedLayerError(
                f"layer '{base}': ComfyUI reads it as plain numbers ({type(found).__name__}); keep "
                "this layer"
            )


def quantized_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers whose weight is stored as codes, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(getattr(part, "weight", None), QuantizedTensor)
    }


def is_side(key: str, quantized: Container[str]) -> bool:
    """A scale or the marker of a quantized layer."""
    base, _, name = key.rpartition(".")
    return base in quantized and name not in ("weight", "bias")


def same_values(original: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a weight is what ComfyUI makes of the original by moving and casting it."""
    return original.shape == weight.shape and torch.equal(
        original.to(weight.device, weight.dtype), weight
    )


def unload(patcher: ModelPatcher) -> None:
    """Take it off the device, so that its weights are the unpatched ones; ComfyUI loads it again on
    demand.
    """
    others = [
        loaded
        for loaded in comfy.model_management.current_loaded_models
        if loaded.model is None or loaded.model.model is not patcher.model
    ]
    comfy.model_management.free_memory(1e30, patcher.load_device, others)


def carry_over(
    old: ModelPatcher, fresh: ModelPatcher, init: tuple, prefix: str = ""
) -> ModelPatcher:
    """A patcher over the fresh weights with everything of the old one that is not a weight.

    Args:
        init: (factory, arguments) by which ComfyUI makes further copies of it.
        prefix: of the keys of weights; a part below it that was replaced by another module cannot
            be carried over.

    Raises:
        UnsupportedLayerError: a part was replaced by a module with weights of its own.
    """
    object_patches = _moved_patches(old, fresh.model, prefix)
    unload(fresh)  # ComfyUI calls a loaded model whose patcher is gone a memory leak
    new = old.clone(model_override=fresh.get_clone_model_override())
    new.patches, new.patches_uuid = {}, uuid.uuid4()  # they are in the codes now
    new.object_patches = object_patches
    new.size, new.parent = 0, None
    new.hook_backup, new.cached_hook_patches = {}, {}  # weights of the old model
    new.is_injected = False
    new.cached_patcher_init = init
    if hasattr(fresh, "clone_base_uuid"):  # 0.24 on: says which MODELs share weights
        new.clone_base_uuid = fresh.clone_base_uuid
    return new


def _refuse_foreign_tensors(state: dict[str, torch.Tensor]) -> None:
    for key, tensor in state.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedLayerError(
                f"layer '{key.rpartition('.')[0]}': its weight is a {type(tensor).__name__}, which "
                "only the node that loaded it can read; load a safetensors file instead"
            )


def _is_setting(patch: object, replaced: torch.nn.Module | None) -> bool:
    """Whether a patch is a module without weights in place of one without weights: a preference,
    not a layer. In place of a layer it may hold that layer's weights where nobody sees them.
    """
    modules = (patch, replaced)
    return all(isinstance(module, torch.nn.Module) for module in modules) and not any(
        map(_has_weights, modules)
    )


def _has_weights(module: torch.nn.Module) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return any(isinstance(t, QuantizedTensor) or t.is_floating_point() for t in tensors)


def _moved_patches(old: ModelPatcher, model: torch.nn.Module, prefix: str) -> dict[str, object]:
    """The object patches, with methods of the old model's modules bound to the new model's."""
    modules = dict(old.model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    moved = {}
    for key, patch in old.object_patches.items():
        owner = getattr(patch, "__self__", None)
        if id(owner) in names:
            patch = types.MethodType(patch.__func__, model.get_submodule(names[id(owner)]))
        elif (
            key.startswith(prefix.rstrip("."))
            and isinstance(patch, torch.nn.Module)
            and not _is_setting(patch, modules.get(key))
        ):
            raise UnsupportedLayerError(
                f"its part '{key}' was replaced by a {type(patch).__name__} with weights of its "
                "own (torch.compile does that): quantize first, then apply that node"
            )
        moved[key] = patch
    return moved
