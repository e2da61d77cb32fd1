"""A CLIP as a tensor source (LoRA and other weight patches applied), converted tensors as a new
CLIP, and files.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_ops.calibration import Calibration
from ...quant_ops.checkpoint.importers.source import open_checkpoint
from ...quant_ops.errors import CheckpointError
from ...quant_ops.pipeline import PlanFn, ProgressFn, quantize
from ...quant_ops.planning.recipe import Recipe
from ...quant_ops.report.report import Report
from ...quant_ops.sources import MemorySink, MemorySource, TensorSource
from ...quant_ops.spec import Header
from .kernels import use_kernels
from .seams.text_encoders import Made, made_by, misfits_named
from .weights import Entry, PatchedWeights, carry_over, refuse_unread, same_values

FILE_LOADERS = (
    "load_clip_model_patcher",
    "load_checkpoint_clip_patcher",
    "load_checkpoint_guess_config_clip_only",
)
PART = ".transformer."  # stands between a text encoder's name and the names in its file
MARKER = ".comfy_quant"


class ClipSource(PatchedWeights):
    """The text encoders of a CLIP under the names that ComfyUI gives them:
    `clip_l.transformer.text_model...`.
    """

    def __init__(self, clip: comfy.sd.CLIP, device: torch.device | str = "cpu"):
        self.clip, self.made = clip, made_by(clip)
        super().__init__(clip.patcher, clip.cond_stage_model, device)
        self._origins, warnings = _find_origins(clip.patcher)
        self.name = " + ".join(dict.fromkeys(origin.name for origin in self._origins)) or "CLIP"
        stored = _by_tail(self._origins)
        self._entries = {key: self._entry(key, stored) for key in self._state}
        specs = {key: self._spec(key, entry) for key, entry in self._entries.items()}
        self.header = Header(
            specs,
            {},
            warnings=warnings,
            fixed=self._fixed(self._entries),
            patched=self._patched(),
        )

    def read(self, name: str) -> torch.Tensor:
        # the pipeline reads in a thread of its own, outside ComfyUI's inference mode
        with torch.no_grad():
            return self._plain(self._entries[name])

    def rebuild(self, sink: MemorySink, kernels: bool) -> comfy.sd.CLIP:
        """The converted tensors as a new CLIP: tokenizer, clip skip, schedule and options are the
        old one's.

        Args:
            kernels: let quantized layers multiply with their own kernels.

        Raises:
            UnsupportedLayerError: a layer that ComfyUI would not read as quantized.
        """
        old = self.clip
        stored = MemorySource(sink.tensors, name=self.name, files=self.files)
        arguments = (stored, self.made, old.tokenizer, kernels)
        fresh = _build(*arguments, disable_dynamic=not old.patcher.is_dynamic())
        new = old.clone()
        new.cond_stage_model = fresh.cond_stage_model
        new.patcher = carry_over(old.patcher, fresh.patcher, (load_from_memory, arguments))
        if kernels:
            use_kernels(new.patcher)
        return new

    def _entry(self, key: str, stored: dict[str, list[tuple[TensorSource, str]]]) -> Entry:
        """Where the files have this tensor. Two files may name theirs alike: then the values
        tell.
        """
        weight = self._state[key]
        found = [
            (origin, name)
            for origin, name in stored.get(_tail(key), ())
            if origin.header.tensors[name].shape == tuple(weight.shape)
        ]
        if len(found) > 1:
            found = [
                (origin, name) for origin, name in found if same_values(origin.read(name), weight)
            ]
        if found:
            return Entry(key, *found[0])
        return Entry(key)


def load_from_memory(
    stored: MemorySource,
    made: Made,
    tokenizer: object,
    kernels: bool,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """The patcher of a CLIP from converted tensors; how ComfyUI makes further copies of it."""
    clip = _build(stored, made, tokenizer, kernels, disable_dynamic=disable_dynamic)
    return clip.patcher


def load_with_kernels(
    factory: object, arguments: tuple, disable_dynamic: bool = False
) -> ModelPatcher:
    """What ComfyUI's own factory makes, with the quantized kernels on."""
    patcher = factory(*arguments, disable_dynamic=disable_dynamic)
    use_kernels(patcher)
    return patcher


