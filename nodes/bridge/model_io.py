"""A MODEL as a tensor source (LoRA and other weight patches applied), and converted tensors as a
new MODEL.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import PurePath

import comfy.model_base
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_ops.calibration import Calibration
from ...quant_ops.checkpoint.importers.source import open_checkpoint
from ...quant_ops.checkpoint.metadata import HEADER_KEY, parse_marker
from ...quant_ops.checkpoint.reader import tensor_text
from ...quant_ops.errors import CheckpointError, QuantError, UnsupportedLayerError
from ...quant_ops.pipeline import PlanFn, ProgressFn, ignore_progress, quantize, rewrite
from ...quant_ops.planning.recipe import Recipe
from ...quant_ops.report.report import Report
from ...quant_ops.sources import (
    MemorySink,
    MemorySource,
    TensorSink,
    TensorSource,
    spec_of,
)
from ...quant_ops.spec import ITEM_SIZES, Header, TensorSpec
from . import host
from .origin import Naming, Outside, Stored, read_outside
from .weights import Entry, PatchedWeights, carry_over, refuse_unread, same_values

# ComfyUI's loaders of MODELs -> whether they look beside the diffusion model
FILE_LOADERS = {
    "load_diffusion_model": False,
    "load_checkpoint_guess_config": True,
    "load_checkpoint_guess_config_model_only": True,
}
V_PREDICTION = comfy.model_base.ModelType.V_PREDICTION
# What ComfyUI read off a checkpoint beyond the weights, and could not read off the weights alone.
TRAITS = ("model_type", "model_sampling", "latent_format")
MARKER = ".comfy_quant"
NAMELESS = "MODEL"  # a source whose file is not known
LEGACY_MARKER = "scaled_fp8"  # a tensor that old FP8 files carry beside their layers


class ModelSource(PatchedWeights):
    """What ComfyUI would save for a MODEL, tensor by tensor.

    Where the file is known, names, order and metadata are the file's too. A MODEL made by `rebuild`
    has its stored tensors for a file. Without one, names and dtypes are the MODEL's, widest dtype
    first, then by name.

    Quantized layers are offered as stored (weight, weight_scale, marker). One that is patched is
    quantized again as ComfyUI does it when it loads the MODEL: same layout, stochastic rounding
    seeded by the layer's name.
    """

    PREFIX = "diffusion_model."  # of a MODEL's own names; a diffusion model file has none

    def __init__(self, patcher: ModelPatcher, device: torch.device | str = "cpu"):
        diffusion_model = getattr(patcher.model, "diffusion_model", None)
        if not isinstance(diffusion_model, torch.nn.Module):
            raise QuantError("this MODEL has no diffusion model inside; connect one from a loader")
        super().__init__(patcher, diffusion_model, device)
        self._origin, self._is_checkpoint, warnings = _find_origin(patcher)
        self._outside = Outside()
        self._origins = [self._origin] if self._origin else []
        self._pieces: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.name = self._origin.name if self._origin else NAMELESS
        self._entries = self._list_with_origin() if self._origin else self._list_alone()
        self._restore_markers()
        self._extra = self._unsaid()
        specs = {name: self._spec(name, entry) for name, entry in self._entries.items()}
        specs.update({name: spec_of(name, tensor) for name, tensor in self._extra.items()})
        metadata = self._origin.header.metadata if self._origin else {}
        # Which layers are quantized is what the MODEL says, not its file.
        metadata = {key: value for key, value in metadata.items() if key != HEADER_KEY}
        self.header = Header(
            specs,
            metadata,
            warnings=(*warnings, *self._rounded_again()),
            fixed=self._fixed({**self._entries, **{name: Entry(None) for name in self._extra}}),
            patched=self._patched(),
        )

    def read(self, name: str) -> torch.Tensor:
        if name in self._extra:
            return self._extra[name]
        entry = self._entries[name]
        key = entry.key
        # the pipeline reads in a thread of its own, outside ComfyUI's inference mode
        with torch.no_grad():
            if key is None:
                return entry.origin.read(entry.stored)
            base = self._quantized_base(key)
            if base is None:
                return self._plain(entry)
            if key.endswith(MARKER):
                return self._state[key]
            if self._patches(f"{base}.weight"):
                return self._requantized(base)[key]
            return self._state[key]

    def rebuild(self, sink: MemorySink) -> ModelPatcher:
        """The converted tensors as a new MODEL, with everything of the old one that is not a
        weight.

        Raises:
            UnsupportedLayerError: ComfyUI does not recognise the tensors, or a part of the old
                MODEL was replaced by another one (torch.compile, for example) that holds the old
                weights.
        """
        old = self.patcher
        stored = MemorySource(sink.tensors, sink.metadata, self.name, self.files)
        traits = {
            name: copy.deepcopy(getattr(old.model, name))
            for name in TRAITS
            if hasattr(old.model, name)
        }
        fresh = load_from_memory(stored, traits, disable_dynamic=not old.is_dynamic())
        if type(fresh.model) is not type(old.model):
            raise UnsupportedLayerError(
                f"{self.name}: ComfyUI takes the converted weights for another model "
                f"({type(fresh.model).__name__} instead of {type(old.model).__name__}); convert "
                "its file with Quantize File"
            )
        return carry_over(old, fresh, (load_from_memory, (stored, traits)), self.PREFIX)

    def _list_alone(self) -> dict[str, Entry]:
        def widest_first(key: str) -> tuple[int, str]:
            return -ITEM_SIZES[spec_of(key, self._state[key]).dtype], key

        return {key: Entry(key) for key in sorted(self._state, key=widest_first)}

    def _list_with_origin(self) -> dict[str, Entry]:
        """The origin's names in its order, then what only the MODEL has and would be lost."""
        naming = Naming(self.patcher.model.model_config, self._origin)
        stored = naming.stored()
        names = {tensor.key: tensor.short for tensor in stored if tensor.key in self._state}
        quantized = {
            names[f"{base}.weight"] for base in self.quantized if f"{base}.weight" in names
        }
        entries: dict[str, Entry] = {}
        covered = set(names)
        for tensor in stored:
            if tensor.key in self._state:
                entries[tensor.short] = Entry(tensor.key, self._origin, tensor.name)
            elif self._replaced and (tensor.key or "").startswith(self._replaced):
                continue  # a setting that a patch took away
            elif tensor.parts and not self._holds(naming, tensor):
                continue  # its parts are offered instead
            elif f"{tensor.short.rpartition('.')[0]}.weight" in quantized:
                continue  # a piece of a layer that ComfyUI spells in its own way
            elif tensor.short != LEGACY_MARKER:
                # ComfyUI may recognise the model by it, or make its parts of it again
                entries[tensor.short] = Entry(None, self._origin, tensor.name)
                covered.update(tensor.parts)
        parts = set().union(*(tensor.parts for tensor in stored))
        for key in self._state:
            base = self._quantized_base(key)
            if key in covered:
                continue
            if base is not None:  # a piece that the file spells differently
                weight = names.get(f"{base}.weight", f"{base}.weight")
                entries[f"{weight.removesuffix('weight')}{key[len(base) + 1 :]}"] = Entry(key)
            elif (
                key in parts or self._patches(key) or key.startswith(self._replaced)
            ):  # ComfyUI fills in what a file lacks
                entries[key] = Entry(key)
        self._outside = read_outside(naming.config, self._origin, naming.prefix)
        for name in self._outside.names if self._is_checkpoint else ():
            entries.setdefault(name, Entry(None, self._origin, name))
        return entries

    def _holds(self, naming: Naming, stored: Stored) -> bool:
        """Whether the MODEL has what ComfyUI makes of a stored tensor, unchanged and unpatched."""
        if any(key not in self._state or self._patches(key) for key in stored.parts):
            return False
        with torch.no_grad():
            made = naming.parts_of(stored, self._origin.read(stored.name))
        return all(same_values(tensor, self._state[key]) for key, tensor in made.items())

    def _restore_markers(self) -> None:
        """ComfyUI writes a marker again with the keys it knows; the origin's says more, if the
        format agrees.
        """
        for entry in self._entries.values():
            key = entry.key
            if key is None or entry.stored is None or not key.endswith(MARKER):
                continue
            original = entry.origin.read(entry.stored)
            base = key.removesuffix(MARKER)
            if _marker(base, original).get("format") == _marker(base, self._state[key]).get(
                "format"
            ):
                self._state[key] = original

    def _unsaid(self) -> dict[str, torch.Tensor]:
        """What the offered tensors alone would not tell ComfyUI about the MODEL."""
        model = self.patcher.model
        if self._origin is None:
            return self._saved_outside()
        if model.model_type != V_PREDICTION or "v_pred" in self._entries:
            return {}
        told = self._outside.model
        if told is not None and told.model_type == V_PREDICTION:
            return {}
        return {"v_pred": torch.empty(0)}

    def _saved_outside(self) -> dict[str, torch.Tensor]:
        """What ComfyUI itself adds when it saves, and what it will not do without."""
        model = self.patcher.model
        own, required = model.state_dict(), model.model_config.required_keys
        outside = {key: own[key] for key in required if key in own}
        outside.update(model.state_dict_for_saving({}))
        return {name: tensor.detach().cpu() for name, tensor in outside.items()}

    def _spec(self, name: str, entry: Entry) -> TensorSpec:
        if entry.key is not None and self._quantized_base(entry.key) is not None:
            return spec_of(name, self._state[entry.key])
        return super()._spec(name, entry)

    def _quantized_base(self, key: str) -> str | None:
        base, _, suffix = key.rpartition(".")
        if base in self.quantized and suffix != "bias":
            return base
        return None

    def _rounded_again(self) -> tuple[str, ...]:
        layers = [base for base in self.quantized if self._patches(f"{base}.weight")]
        if not layers:
            return ()
        return (
            f"{len(layers)} quantized layers carry a LoRA or another patch and are rounded a "
            "second time; for less error apply it to the original model and quantize the result",
        )

    def _requantized(self, base: str) -> dict[str, torch.Tensor]:
        """Stored tensors of a quantized layer after its patches. The layers come in order, so one
        is remembered.
        """
        if self._pieces[0] != base:
            module, device = self.quantized[base], self.patcher.load_device
            try:
                weight = self.patcher.patch_weight_to_device(
                    f"{self.PREFIX}{base}.weight", device, return_weight=True
                )
            except NotImplementedError:
                raise UnsupportedLayerError(
                    f"layer '{base}' carries a LoRA or another patch, and ComfyUI cannot make "
                    f"codes of {module.quant_format}: apply it to the original model"
                ) from None
            # shares everything but the table of parameters: the MODEL stays as it is
            twin = copy.copy(module)
            twin._parameters = {
                **module._parameters,
                "weight": torch.nn.Parameter(weight.to("cpu"), requires_grad=False),
            }
            self._pieces = (base, twin.state_dict(prefix=f"{base}."))
        return self._pieces[1]


