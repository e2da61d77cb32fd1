"""A MODEL as a tensor source (LoRA and other weight patches applied), and converted tensors as a new MODEL."""

from __future__ import annotations

import copy
import logging
import types
import uuid

import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_ops.checkpoint.importers.source import ImportedSource, open_checkpoint
from ...quant_ops.checkpoint.metadata import HEADER_KEY, parse_marker
from ...quant_ops.checkpoint.reader import FileSource, tensor_bytes
from ...quant_ops.errors import CheckpointError, QuantError, UnsupportedLayerError
from ...quant_ops.pipeline import PlanFn, ProgressFn, ignore_progress, quantize
from ...quant_ops.planning.recipe import Recipe
from ...quant_ops.report.report import Report
from ...quant_ops.sources import TORCH_DTYPES, MemorySink, MemorySource, TensorSink, TensorSource, spec_of
from ...quant_ops.spec import ITEM_SIZES, Header, TensorSpec

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # of a MODEL's own names; a diffusion model file has none
FILE_LOADERS = ("load_diffusion_model", "load_checkpoint_guess_config", "load_checkpoint_guess_config_model_only")
# What ComfyUI read off a checkpoint beyond the weights, and could not read off the weights alone.
TRAITS = ("model_type", "model_sampling", "latent_format")
MARKER = ".comfy_quant"
LEGACY_MARKER = "scaled_fp8"  # a tensor that old FP8 files carry beside their layers


