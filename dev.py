#!/usr/bin/env python3
"""Everything a developer runs. Python's standard library only.

    python3 dev.py demo                 the emoji model quantized, sampled by ComfyUI: demo_output/
    python3 dev.py test [pytest args]   all tests on CPU, real ComfyUI included
    python3 dev.py test --fast          those that start no ComfyUI and take no time
    python3 dev.py comfy [--port N]     ComfyUI with the pack and the emoji model, to click in
    python3 dev.py bench [NAME] [args]  a script of tests/benchmarks; without a name their list
    python3 dev.py lint                 ruff: check and format

The first run downloads the pinned ComfyUI and makes a virtual environment, both in a cache folder
(FEWBITS_CACHE, or the platform's own); nothing else outside this checkout is touched. COMFYUI_DIR
names a ComfyUI of your own instead, COMFYUI_PYTHON its interpreter; both stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))
from support.environment import Environment, Failed  # noqa: E402

MINIMUM_PYTHON = (3, 10)
LANES = ("fast", "browser", "faults", "matrix")  # options of `test` that tests/conftest.py has too
MOST_WORKERS = 4  # each starts two ComfyUI for the end-to-end tests
WORKER_GB = 5  # a worker, the ComfyUI that it started and the commands that it runs
# pytest arguments that ask for one process, or say how many
ONE_PROCESS = ("-n", "--numprocesses", "--pdb", "--co", "--collect-only")


def main(arguments: list[str] | None = None) -> int:
    parser = command_line()
    args, rest = parser.parse_known_args(arguments)
    # paths and pip's messages, on a Windows console of any code page
    sys.stdout.reconfigure(errors="replace")
    if rest and args.command not in ("test", "bench"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if sys.version_info < MINIMUM_PYTHON:
        print(
            f"dev.py: Python {platform.python_version()} is too old; 3.10 or newer is needed",
            file=sys.stderr,
        )
        return 2
    try:
        environment = Environment(page=args.command == "comfy")
        return COMMANDS[args.command](environment, args, rest)
    except (Failed, OSError) as failure:
        print(f"dev.py: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dev.py: interrupted", file=sys.stderr)
        return 130


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, allow_abbrev=False)

    command("demo", "pictures and a table in demo_output/")
    test = command("test", "pytest on CPU; other arguments go to pytest")
    test.add_argument("--fast", action="store_true", help="no ComfyUI is started, nothing slow")
    test.add_argument(
        "--browser", action="store_true", help="also the tests of the page, in headless Chromium"
    )
    test.add_argument(
        "--frontend", metavar="VERSION", help="with --browser: this version of the page, as 1.58.1"
    )
    test.add_argument(
        "--fuzz", metavar="SECONDS", help="only the fuzzers, each for so long, with a new seed"
    )
    test.add_argument("--faults", action="store_true", help="only the faults, all of them")
    test.add_argument(
        "--matrix", action="store_true", help="every model class of ComfyUI in every format"
    )
    comfy = command("comfy", "start ComfyUI with the pack")
    comfy.add_argument(
        "--port", type=int, default=8188, help="default 8188; a free one if that is taken"
    )
    command("bench", "NAME: speed and memory; other arguments go to the script")
    command("lint", "ruff check and ruff format --check")
    return parser


def demo(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return env.python("-m", "support.harness.demo", "demo_output")


def test(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    """tests/conftest.py says what its options choose."""
    if not args.fast:
        env.fetch_older_trees()
    if args.frontend:
        env.use_frontend(args.frontend)
    options = [f"--{name}" for name in LANES if getattr(args, name)]
    options += [f"--fuzz={args.fuzz}"] if args.fuzz else []
    return env.python("-m", "pytest", *options, *side_by_side(env, rest), *rest)


def side_by_side(env: Environment, rest: list[str]) -> list[str]:
    """pytest's arguments for as many workers as fit; one process where the caller chose."""
    chosen = any(argument.split("=")[0] in ONE_PROCESS for argument in rest)
    chosen = chosen or any((ROOT / argument.split("::")[0]).exists() for argument in rest)
    workers = 1 if chosen else worker_count()
    if workers == 1:
        return []
    env.variables["OMP_NUM_THREADS"] = str(max(1, core_count() // workers))
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]


def worker_count() -> int:
    return max(1, min(core_count(), int(memory_gb() // WORKER_GB), MOST_WORKERS))


def core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb() -> float:
    """Of this machine; where the system does not say, as much as two workers take."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError):  # Windows
        return 2 * WORKER_GB


def comfy(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return env.python("-m", "support.harness.serve", str(args.port))


def bench(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    scripts = {path.stem: path for path in sorted((ROOT / "tests/benchmarks").glob("*.py"))}
    name, *arguments = rest or [None]
    if name in scripts:
        return env.python(f"tests/benchmarks/{name}.py", *arguments)
    for known, path in scripts.items():
        print(f"{known:<16} {first_line(path)}")
    if name is None:
        return 0
    raise Failed(f"bench {name}: no such script; those above are in tests/benchmarks")


def first_line(script: Path) -> str:
    """What a script says of itself."""
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))).splitlines()[0]


def lint(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return max(env.python("-m", "ruff", "check"), env.python("-m", "ruff", "format", "--check"))


COMMANDS = {"demo": demo, "test": test, "comfy": comfy, "bench": bench, "lint": lint}


if __name__ == "__main__":
    sys.exit(main())