def load_from_memory(
    stored: MemorySource, traits: dict[str, object], disable_dynamic: bool = False
) -> ModelPatcher:
    """A MODEL from converted tensors; also how ComfyUI makes further copies of it (other devices,
    no dynamic VRAM).
    """
    loaded = comfy.sd.load_diffusion_model_state_dict(
        dict(stored.tensors), metadata=dict(stored.header.metadata), disable_dynamic=disable_dynamic
    )
    if loaded is None:
        raise UnsupportedLayerError(
            f"{stored.name}: ComfyUI does not recognise the model after the conversion"
        )
    for name, value in traits.items():
        setattr(loaded.model, name, copy.deepcopy(value))
    naming = Naming(loaded.model.model_config, stored)
    quantized = {
        tensor.short.removesuffix(MARKER): (tensor.key or tensor.short).removesuffix(MARKER)
        for tensor in naming.stored()
        if tensor.short.endswith(MARKER)
    }
    refuse_unread(quantized, loaded.model.diffusion_model)
    return loaded


def load_file(path: str) -> ModelPatcher:
    """A diffusion model file as a MODEL, by ComfyUI's own loader; any dialect that ComfyUI reads
    with FewBits.
    """
    return comfy.sd.load_diffusion_model(path)


def quantize_model(
    patcher: ModelPatcher,
    recipe: Recipe,
    *,
    device: torch.device,
    calibration: Calibration | None = None,
    on_plan: PlanFn,
    on_progress: ProgressFn,
) -> tuple[ModelPatcher, Report]:
    """MODEL -> quantized MODEL; the one that came in stays as it is.

    Raises:
        QuantError: see `quantize`; and for a MODEL that is quantized already.
    """
    with ModelSource(patcher, device) as source:
        source.refuse_quantized("MODEL")
        sink = MemorySink()
        report = quantize(
            source,
            sink,
            recipe,
            device=device,
            calibration=calibration,
            on_plan=on_plan,
            on_progress=on_progress,
        )
        return source.rebuild(sink), report