class ModelSource:
    """What ComfyUI would save for a MODEL, tensor by tensor, weight patches applied by ComfyUI's own code in float32.

    ComfyUI casts weights while loading (bf16 becomes float32 on a CPU), so a MODEL alone does not say what its file
    held. Where the file is known, names, order, dtypes and metadata are the file's, and so are the bytes of every
    tensor that the MODEL holds unchanged, cast or not. A MODEL made by `rebuild` has its stored tensors for a file.
    Without one, names and dtypes are the MODEL's, widest dtype first, then by name.

    A patched tensor is float32 and may thus be wider than its header entry: it is quantized from float32, and rounded
    once if it is kept. A patched layer that is quantized already is quantized again as ComfyUI does it when it loads
    the MODEL: same layout, stochastic rounding seeded by the layer's name.

    `quantized` maps the base names of quantized layers, which are offered as stored (weight, weight_scale, marker).
    """

    def __init__(self, patcher: ModelPatcher, device: torch.device | str = "cpu"):
        diffusion_model = getattr(patcher.model, "diffusion_model", None)
        if not isinstance(diffusion_model, torch.nn.Module):
            raise QuantError("this MODEL has no diffusion model inside; connect one from a loader")
        _unload(patcher)
        self.patcher, self.device = patcher, torch.device(device)
        self._state = diffusion_model.state_dict()
        _refuse_foreign_tensors(self._state)
        self.quantized = {
            name: module
            for name, module in diffusion_model.named_modules()
            if isinstance(getattr(module, "weight", None), QuantizedTensor)
        }
        self._origin, warnings = _find_origin(patcher)
        self._pieces: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.name = self._origin.name if self._origin else "MODEL"
        # offered name -> (key in the MODEL or None, name in the origin or None)
        self._entries = self._list_with_origin() if self._origin else self._list_alone()
        self._restore_markers()
        self._extra = self._detection_keys()
        specs = {name: self._spec(name, *entry) for name, entry in self._entries.items()}
        specs.update({name: spec_of(name, tensor) for name, tensor in self._extra.items()})
        metadata = self._origin.header.metadata if self._origin else {}
        # Which layers are quantized is what the MODEL says, not its file.
        metadata = {key: value for key, value in metadata.items() if key != HEADER_KEY}
        self.header = Header(specs, metadata, warnings=(*warnings, *self._rounded_again()))

    def __enter__(self) -> ModelSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if isinstance(self._origin, (FileSource, ImportedSource)):
            self._origin.close()

    def read(self, name: str) -> torch.Tensor:
        if name in self._extra:
            return self._extra[name]
        key, stored = self._entries[name]
        with torch.no_grad():  # the pipeline reads in a thread of its own, outside ComfyUI's inference mode
            if key is None:
                return self._origin.read(stored)
            base = self._quantized_base(key)
            if base is None:
                return self._plain(key, stored)
            if key.endswith(MARKER):
                return self._state[key]
            return self._requantized(base)[key] if self._patches(f"{base}.weight") else self._state[key]

    def rebuild(self, sink: MemorySink) -> ModelPatcher:
        """The converted tensors as a new MODEL, with everything of the old one that is not a weight.

        Raises:
            UnsupportedLayerError: ComfyUI does not recognise the tensors, or a part of the old MODEL was replaced by
                another one (torch.compile, for example) that holds the old weights.
        """
        old = self.patcher
        stored = MemorySource(sink.tensors, sink.metadata, self.name)
        traits = {name: copy.deepcopy(getattr(old.model, name)) for name in TRAITS if hasattr(old.model, name)}
        fresh = load_from_memory(stored, traits, disable_dynamic=not old.is_dynamic())
        object_patches = _moved_patches(old, fresh.model)
        new = old.clone(model_override=fresh.get_clone_model_override())
        new.patches, new.patches_uuid = {}, uuid.uuid4()  # they are in the codes now
        new.object_patches = object_patches
        new.size, new.parent = 0, None
        new.hook_backup, new.cached_hook_patches = {}, {}  # weights of the old model
        new.is_injected = False
        new.cached_patcher_init = (load_from_memory, (stored, traits))
        if hasattr(fresh, "clone_base_uuid"):  # 0.24 on: says which MODELs share weights
            new.clone_base_uuid = fresh.clone_base_uuid
        return new

    def _list_alone(self) -> dict[str, tuple[str | None, str | None]]:
        def widest_first(key: str) -> tuple[int, str]:
            return -ITEM_SIZES[spec_of(key, self._state[key]).dtype], key

        return {key: (key, None) for key in sorted(self._state, key=widest_first)}

    def _list_with_origin(self) -> dict[str, tuple[str | None, str | None]]:
        """The origin's names in its order, then what only the MODEL has and would be lost."""
        entries: dict[str, tuple[str | None, str | None]] = {}
        keys = _keys_of(self.patcher, self._origin.header)
        names = {key: short for short, _, key in keys if key in self._state}
        quantized = {names[f"{base}.weight"] for base in self.quantized if f"{base}.weight" in names}
        for short, stored, key in keys:
            if key in self._state:
                entries[short] = (key, stored)
            elif f"{short.rpartition('.')[0]}.weight" not in quantized and short != LEGACY_MARKER:
                entries[short] = (None, stored)  # no weight, but ComfyUI may recognise the model by it
        # ComfyUI fills in what a file lacks. But tensors lacking on both sides mean that it built some from others.
        unknown = [short for short, (key, _) in entries.items() if key is None]
        lacking = [key for key in self._state if key not in names]
        derived = bool(unknown) and any(self._quantized_base(key) is None for key in lacking)
        for short in unknown if derived else ():
            del entries[short]
        for key in lacking:
            base = self._quantized_base(key)
            if base is not None:  # a piece that the file spells differently
                weight = names.get(f"{base}.weight", f"{base}.weight")
                entries[f"{weight.removesuffix('weight')}{key[len(base) + 1 :]}"] = (key, None)
            elif derived or self._patches(key):
                entries[key] = (key, None)
        return entries

    def _restore_markers(self) -> None:
        """ComfyUI writes a marker again with the keys it knows; the origin's says more, as long as the format agrees."""
        for key, stored in self._entries.values():
            if key is None or stored is None or not key.endswith(MARKER):
                continue
            original = self._origin.read(stored)
            base = key.removesuffix(MARKER)
            if _marker(base, original).get("format") == _marker(base, self._state[key]).get("format"):
                self._state[key] = original

    def _detection_keys(self) -> dict[str, torch.Tensor]:
        """What ComfyUI itself adds when it saves, because the weights alone would not say it."""
        v_prediction = getattr(self.patcher.model, "model_type", None) == comfy.model_base.ModelType.V_PREDICTION
        return {"v_pred": torch.empty(0)} if v_prediction and "v_pred" not in self._entries else {}

    def _spec(self, name: str, key: str | None, stored: str | None) -> TensorSpec:
        if key is None:
            return TensorSpec(name, *_dtype_and_shape(self._origin.header.tensors[stored]))
        own = spec_of(name, self._state[key])
        if self._quantized_base(key) is not None:
            return own
        shape = own.shape
        if patches := self._patches(key):  # some LoRAs widen a layer
            shape = tuple(comfy.lora.calculate_shape(patches, self._state[key], PREFIX + key))
        return TensorSpec(name, self._origin.header.tensors[stored].dtype if stored else own.dtype, shape)

    def _quantized_base(self, key: str) -> str | None:
        base, _, suffix = key.rpartition(".")
        return base if base in self.quantized and suffix != "bias" else None

    def _patches(self, key: str) -> list | None:
        return self.patcher.patches.get(PREFIX + key)

    def _rounded_again(self) -> tuple[str, ...]:
        layers = [base for base in self.quantized if self._patches(f"{base}.weight")]
        if not layers:
            return ()
        return (
            f"{len(layers)} quantized layers carry a LoRA or another patch and are rounded a second time; for less "
            "error apply it to the original model and quantize the result",
        )

    def _plain(self, key: str, stored: str | None) -> torch.Tensor:
        weight = self._state[key]
        value = weight
        if stored is not None:
            original = self._origin.read(stored)
            # The file may have changed, or somebody edited the MODEL in place: then the MODEL counts.
            if torch.equal(original.to(weight.device, weight.dtype), weight):
                value = original
        patches = self._patches(key)
        if not patches:
            return weight.clone() if value is weight else value
        return comfy.lora.calculate_weight(patches, value.to(self.device, torch.float32, copy=True), PREFIX + key)

    def _requantized(self, base: str) -> dict[str, torch.Tensor]:
        """Stored tensors of a quantized layer after its patches. The layers come in order, so one is remembered."""
        if self._pieces[0] != base:
            module, device = self.quantized[base], self.patcher.load_device
            weight = self.patcher.patch_weight_to_device(f"{PREFIX}{base}.weight", device, return_weight=True)
            twin = copy.copy(module)  # shares everything but the table of parameters: the MODEL stays as it is
            twin._parameters = {
                **module._parameters,
                "weight": torch.nn.Parameter(weight.to("cpu"), requires_grad=False),
            }
            self._pieces = (base, twin.state_dict(prefix=f"{base}."))
        return self._pieces[1]


