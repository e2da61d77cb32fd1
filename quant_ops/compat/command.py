"""The classic command: its flags, and the equal `fewbits` command that runs. Torch is imported only
for that.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import chain

from ..cli.__main__ import run_words
from ..cli.door import warn
from ..errors import RecipeError, closest, visible
from ..version import VERSION
from .flags import FLAGS, SHORT, dashed, underscored

ABOUT = "The classic command and the functions that scripts call: flags in, a job out."


def run(argv: list[str] | None = None) -> int | None:
    """Run the classic command; returns what the equal `fewbits` command does."""
    flags = parse(sys.argv[1:] if argv is None else argv)
    from .job import make_job

    job = make_job(flags)
    for note in job.notes:
        warn(f"convert_to_quant: {note}")
    if not {"quiet", "json"} & set(job.options):
        print(f"+ {visible(shlex.join(['fewbits', *job.arguments]))}", flush=True)
    return run_words(list(job.arguments))


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> None:
        raise RecipeError(message)


def parse(argv: list[str]) -> dict[str, object]:
    """Command line -> flag values by name, as text; an unknown flag is refused with the closest
    one.
    """
    parser = _Parser(prog="convert_to_quant", description=ABOUT, allow_abbrev=False)
    parser.add_argument(
        "--version", action="version", version=f"convert_to_quant (FewBits {VERSION})"
    )
    for flag in FLAGS:
        short = [SHORT[flag.name]] if flag.name in SHORT else []
        name = {
            "dest": underscored(flag.name),
            "help": flag.help or None,
            "default": argparse.SUPPRESS,
        }
        if flag.value is bool:
            parser.add_argument(*short, *flag.spellings, action="store_true", **name)
        elif flag.without:
            parser.add_argument(*short, *flag.spellings, nargs="?", const=flag.without, **name)
        else:
            parser.add_argument(*short, *flag.spellings, **name)
    known, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].split("=")[0]
        spelled = list(map(dashed, chain(*(flag.spellings for flag in FLAGS))))
        guess = closest(dashed(name), spelled) if name.startswith("--") else None
        hint = f", did you mean {guess}?" if guess else "; see --help"
        raise RecipeError(f"unknown argument {rest[0]}{hint}")
    return vars(known)
