"""A model that is observed while ComfyUI samples with it, through ComfyUI's own wrappers; text
encoders while they encode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.patcher_extension
import comfy.sd

from ...quant_ops.calibration import Observer

KEY = "fewbits_calibrate"


def observed(model: object, observer: Observer) -> object:
    """A clone of a MODEL whose linear layers' inputs the observer sees; the model itself stays as
    it is.

    Hooks are on the layers only during a call of the diffusion model, so nothing is left when
    sampling ends, is cancelled or fails.
    """
    clone = model.clone()
    kinds = comfy.patcher_extension.WrappersMP

    def sample(executor: object, *args: object, **kwargs: object) -> object:
        observer.start_run()
        return executor(*args, **kwargs)

    def apply(executor: object, *args: object, **kwargs: object) -> object:
        with observer.watching(executor.class_obj.diffusion_model):
            return executor(*args, **kwargs)

    clone.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, sample)
    clone.add_wrapper_with_key(kinds.APPLY_MODEL, KEY, apply)
    return clone


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