def load_from_memory(stored: MemorySource, traits: dict[str, object], disable_dynamic: bool = False) -> ModelPatcher:
    """A MODEL from converted tensors; also how ComfyUI makes further copies of it (other devices, no dynamic VRAM)."""
    loaded = comfy.sd.load_diffusion_model_state_dict(
        dict(stored.tensors), metadata=dict(stored.header.metadata), disable_dynamic=disable_dynamic
    )
    if loaded is None:
        raise UnsupportedLayerError(f"{stored.name}: ComfyUI does not recognise the model after the conversion")
    for name, value in traits.items():
        setattr(loaded.model, name, copy.deepcopy(value))
    return loaded


def load_file(path: str) -> ModelPatcher:
    """A diffusion model file as a MODEL, by ComfyUI's own loader; any dialect that ComfyUI reads with FewBits."""
    return comfy.sd.load_diffusion_model(path)


def quantize_model(
    patcher: ModelPatcher, recipe: Recipe, *, device: torch.device, on_plan: PlanFn, on_progress: ProgressFn
) -> tuple[ModelPatcher, Report]:
    """MODEL -> quantized MODEL; the one that came in stays as it is.

    Raises:
        QuantError: see `quantize`; and for a MODEL that is quantized already.
    """
    with ModelSource(patcher, device) as source:
        if source.quantized:
            formats = sorted({module.quant_format for module in source.quantized.values()})
            raise QuantError(
                f"{source.name}: the MODEL is quantized already ({', '.join(formats)}, {len(source.quantized)} layers)"
                "; rounding twice loses quality: connect the original model"
            )
        sink = MemorySink()
        report = quantize(source, sink, recipe, device=device, on_plan=on_plan, on_progress=on_progress)
        return source.rebuild(sink), report


