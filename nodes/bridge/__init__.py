"""The only importer of ComfyUI's modules. `register()` installs formats and seams, `status()` says
how that went.

Nothing of ComfyUI is imported at module scope, so that this module can always report why it cannot
register.
"""

from __future__ import annotations

import logging

from ...quant_ops.version import VERSION

logger = logging.getLogger(__name__)

_STATUS: dict[str, str | None] = {}
_STAMP = "_fewbits_registration"


def register() -> None:
    """Make ComfyUI's own loaders read FewBits' formats. Idempotent; never raises.

    A seam that does not fit this ComfyUI disables itself with one log line and a reason in
    `status()`.
    """
    try:
        import comfy.quant_ops as core

        from . import compat
    # without this module there is nothing to register into; the nodes still load
    except Exception as error:
        _failed("comfy.quant_ops", error)
        return
    stamp = getattr(core, _STAMP, None)
    if stamp is not None:
        if stamp != (VERSION, __name__):
            logger.info("FewBits %s is registered already by %s; this copy is %s", *stamp, VERSION)
        return
    reason = compat.why_no_quantization()
    if reason:
        _STATUS["quantization"] = reason
        logger.warning("FewBits: %s", reason)
        return
    setattr(core, _STAMP, (VERSION, __name__))
    from .seams import SEAMS

    for name, install in SEAMS.items():
        try:
            install()
            _STATUS[name] = None
        # ComfyUI's internals changed: this seam is off, everything else goes on
        except Exception as error:
            _failed(name, error)


def status() -> dict[str, str | None]:
    """seam name -> None when it is installed, else why not. Empty before `register()` and for a
    second copy.
    """
    return dict(_STATUS)


def _failed(seam: str, error: Exception) -> None:
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "unknown"
    _STATUS[seam] = f"{type(error).__name__}: {error} (ComfyUI {version})"
    logger.warning(
        "FewBits: seam '%s' is off in ComfyUI %s: %s: %s",
        seam,
        version,
        type(error).__name__,
        error,
    )
