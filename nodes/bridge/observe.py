"""A model that is observed while ComfyUI samples with it, through ComfyUI's own wrappers."""

from __future__ import annotations

import comfy.patcher_extension

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