def save_model(
    patcher: ModelPatcher, sink: TensorSink, *, on_plan: PlanFn, on_progress: ProgressFn = ignore_progress
) -> Report:
    """MODEL -> file as it is: codes copied, weight patches baked, markers and metadata completed."""
    with ModelSource(patcher) as source:
        return quantize(source, sink, Recipe(primary=None), on_plan=on_plan, on_progress=on_progress)


def _unload(patcher: ModelPatcher) -> None:
    """Take the MODEL off the device, so that its weights are the unpatched ones; ComfyUI loads it again on demand."""
    others = [
        loaded
        for loaded in comfy.model_management.current_loaded_models
        if loaded.model is None or loaded.model.model is not patcher.model
    ]
    comfy.model_management.free_memory(1e30, patcher.load_device, others)


def _refuse_foreign_tensors(state: dict[str, torch.Tensor]) -> None:
    for key, tensor in state.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedLayerError(
                f"layer '{key.rpartition('.')[0]}': its weight is a {type(tensor).__name__}, which only the node that "
                "loaded the MODEL can read; load a safetensors file instead"
            )


def _find_origin(patcher: ModelPatcher) -> tuple[TensorSource | None, tuple[str, ...]]:
    """Where the MODEL's weights came from, and a warning if that cannot be read any more."""
    init = getattr(patcher, "cached_patcher_init", None)
    if init is None:
        return None, ()
    factory, arguments = init[:2]
    if factory is load_from_memory:
        return arguments[0], ()
    if factory.__module__ != "comfy.sd" or factory.__name__ not in FILE_LOADERS:
        return None, ()
    try:
        return open_checkpoint(arguments[0]), ()
    except CheckpointError as error:
        return None, (f"the MODEL's file cannot be read again, so dtypes are those in memory ({error})",)


def _keys_of(patcher: ModelPatcher, header: Header) -> list[tuple[str, str, str | None]]:
    """(name without the checkpoint's prefix, name in the file, key in the MODEL) for each tensor of the model's part.

    The key is None where ComfyUI does not put the file's tensor into the MODEL as it is. It is found by sending
    stand-ins without data through ComfyUI's own renaming.
    """
    prefix = comfy.model_detection.unet_prefix_from_state_dict(header.tensors)
    part = {name: name[len(prefix) :] for name in header.tensors if name.startswith(prefix)}
    part = part or {name: name for name in header.tensors}
    stand_ins = {}
    for name, short in part.items():
        dtype, shape = _dtype_and_shape(header.tensors[name])
        stand_ins[short] = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
    config = object.__new__(type(patcher.model.model_config))  # a copy (it refuses copy.copy): some families keep notes
    config.__dict__.update(patcher.model.model_config.__dict__)  # in it while they rename
    keys = {id(tensor): key for key, tensor in config.process_unet_state_dict(dict(stand_ins)).items()}
    return [(short, name, keys.get(id(stand_ins[short]))) for name, short in part.items()]


def _marker(base: str, tensor: torch.Tensor) -> dict:
    return parse_marker(base, bytes(tensor_bytes(tensor.detach().cpu())))


def _dtype_and_shape(spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    return spec.dtype, spec.shape


def _moved_patches(old: ModelPatcher, model: torch.nn.Module) -> dict[str, object]:
    """The object patches, with methods of the old model's modules bound to the new model's."""
    names = {id(module): name for name, module in old.model.named_modules()}
    moved = {}
    for key, patch in old.object_patches.items():
        owner = getattr(patch, "__self__", None)
        if id(owner) in names:
            patch = types.MethodType(patch.__func__, model.get_submodule(names[id(owner)]))
        elif key.startswith(PREFIX.rstrip(".")) and isinstance(patch, torch.nn.Module):
            raise UnsupportedLayerError(
                f"the MODEL's part '{key}' was replaced by a {type(patch).__name__} with weights of its own "
                "(torch.compile does that): quantize first, then apply that node"
            )
        moved[key] = patch
    return moved
