"""`fewbits`: parse, one core call, print.

Exit 0 = complete and verified, 1 = problems found, 2 = refused, 130 = interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

from ..errors import RecipeError, closest
from ..version import VERSION
from .arguments import ARGUMENTS
from .door import run_command

# name -> what it does; the module of that name does it and is imported when it is asked to
COMMANDS = {
    "quantize": "write a quantized copy of a model",
    "calibrate": "how to make a calibration for the method gptq",
    "convert": "write a file in another dialect; codes stay as they are",
    "plan": "show what would happen to every layer; reads headers only",
    "inspect": "show family, layers per format, sizes and problems of a file",
    "verify": "decode and check every layer of a file",
    "compare": "how far the weights of one file are from another's, whatever their formats",
    "repair": "write a copy with every known mistake fixed that can be",
    "bench": "time every format on this machine, and say which kernel runs and why",
}
MODULES = {"inspect": "info"}  # inspect is a module of the standard library


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are one line, like all others; subparsers are of this class too, and
    get their arguments when they are used.
    """

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(
        self, *args: object, **kwargs: object
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.fill:
            fill, self.fill = self.fill, None
            fill(self)
        found, rest = super().parse_known_args(*args, **kwargs)
        if rest:  # here, and not after all parsers are done, the options of the command are known
            name = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
            guess = closest(name, self._option_string_actions)
            hint = f", did you mean {guess}?" if guess else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest

    def error(self, message: str) -> None:
        raise RecipeError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fewbits", description="Make models small and fast for ComfyUI.")
    parser.add_argument("--version", action="version", version=f"fewbits {VERSION}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, help in COMMANDS.items():
        command = subparsers.add_parser(name, help=help)
        command.fill = ARGUMENTS[name]
        command.set_defaults(command=name)
    return parser


def run_words(argv: list[str] | None = None) -> int | None:
    """Parse a command and run it; whoever calls deals with refusals."""
    args = build_parser().parse_args(argv)
    if hasattr(args, "check"):
        args.check(args)
    module = importlib.import_module(f".{MODULES.get(args.command, args.command)}", __package__)
    return module.run(args)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command("fewbits", lambda: run_words(argv))


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
