"""`fewbits`: parse, one core call, print.

Exit 0 = complete and verified, 1 = problems found, 2 = refused, 130 = interrupted.
"""

from __future__ import annotations

import argparse
import sys

from ..errors import QuantError, RecipeError, closest
from ..version import VERSION
from . import bench, convert, info, plan, quantize, repair, verify
from .common import with_flag


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are one line, like all others; subparsers are of this class too."""

    def parse_known_args(
        self, *args: object, **kwargs: object
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(*args, **kwargs)
        if rest:  # here, and not after all parsers are done, the options of the command are known
            name = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
            guess = closest(name, self._option_string_actions)
            hint = f", did you mean {guess}?" if guess else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest

    def error(self, message: str) -> None:
        raise RecipeError(f"{message}; see {self.prog} --help")


COMMANDS = (quantize, convert, plan, info, verify, repair, bench)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fewbits", description="Make models small and fast for ComfyUI.")
    parser.add_argument("--version", action="version", version=f"fewbits {VERSION}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        return args.run(args) or 0
    except QuantError as error:
        print(f"fewbits: {with_flag(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewbits: interrupted; nothing was written", file=sys.stderr)
        return 130


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