def save_model(
    patcher: ModelPatcher,
    sink: TensorSink,
    *,
    on_plan: PlanFn,
    on_progress: ProgressFn = ignore_progress,
) -> Report:
    """MODEL -> file as it is: codes copied, weight patches baked, markers and metadata
    completed.
    """
    with ModelSource(patcher) as source:
        return rewrite(source, sink, on_plan=on_plan, on_progress=on_progress)


def automatic_name(patcher: ModelPatcher) -> str:
    """Where a MODEL is saved that nobody named: beside the diffusion models, after the file that it
    came from and the formats of its layers.
    """
    with ModelSource(patcher) as source:
        markers = [name for name in source.header.tensors if name.endswith(MARKER)]
        formats = Counter(
            _marker(name.removesuffix(MARKER), source.read(name))["format"] for name in markers
        )
        stem = PurePath(source.name).stem if source.name != NAMELESS else "model"
    return name_for(stem, formats)


def name_for(stem: str, formats: Counter[str]) -> str:
    """`automatic_name` for a file's stem, and how many layers have which format."""
    folder = host.output_folder("diffusion_models")
    if not formats:
        return f"{folder}/{stem}_saved"
    mark = formats.most_common(1)[0][0] + ("_mixed" if len(formats) > 1 else "")
    return f"{folder}/{stem.removesuffix(f'_{mark}')}_{mark}"


def _find_origin(patcher: ModelPatcher) -> tuple[TensorSource | None, bool, tuple[str, ...]]:
    """Where the MODEL's weights came from, whether as a checkpoint, and a warning if that cannot be
    read any more.
    """
    init = getattr(patcher, "cached_patcher_init", None)
    if init is None:
        return None, False, ()
    factory, arguments = init[:2]
    if factory is load_from_memory:
        return arguments[0], False, ()
    if factory.__module__ != "comfy.sd" or factory.__name__ not in FILE_LOADERS:
        return None, False, ()
    try:
        return open_checkpoint(arguments[0]), FILE_LOADERS[factory.__name__], ()
    except CheckpointError as error:
        warning = f"the MODEL's file cannot be read again, so dtypes are those in memory ({error})"
        return None, False, (warning,)


def _marker(base: str, tensor: torch.Tensor) -> dict:
    return parse_marker(base, tensor_text(tensor))
