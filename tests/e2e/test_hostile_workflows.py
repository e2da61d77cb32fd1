"""The pack's nodes with values that no page sends, over HTTP: each workflow ends well, is refused by ComfyUI, or ends in
one sentence of ours; nothing is written but below the output folder, and the server goes on.

The same few every time; `--fuzz SECONDS` runs new ones for so long, `--seed workflow:SEED` one again.
"""

import random
import re
import time
import urllib.error

import pytest
import torch
from fuzz.workflows import FILE, workflow
from safetensors.torch import save_file

from support.harness import EMOJI_NODES, PACK, ComfyServer, emoji_models

pytestmark = pytest.mark.fuzz
SEEDS = range(40)
LONGEST = 20_000  # characters of a message; ours end at 16,000
SECONDS = 30  # one workflow; quantizing the emoji model takes 2
OURS = re.compile(r"(fewbits|FewBits).*Error$")
COMFYUIS = "Could not detect model type"  # its loader's word for a file that is no model


@pytest.fixture(scope="module")
def attacked(comfyui, tmp_path_factory):
    """A server of its own: nobody else's files are here."""
    base = tmp_path_factory.mktemp("outer") / "base"
    shared = {"models": emoji_models(), "tree": comfyui, "forked": True}
    with ComfyServer(base, custom_nodes=[PACK, EMOJI_NODES], **shared) as server:
        generator = torch.Generator().manual_seed(0)
        tiny = {
            f"blocks.{number}.linear.weight": torch.randn(64, 64, generator=generator)
            for number in range(3)
        }
        path = base.parent / FILE.rpartition("/")[2]
        save_file(tiny, path)
        server.add_model("diffusion_models", path)
        yield server


def outside(server):
    """Every file that a workflow may not touch, with its size and time."""
    theirs = (server.output, server.base / "user", server.base / "temp")
    found = {}
    for path in server.base.parent.rglob("*"):
        ours = any(folder in path.parents for folder in theirs) or "__pycache__" in path.parts
        if path.is_file() and not ours and path != server.log_path:
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def schemas(server):
    known = server.get("/object_info")
    return {name: schema for name, schema in known.items() if name.startswith("FewBits")}


def test_hostile_workflows_are_refused_in_a_sentence_and_the_server_stays_up(
    attacked, request, capsys
):
    seconds, named = (request.config.getoption(name) for name in ("--fuzz", "--seed"))
    nodes = schemas(attacked)
    assert len(nodes) > 15
    before = outside(attacked)
    ends = {"success": 0, "error": 0, "refused": 0}
    wrong = []
    started = time.monotonic()
    seeds = iter(SEEDS)
    if named:
        seeds = iter([int(named.rpartition(":")[2])])
    elif seconds:
        seeds = iter(lambda: random.getrandbits(40), None)
    for seed in seeds:
        end, problem = tried(attacked, workflow(random.Random(seed), nodes))
        ends[end] += 1
        if problem:
            wrong.append(f"seed {seed}: {problem}")
        if seconds and time.monotonic() - started > seconds:
            break
    if seconds or named:
        with capsys.disabled():
            print(f"\nhostile workflows: {ends}, {len(wrong)} not handled")
    assert not wrong, "\n".join(wrong[:20])
    assert outside(attacked) == before
    assert attacked.get("/system_stats")["system"]
    assert named or all(ends.values()), ends


def tried(server, prompt):
    """(how it ended, what is wrong with that or "")."""
    try:
        run = server.run(prompt, timeout=SECONDS)
    except RuntimeError as error:
        if "HTTP 400" in str(error):
            return "refused", ""
        return "refused", f"{prompt['node']}: {str(error)[:500]}"
    except (TimeoutError, urllib.error.URLError) as error:
        return "error", f"{prompt['node']}: {error!r}"
    if run.error is None:
        return run.status, ""
    kind, message = run.error["exception_type"], run.error["exception_message"].strip()
    readable = message.isprintable() and len(message) < LONGEST
    theirs = not run.error["node_type"].startswith("FewBits") or COMFYUIS in message
    problem = (
        ""
        if readable and (theirs or OURS.search(kind))
        else f"{str(prompt['node'])[:600]}: {kind}: {message[:300]!r}"
    )
    return "error", problem