def load_files(paths: list[str], kind: str, *, on_cpu: bool, kernels: bool) -> comfy.sd.CLIP:
    """One to four text encoder files as a CLIP, by ComfyUI's own loader.

    Args:
        kind: a type of ComfyUI's loaders; one that only names a combination of files means the
            usual kind, as there.
        on_cpu: load and run it on the CPU.
    """
    options = (
        {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
        if on_cpu
        else {}
    )
    with misfits_named(f"{', '.join(Path(path).name for path in paths)} as {kind}"):
        clip = comfy.sd.load_clip(
            ckpt_paths=paths,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options=options,
        )
    if kernels:
        return with_kernels(clip)
    return clip


def load_checkpoint(
    path: str, *, kernels: bool
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, object]:
    """A checkpoint file as (MODEL, CLIP, VAE), by ComfyUI's own loader; CLIP is None where the file
    has none.
    """
    embeddings = folder_paths.get_folder_paths("embeddings")
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(
        path, output_vae=True, output_clip=True, embedding_directory=embeddings
    )[:3]
    return model, with_kernels(clip) if kernels and clip is not None else clip, vae


def with_kernels(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """The CLIP itself with the quantized kernels on, in its further copies too."""
    use_kernels(clip.patcher)
    init = clip.patcher.cached_patcher_init
    clip.patcher.cached_patcher_init = init and (load_with_kernels, init)
    return clip


def quantize_clip(
    clip: comfy.sd.CLIP,
    recipe: Recipe,
    *,
    kernels: bool,
    device: torch.device,
    calibration: Calibration | None,
    on_plan: PlanFn,
    on_progress: ProgressFn,
) -> tuple[comfy.sd.CLIP, Report]:
    """CLIP -> quantized CLIP; the one that came in stays as it is.

    Raises:
        QuantError: see `quantize`; and for a CLIP that is quantized already, or not built by
            ComfyUI itself.
    """
    with ClipSource(clip, device) as source:
        source.refuse_quantized("CLIP")
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
        return source.rebuild(sink, kernels), report


def _build(
    stored: MemorySource,
    made: Made,
    tokenizer: object,
    kernels: bool,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    target = types.SimpleNamespace(
        params=made.target.params, clip=made.target.clip, tokenizer=lambda **arguments: tokenizer
    )
    state = dict(stored.tensors)
    clip = comfy.sd.CLIP(
        target,
        parameters=comfy.utils.calculate_parameters(state),
        state_dict=state,
        model_options=made.model_options,
        disable_dynamic=disable_dynamic,
    )
    quantized = [name.removesuffix(MARKER) for name in stored.tensors if name.endswith(MARKER)]
    refuse_unread({base: base for base in quantized}, clip.cond_stage_model)
    if kernels:
        use_kernels(clip.patcher)
    return clip


def _find_origins(patcher: ModelPatcher) -> tuple[list[TensorSource], tuple[str, ...]]:
    """The files of a CLIP, and a warning for each that cannot be read any more."""
    factory, arguments = (getattr(patcher, "cached_patcher_init", None) or (None, ()))[:2]
    if factory is load_with_kernels:
        factory, arguments = arguments[:2]
    if factory is load_from_memory:
        return [arguments[0]], ()
    if getattr(factory, "__module__", None) != "comfy.sd" or factory.__name__ not in FILE_LOADERS:
        return [], ()
    paths = arguments[0] if isinstance(arguments[0], (list, tuple)) else [arguments[0]]
    origins, warnings = [], []
    for path in paths:
        try:
            origins.append(open_checkpoint(path))
        except CheckpointError as error:
            warnings.append(
                f"a file of the CLIP cannot be read again, so dtypes are those in memory ({error})"
            )
    return origins, tuple(warnings)


def _by_tail(origins: Iterable[TensorSource]) -> dict[str, list[tuple[TensorSource, str]]]:
    """Tail of a name -> the tensors that have it; a checkpoint has prefixes of its own before
    it.
    """
    found: dict[str, list[tuple[TensorSource, str]]] = {}
    for origin in origins:
        for name in origin.header.tensors:
            for tail in {name, _tail(name)}:
                found.setdefault(tail, []).append((origin, name))
    return found


def _tail(name: str) -> str:
    """`clip_l.transformer.a.weight` -> `a.weight`, the name in a text encoder's own file."""
    return name.partition(PART)[2] or name
