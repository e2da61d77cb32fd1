"""The server around the nodes: what starting leaves behind, being killed in mid conversion, ending with its parent."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from support.harness import EMOJI_NODES, PACK, ComfyServer, warm
from support.harness.server import start
from support.helpers import flux_shapes, tiny_checkpoint

BIG = flux_shapes(hidden=1024)  # 120 MB: long enough to be killed in


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".git" not in path.parts}


def test_starting_leaves_nothing_in_comfyui_or_in_the_pack(comfyui, tmp_path):
    before = contents(comfyui), contents(PACK / "nodes"), contents(PACK / "quant_ops")
    with ComfyServer(tmp_path, custom_nodes=[PACK, EMOJI_NODES], tree=comfyui) as server:
        assert server.object_info("FewBitsQuantizeFile")
        assert server.log_problems() == []
    assert before == (contents(comfyui), contents(PACK / "nodes"), contents(PACK / "quant_ops"))


def test_a_server_killed_in_mid_conversion_leaves_no_result_and_can_go_on_afterwards(
    comfyui, tmp_path
):
    model = tiny_checkpoint(tmp_path / "big.safetensors", BIG)
    workflow = {
        "q": {
            "class_type": "FewBitsQuantizeFile",
            "inputs": {
                "file": "diffusion_models/big.safetensors",
                "format": "int8_tensorwise",
                "filename": "result",
            },
        }
    }

    def kill(message):
        if message["type"] == "fewbits.progress":
            server.process.kill()

    shared = {"models": {"diffusion_models": [model]}, "tree": comfyui, "forked": True}
    with ComfyServer(tmp_path / "comfyui", custom_nodes=[PACK], **shared) as server:
        with pytest.raises(RuntimeError, match="hung up"):
            server.run(workflow, on_message=kill)
        result = server.output / "result.safetensors"
        assert not result.exists()
        server.start()
        run = server.run(workflow)
        assert run.status == "success", run.error
        assert result.stat().st_size < 0.6 * model.stat().st_size


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupted_parent_takes_the_server_with_it():
    command = [sys.executable, "-m", "support.harness.serve", "0"]
    listen = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=listen) as parent:
        line = parent.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        page = urllib.request.urlopen(f"{address}/object_info/FewBitsLoadModel").read()
        assert b"emoji_flux.safetensors" in page
        parent.send_signal(signal.SIGINT)
        assert parent.stdout.read() == "stopped\n"
    assert parent.returncode == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/system_stats")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the number of a parent that ended")
def test_a_server_whose_tests_are_killed_ends_by_itself(tmp_path):
    command = [sys.executable, "-m", "support.harness.serve", "0"]
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as parent:
        address = re.search(r"http://127\.0\.0\.1:\d+", parent.stdout.readline())[0]
        parent.kill()
    limit = time.monotonic() + 60
    with pytest.raises(OSError):
        while time.monotonic() < limit:
            urllib.request.urlopen(f"{address}/system_stats").read()
            time.sleep(0.2)


SAYS_WHAT_IT_IS = """
import os, sys
print(__name__, sys.argv, sys.path[0], os.getcwd(), "torch" in sys.modules, sep="\\n")
raise SystemExit(3)
"""


@pytest.mark.skipif(not warm.POSSIBLE, reason="every process starts alone here")
def test_a_forked_program_runs_as_one_that_starts_alone_but_has_its_libraries(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SAYS_WHAT_IT_IS, encoding="utf-8")
    said = {}
    for forked in (False, True):
        log = tmp_path / "log"
        process = start([str(program), "--word"], folder=tmp_path, log=log, forked=forked)
        assert process.wait(120) == 3
        said[forked] = log.read_text(encoding="utf-8").splitlines()
    *alone, without = said[False]
    *forked, with_torch = said[True]
    assert alone == forked and (without, with_torch) == ("False", "True")
    assert alone[0] == "__main__"
