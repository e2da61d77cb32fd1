"""How hosts import the folder: ComfyUI by path, pip by name, twice, both at once, and nobody at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.harness.server import start

pytestmark = pytest.mark.slow  # processes that import ComfyUI

ROOT = Path(__file__).resolve().parents[1]
LOAD_BY_PATH = """
import importlib.util, sys
def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
"""
HOST = """
import sys
sys.argv, sys.path[:0] = ["x", "--cpu"], {paths!r}
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd
"""
OURS = {
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_blockwise",
    "int8_lodewise",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The pack as ComfyUI users have it, dash and dot in the path included."""
    folder = tmp_path_factory.mktemp("v1.0") / "ComfyUI-FewBits"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", "tests", "demo_output", "__pycache__")
    )
    return str(folder)


def python(code):
    return subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=120,
    )


@pytest.fixture(scope="module")
def hosted(comfyui, tmp_path_factory):
    """`hosted(code)` -> (status, what it wrote) of a process that has ComfyUI imported; `folder` is the pack."""
    folder = tmp_path_factory.mktemp("hosts")
    paths = [str(comfyui), str(ROOT / "tests" / "import_shim")]

    def run(code):
        program, log = folder / "host.py", folder / "host.log"
        program.write_text(HOST.format(paths=paths) + code, encoding="utf-8")
        status = start([str(program)], folder=folder, log=log).wait(120)
        return status, log.read_text(encoding="utf-8")

    return run


def test_without_comfyui_importing_the_folder_does_nothing(copy):
    result = python(
        LOAD_BY_PATH
        + f"load({copy!r}, 'by_path')\nprint('torch' in sys.modules, [m for m in sys.modules if m.startswith('by_path.')])"
    )
    assert result.stdout.strip() == "False []", result.stderr


# One ComfyUI answers three tests: importing it takes most of their time.
ASK = """
from comfy.quant_ops import QUANT_ALGOS
from comfy_kitchen.tensor.base import LAYOUTS
import comfy.ops, json
before = {k: dict(v) for k, v in QUANT_ALGOS.items()}
pack = load(folder, 'by_path')
status = sys.modules['by_path.nodes.bridge'].status()
found = {
    'algorithms': sorted(QUANT_ALGOS),
    'layouts': all(row['comfy_tensor_layout'] in LAYOUTS for row in QUANT_ALGOS.values()),
    'seams': len(status),
    'reasons': [reason for reason in status.values() if reason],
    'page': pack.WEB_DIRECTORY,
    'native': sorted(before),
    'changed': [name for name, row in before.items() if QUANT_ALGOS[name] != row],
}
wrapped = comfy.ops.mixed_precision_ops
import fewbits
load(folder, 'again')
from fewbits.nodes import bridge
bridge.register()
found |= {'wrapped once': comfy.ops.mixed_precision_ops is wrapped, 'status of the second': bridge.status()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded(copy, hosted):
    """What a ComfyUI is like after it loaded the pack, and after a second copy came."""
    status, written = hosted(LOAD_BY_PATH + f"folder = {copy!r}\n" + ASK)
    assert status == 0, written
    return json.loads(written.splitlines()[-1])


def test_under_comfyui_the_import_registers_formats_and_every_seam(loaded):
    assert set(loaded["algorithms"]) >= OURS and loaded["layouts"]
    assert loaded["seams"] > 2 and loaded["reasons"] == []
    assert loaded["page"] == "./web"


def test_native_entries_stay_comfyuis_own(loaded):
    assert loaded["native"] and loaded["changed"] == []


def test_two_copies_in_one_process_register_once(loaded):
    assert loaded["wrapped once"]
    assert loaded["status of the second"] == {}


def test_a_comfyui_without_comfy_kitchen_gets_a_reason_and_keeps_the_nodes(copy, hosted):
    code = "import comfy.quant_ops\ncomfy.quant_ops._CK_AVAILABLE = False\n" + LOAD_BY_PATH
    code += f"load({copy!r}, 'by_path')\nprint(sys.modules['by_path.nodes.bridge'].status()['quantization'])"
    status, written = hosted(code)
    assert status == 0 and "reinstall ComfyUI's requirements.txt" in written.splitlines()[-1]


def test_a_seam_that_breaks_takes_only_itself_away(copy, hosted):
    code = "import comfy.ops\ndel comfy.ops.mixed_precision_ops\n" + LOAD_BY_PATH
    code += f"load({copy!r}, 'by_path')\nstatus = sys.modules['by_path.nodes.bridge'].status()\nprint(status['layers'], status['formats'])"
    status, written = hosted(code)
    said = written.splitlines()[-1]
    assert status == 0 and "AttributeError" in said and said.endswith("None"), written
    assert written.count("FewBits: seam") == 1
