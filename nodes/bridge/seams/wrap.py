"""`wrap`: how every seam takes hold of a function of ComfyUI."""

from __future__ import annotations

import functools
from collections.abc import Callable

MARK = "_fewbits_wrapped"


def wrap(owner: object, name: str, around: Callable) -> None:
    """Put `around` about the function `owner.name`, once.

    `functools.wraps` copies the mark: another pack's wrapper over ours, made with it, is not
    wrapped again. The original stays reachable as `__wrapped__`.

    Args:
        owner: module or class through which ComfyUI looks the function up at every call.
        around: called as `around(original, *args, **kwargs)`; decides what of the original runs.

    Raises:
        AttributeError: this ComfyUI has no such function.
    """
    original = getattr(owner, name)
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def wrapped(*args: object, **kwargs: object) -> object:
        return around(original, *args, **kwargs)

    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)
