"""A model that is observed while ComfyUI samples with it, through ComfyUI's own wrappers; text
encoders while they encode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.patcher_extension
import comfy.sd
import torch

from ...quant_ops.calibration import Observer
from ...quant_ops.calibration.effects import energy

KEY = "fewbits_calibrate"
SIGMAS = 3  # their place among the arguments of a run
POSITIVE = 0  # ComfyUI's number for the prompt's part of a batch


def observed(model: object, observer: Observer) -> object:
    """A clone of a MODEL whose linear layers' inputs the observer sees; the model itself stays as
    it is. Where the observer measures effects, it is evaluated again for each layer.

    Hooks are on the layers only during a call of the diffusion model, so nothing is left when
    sampling ends, is cancelled or fails.
    """
    clone = model.clone()
    kinds = comfy.patcher_extension.WrappersMP

    def sample(executor: object, *args: object, **kwargs: object) -> object:
        sigmas = kwargs.get("sigmas", args[SIGMAS] if len(args) > SIGMAS else ())
        observer.start_run(max(len(sigmas) - 1, 0))
        return executor(*args, **kwargs)

    def apply(executor: object, *args: object, **kwargs: object) -> object:
        model = executor.class_obj.diffusion_model

        def call() -> object:
            return executor(*args, **_with_own_control(kwargs))

        with observer.watching(model):
            result = call()
        rows = _prompted(args[0], result, kwargs)
        if rows is not None and observer.effects.is_due():
            predicted = args[0][rows].float() - result[rows].float()  # noise, or velocity
            observer.measure(model, lambda: call()[rows], result[rows], energy(predicted))
        return result

    clone.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, sample)
    clone.add_wrapper_with_key(kinds.APPLY_MODEL, KEY, apply)
    return clone


def _prompted(x: torch.Tensor, result: object, kwargs: dict) -> slice | None:
    """The rows of a call that belong to the prompt; None where it has none, or what comes out is no
    counterpart of what goes in. Negative prompts count little, and are empty for many models.
    """
    kinds = kwargs.get("transformer_options", {}).get("cond_or_uncond", [POSITIVE])
    same = isinstance(result, torch.Tensor) and result.shape == x.shape
    if not same or POSITIVE not in kinds or len(x) % len(kinds):
        return None
    each, first = len(x) // len(kinds), kinds.index(POSITIVE)
    return slice(each * first, each * (first + 1))


def _with_own_control(kwargs: dict) -> dict:
    """The same with lists of its own: models take what a ControlNet gave out of them."""
    control = kwargs.get("control")
    if not isinstance(control, dict):
        return kwargs
    lists = {
        key: list(value) if isinstance(value, list) else value for key, value in control.items()
    }
    return {**kwargs, "control": lists}


def observed_clip(clip: comfy.sd.CLIP, observer: Observer) -> comfy.sd.CLIP:
    """A clone of a CLIP whose linear layers' inputs the observer sees, also through its own clones:
    with a LoRA, with fewer layers. The CLIP itself stays as it is. Each encoded text is a run.
    """
    return ObservedClip.of(clip.clone(), observer)


class ObservedClip(comfy.sd.CLIP):
    """ComfyUI has no wrappers around encoding, so its doors are these methods."""

    observer: Observer
    encoding = False  # one door may go through another

    @classmethod
    def of(cls, clone: comfy.sd.CLIP, observer: Observer) -> ObservedClip:
        clone.__class__ = cls
        clone.observer = observer
        return clone

    def clone(self, *args: object, **kwargs: object) -> ObservedClip:
        return self.of(super().clone(*args, **kwargs), self.observer)

    def encode_from_tokens(self, *args: object, **kwargs: object) -> object:
        with self._watching():
            return super().encode_from_tokens(*args, **kwargs)

    def encode_from_tokens_scheduled(self, *args: object, **kwargs: object) -> object:
        with self._watching():
            return super().encode_from_tokens_scheduled(*args, **kwargs)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        if self.encoding:
            yield
            return
        self.encoding = True
        self.observer.start_run()
        try:
            with self.observer.watching(self.cond_stage_model):
                yield
        finally:
            self.encoding = False
