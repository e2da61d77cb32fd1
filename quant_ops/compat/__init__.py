"""The classic tool's command and API over the same engine: no logic of its own, two tables and a
converter.
"""

import importlib

from ..cli.door import run_command

# name -> its module, imported on first use, so that Ctrl-C meanwhile is an interrupt like any other
_HOMES = {
    "LearnedRoundingConverter": ".converter",
    "convert_fp8_scaled_to_comfy_quant": ".api",
    "convert_to_fp8_scaled": ".api",
    "quantize": ".api",
}
__all__ = [*_HOMES, "main"]


def main(argv: list[str] | None = None) -> int:
    """Run the classic command; returns the exit status: 0 complete, 2 refused, 130 interrupted."""

    def work() -> int | None:
        from .command import run

        return run(argv)

    return run_command("convert_to_quant", work)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
