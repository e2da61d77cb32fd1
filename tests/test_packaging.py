"""The wheel: one top-level package, everything in it, versions that agree."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fewbits.quant_ops.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_package_list_is_the_tree():
    listed = set(re.findall(r'^ {4}"(fewbits[\w.]*)",$', PYPROJECT, re.M))
    found = {"fewbits"}
    for room in ("kernels", "nodes", "quant_ops"):
        folders = [ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())]
        found |= {".".join(("fewbits", *f.relative_to(ROOT).parts)) for f in folders if (f / "__init__.py").is_file()}
    assert listed == found


def test_versions_agree():
    assert f'version = "{VERSION}"' in PYPROJECT


def test_requirements_leave_torch_and_comfy_kitchen_to_comfyui():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert not {"torch", "comfy-kitchen", "comfyui-frontend-package", "triton"} & set(names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that no build folder appears in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".git", "tests", "demo_output", "__pycache__", "build", "*.egg-info", ".venv")
    shutil.copytree(ROOT, folder / "src", ignore=ignore)
    if not (folder / "src" / "README.md").exists():
        (folder / "src" / "README.md").write_text("")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(folder), str(folder / "src")], check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_puts_one_package_into_site_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fewbits", f"fewbits-{VERSION}.dist-info"}


def test_the_wheel_carries_recipes_and_web_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("quant_ops/recipes", "web", "locales")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert wanted and {f"fewbits/{name}" for name in wanted} <= names


def test_the_installed_wheel_runs_without_the_checkout(wheel, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    code = "import fewbits, sys; from fewbits import quantize_file; print(fewbits.__file__); assert 'nodes' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout


def test_the_folder_runs_uninstalled_under_a_name_with_a_dash(tmp_path):
    ignore = shutil.ignore_patterns(".git", "tests", "demo_output", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "ComfyUI-FewBits", ignore=ignore)
    result = subprocess.run(
        [sys.executable, "-m", "ComfyUI-FewBits.quant_ops.cli", "--version"], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin", "SYSTEMROOT": "C:\\Windows"},
    )  # fmt: skip
    assert result.stdout.strip() == f"fewbits {VERSION}", result.stderr
