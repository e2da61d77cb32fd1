"""A stranger's file in ComfyUI's own UNETLoader with the pack installed: refused by name, in little memory, and the
server goes on.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import dialects
from support.harness import EMOJI, PROMPTS, emoji_workflow

LAYER = "double_blocks.0.img_attn.qkv"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
MEGABYTES = 600  # loading the sound file takes up to 300

# what the layer's state says instead
STATES = {
    "blocks of 2 GB": {"blocksize": 2**31},
    "nested blocks of 2 GB": {"nested_blocksize": 2**31},
    "negative blocks": {"blocksize": -64},
    "blocks in text": {"blocksize": "64"},
    "a shape of terabytes": {"shape": [2**31, 2**20]},
    "a shape of text": {"shape": "many"},
}


@pytest.fixture(scope="module")
def sound():
    """The emoji model with every matrix in bitsandbytes' nested 4 bits."""
    tensors = {}
    for name, tensor in load_file(EMOJI / "emoji_flux.safetensors").items():
        base = name.removesuffix(".weight")
        matrix = base != name and tensor.dim() == 2
        tensors |= dialects.nested(base, tensor.float()) if matrix else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def peak_of(server) -> float:
    """Megabytes: the most memory that the server has held since the last call."""
    process = Path("/proc") / str(server.process.pid)
    lines = (process / "status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    (process / "clear_refs").write_text("5")
    return peak / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what the server held")
@pytest.mark.parametrize("case", STATES)
def test_a_hostile_file_is_refused_by_the_stock_loader_and_the_server_stays_up(
    server, sound, tmp_path, case
):
    state = json.loads(bytes(sound[STATE].tolist())) | STATES[case]
    text = bytearray(json.dumps(state).encode())
    hostile = {**sound, STATE: torch.frombuffer(text, dtype=torch.uint8)}
    path = tmp_path / f"hostile_{case.replace(' ', '_')}.safetensors"
    save_file(hostile, path)
    server.add_model("diffusion_models", path)
    peak_of(server)
    before = peak_of(server)
    run = server.run(emoji_workflow(path.name, PROMPTS[0]))
    assert peak_of(server) - before < MEGABYTES
    assert run.status == "error"
    assert LAYER in run.error["exception_message"], run.error
    assert "CheckpointError" in run.error["exception_type"]
    assert server.get("/system_stats")["system"]
