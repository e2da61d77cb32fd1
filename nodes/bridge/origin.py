"""What ComfyUI makes of a file's tensors when it builds a model of them: names, parts, and what it
reads beside the diffusion model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import comfy.model_base
import comfy.model_detection
import torch

from ...quant_ops.sources import TORCH_DTYPES, TensorSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """One tensor of the diffusion model's part of a file.

    `key` is the weight that it becomes as it is; `parts` are those that ComfyUI cuts or reorders
    out of it. Neither, for a tensor that only says which model it is.
    """

    short: str  # without the checkpoint's prefix
    name: str  # in the file
    key: str | None = None
    parts: tuple[str, ...] = ()


class Naming:
    """A file's tensors under the names that a model config of ComfyUI gives them while loading.

    Found by sending stand-ins without data through ComfyUI's own renaming.
    """

    def __init__(self, config: object, origin: TensorSource):
        self.config, self.origin = config, origin
        tensors = origin.header.tensors
        self.prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
        if not any(name.startswith(self.prefix) for name in tensors):
            self.prefix = ""
        self._names = {
            name[len(self.prefix) :]: name for name in tensors if name.startswith(self.prefix)
        }
        self._stand_ins = {
            short: torch.empty(
                tensors[name].shape, dtype=TORCH_DTYPES[tensors[name].dtype], device="meta"
            )
            for short, name in self._names.items()
        }

    def stored(self) -> list[Stored]:
        """The tensors of the model's part, in the file's order."""
        made = self._renamed(self._stand_ins)
        keys = {id(tensor): key for key, tensor in made.items()}
        found = []
        for short, name in self._names.items():
            key = keys.get(id(self._stand_ins[short]))
            parts = () if key else self._parts(short, made)
            found.append(Stored(short, name, key, parts))
        return found

    def parts_of(self, stored: Stored, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ComfyUI makes of a tensor that it cuts or reorders: key -> values."""
        made = self._renamed({**self._stand_ins, stored.short: whole})
        return {key: made[key] for key in stored.parts}

    def _parts(self, short: str, made: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """The keys that are not made without this tensor."""
        others = {name: tensor for name, tensor in self._stand_ins.items() if name != short}
        try:
            without = self._renamed(others)
        except (KeyError, StopIteration):  # it is asked for by name, or others are cut by its shape
            if short in made:
                return (short,)
            return ()
        return tuple(key for key in made if key not in without)

    def _renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return copied(self.config).process_unet_state_dict(dict(tensors))


class Watched(dict):
    """A file as a state dict: tensors are read when they are asked for, and `asked` says which
    were.
    """

    def __init__(self, source: TensorSource):
        super().__init__(dict.fromkeys(source.header.tensors))
        self._source, self.asked = source, set()

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if found:
            self.asked.add(name)
        return found

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise KeyError(name)
        return self._source.read(name)

    def get(self, name: str, default: object = None) -> object:
        if name not in self:
            return default
        return self[name]

    def pop(self, name: str, *default: object) -> object:
        if name not in self and default:
            return default[0]
        tensor = self[name]
        del self[name]
        return tensor


@dataclass(frozen=True)
class Outside:
    """What ComfyUI reads of a checkpoint beside the weights of its diffusion model.

    `model` is what it builds of that, the diffusion model apart; None where it could not.
    """

    names: tuple[str, ...] = ()  # of tensors, in the file's order
    model: comfy.model_base.BaseModel | None = None


def read_outside(config: object, origin: TensorSource, prefix: str) -> Outside:
    """Which tensors of a checkpoint decide, or belong to, what surrounds the diffusion model.

    Args:
        config: ComfyUI's model config of the MODEL.
        prefix: of the diffusion model's tensors in the checkpoint.
    """
    watched = Watched(origin)
    for key in config.required_keys:
        watched.get(key.format(prefix))
    shell = copied(config)
    shell.unet_config["disable_unet_model_creation"] = True
    model = None
    try:
        model = shell.get_model(watched, prefix, device="cpu")
    # a config that cannot do without its diffusion model; the caller compares what it built later
    except Exception as error:
        logger.debug("FewBits: %s alone: %s", type(config).__name__, error)
    asked = {name for name in watched.asked if not (prefix and name.startswith(prefix))}
    return Outside(tuple(name for name in origin.header.tensors if name in asked), model)


def copied(config: object) -> object:
    """A model config that may keep notes of its own (it refuses copy.copy)."""
    twin = object.__new__(type(config))
    twin.__dict__.update(config.__dict__)
    twin.unet_config = dict(config.unet_config)
    twin.sampling_settings = dict(config.sampling_settings)
    return twin
