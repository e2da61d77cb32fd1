"""Installed from a wheel, editable, or not at all: one top-level package, everything in it, versions that agree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fewbits.quant_ops.spec import SUPPORTED_COMFYUI
from fewbits.quant_ops.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "tests" / "assets" / "emoji" / "emoji_flux.safetensors"
TEXT = {"capture_output": True, "text": True, "timeout": 120}
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_package_list_is_the_tree():
    listed = set(re.findall(r'^ {4}"((?:fewbits|convert_to_quant)[\w.]*)",$', PYPROJECT, re.M))
    found = {
        "fewbits",
        "fewbits.compat",
        "convert_to_quant",
    }  # the last two are aliases, see package-dir
    for room in ("kernels", "nodes", "quant_ops"):
        folders = [ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())]
        packages = [f.relative_to(ROOT) for f in folders if (f / "__init__.py").is_file()]
        found |= {".".join(("fewbits", *f.parts)) for f in packages if "installed" not in f.parts}
    assert listed == found


def test_versions_agree():
    assert f'version = "{VERSION}"' in PYPROJECT
    assert f'requires-comfyui = ">={SUPPORTED_COMFYUI}"' in PYPROJECT


def test_requirements_leave_torch_and_comfy_kitchen_to_comfyui():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert not {"torch", "comfy-kitchen", "comfyui-frontend-package", "triton"} & set(names)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the pack's files, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "ComfyUI-FewBits"
    ignore = shutil.ignore_patterns(
        ".git", "tests", "demo_output", "__pycache__", "build", "*.egg-info", ".venv"
    )
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def pip(python, *arguments):
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    result = subprocess.run(
        [str(python), "-m", "pip", arguments[0], "-q", *offline, *map(str, arguments[1:])], **TEXT
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "-w", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source, tmp_path_factory):
    """(python, script folder) of an environment with the pack installed, above the one that runs the tests."""
    environment = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([str(python), "-c", code], **TEXT).stdout.strip()
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(packages) / "below.pth").write_text(below, encoding="utf-8")
    source = (
        request.getfixturevalue("wheel") if request.param == "wheel" else f"--editable={source}"
    )
    pip(python, "install", source)
    return python, scripts


def elsewhere(command, folder):
    """Run a command in another folder and without the tests' own search path."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHONPATH")
    }
    return subprocess.run(list(map(str, command)), cwd=folder, env=variables, **TEXT)


def test_the_wheel_puts_the_package_and_the_classic_name_into_site_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fewbits",
        "convert_to_quant",
        f"fewbits-{VERSION}.dist-info",
    }


def test_the_wheel_carries_every_data_file_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("quant_ops/recipes", "web", "locales", "example_workflows")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.cu")}
    assert wanted and {f"fewbits/{name}" for name in wanted} <= names
    assert not [name for name in names if "/tests/" in name or "/." in name]


def test_the_wheel_carries_both_licence_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[-1] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_the_installed_pack_is_one_name_and_leaves_comfyuis_alone(installed, tmp_path):
    code = (
        "import importlib.util, fewbits; from fewbits import quantize_file\n"
        "print([n for n in ('nodes', 'kernels', 'quant_ops', 'dev', 'tests') if importlib.util.find_spec(n)])"
    )
    result = elsewhere([installed[0], "-c", code], tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
def test_the_installed_command_plans_a_file(installed, tmp_path):
    result = elsewhere([installed[1] / "fewbits", "--version"], tmp_path)
    assert result.stdout.strip() == f"fewbits {VERSION}", result.stderr
    result = elsewhere(
        [installed[1] / "fewbits", "plan", EMOJI, "--format", "int8_tensorwise"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_installed_classic_names_are_thin_aliases(installed, tmp_path):
    code = (
        "import convert_to_quant, fewbits.compat as c\n"
        "from convert_to_quant import LearnedRoundingConverter, convert_to_fp8_scaled, main, quantize\n"
        "assert c.LearnedRoundingConverter is LearnedRoundingConverter and c.main is main\n"
        "print(main.__module__)"
    )
    result = elsewhere([installed[0], "-c", code], tmp_path)
    assert result.stdout.strip() == "fewbits.quant_ops.compat", result.stderr
    result = elsewhere(
        [installed[1] / "convert_to_quant", "-i", EMOJI, "--simple", "--dry-run"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("+ fewbits plan ") and not list(tmp_path.iterdir())


def test_the_folder_runs_uninstalled_under_a_name_with_a_dash(source):
    command = [sys.executable, "-m", f"{source.name}.quant_ops.cli", "--version"]
    result = elsewhere(command, source.parent)
    assert result.stdout.strip() == f"fewbits {VERSION}", result.stderr


# ---- the Comfy Registry ----

REGISTRY_BYTES = 3_000_000


def packed():
    """What the registry gets: every tracked file that .comfyignore does not name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, **TEXT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    left_out = tuple(line.strip("/") for line in lines)
    names = filter(None, listed.stdout.split("\0"))
    return [name for name in names if name.split("/")[0] not in left_out]


def test_the_package_of_the_registry_is_small_and_whole():
    names = packed()
    assert sum((ROOT / name).stat().st_size for name in names) < REGISTRY_BYTES
    rooms = {name.split("/")[0] for name in names}
    wanted = {"web", "nodes", "kernels", "locales", "quant_ops", "example_workflows", "__init__.py"}
    assert wanted <= rooms
    assert not rooms & {"tests", "docs", "dev.py", ".ci", ".github"}


@pytest.mark.parametrize(("field", "size"), [("Icon", (400, 400)), ("Banner", (1344, 576))])
def test_icon_and_banner_lie_where_the_registry_is_told(field, size):
    from PIL import Image

    (url,) = re.findall(rf'^{field} = "(.*)"$', PYPROJECT, re.M)
    (repository,) = re.findall(r'^Repository = "https://github.com/(.*)"$', PYPROJECT, re.M)
    start = f"https://raw.githubusercontent.com/{repository}/main/"
    assert url.startswith(start)
    assert Image.open(ROOT / url.removeprefix(start)).size == size
