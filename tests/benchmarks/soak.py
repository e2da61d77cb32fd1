"""A ComfyUI with the pack under load, over HTTP: conversions, quantize-and-sample, cancels and queue deletes at random.

    python3 dev.py bench soak [--jobs 200] [--seed 0]

Prints, and writes nothing else down: how jobs ended and which were lost; resident memory, open files, threads, modules
and hooks on them after the first tenth and at the end; parts left behind; and how long `/system_stats` took meanwhile.
Asserts nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "import_shim"), str(Path(__file__).parents[1])]

from fewbits.quant_ops.formats import FORMATS
from support.harness.emoji import EMOJI_NODES, PACK, emoji_models, emoji_workflow
from support.harness.server import ComfyServer

FILE = "diffusion_models/emoji_flux.safetensors"
# A node of this server: what is alive in it.
ALIVE = """
import gc

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/soak/alive")
async def alive(request):
    gc.collect()
    modules = [found for found in gc.get_objects() if isinstance(found, torch.nn.Module)]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return web.json_response({"modules": len(modules), "hooks": hooks})
"""
ENDS = ("execution_success", "execution_error", "execution_interrupted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        alive = Path(folder) / "soak_alive"
        alive.mkdir()
        (alive / "__init__.py").write_text(ALIVE, encoding="utf-8")
        nodes = [PACK, EMOJI_NODES, alive]
        server = ComfyServer(Path(folder) / "base", custom_nodes=nodes, models=emoji_models())
        with server, Watch(server) as watch:
            soak(server, watch, dice, args.jobs)


def soak(server: ComfyServer, watch: Watch, dice: random.Random, jobs: int) -> None:
    """Jobs in batches, so that some wait in the queue while others run."""
    ends: dict[str, int] = {}
    early = None
    done = 0
    while done < jobs:
        batch = [queue(server, job(dice, done + i)) for i in range(min(5, jobs - done))]
        deleted = {batch[-1]} if len(batch) > 1 and dice.random() < 0.3 else set()
        if deleted:
            server.post("/queue", {"delete": list(deleted)})
        if dice.random() < 0.4:
            time.sleep(dice.uniform(0, 3))
            server.interrupt()
        for prompt in batch:
            end = wait(server, prompt)
            if end == "lost" and prompt in deleted:
                end = "deleted from the queue"
            ends[end] = ends.get(end, 0) + 1
        done += len(batch)
        if early is None and done * 10 >= jobs:
            early = watch.state()
    late = watch.state()
    print(f"{done} jobs: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    for name, value in early.items():
        print(f"{name}: {value} after a tenth, {late[name]} at the end")
    left = [path.name for path in server.output.rglob(".fewbits-*")]
    print(f"parts left behind: {len(left)}")
    times = sorted(watch.seconds)
    print(
        f"/system_stats: {len(times)} answers, median {statistics.median(times):.3f} s, "
        f"p99 {times[int(0.99 * (len(times) - 1))]:.3f} s, slowest {times[-1]:.3f} s"
    )


def job(dice: random.Random, number: int) -> dict:
    """A conversion of the file, or a MODEL that is quantized or watched, and sampled."""
    if dice.random() < 0.6:
        inputs = {
            "file": FILE,
            "format": dice.choice(list(FORMATS)),
            "filename": f"soak/{dice.randrange(8)}",
            "overwrite": True,
            "keep": f"no.such.layer.{number}",  # never the same twice, so nothing is cached
        }
        return {"q": {"class_type": "FewBitsQuantizeFile", "inputs": inputs}}
    workflow = emoji_workflow(seed=number, steps=2)
    if dice.random() < 0.5:
        inputs = {"model": ["3", 0], "seed": number}
        workflow["node"] = {"class_type": "FewBitsCalibrate", "inputs": inputs}
    else:
        inputs = {"model": ["3", 0], "format": "int8_tensorwise"}
        inputs["keep"] = f"no.such.layer.{number}"
        workflow["node"] = {"class_type": "FewBitsQuantizeINT8", "inputs": inputs}
    workflow["7"]["inputs"]["model"] = ["node", 0]
    return workflow


def queue(server: ComfyServer, workflow: dict) -> str:
    prompt = str(uuid.uuid4())
    server.post("/prompt", {"prompt": workflow, "client_id": "soak", "prompt_id": prompt})
    return prompt


def wait(server: ComfyServer, prompt: str) -> str:
    """How a prompt ended; `lost` when it is neither queued nor in the history."""
    while True:
        history = server.get(f"/history/{prompt}")
        if prompt in history:
            said = [name for name, _ in history[prompt]["status"]["messages"]]
            return next((name for name in said if name in ENDS), "ended without a word")
        state = server.get("/queue")
        waiting = [entry[1] for entry in (*state["queue_running"], *state["queue_pending"])]
        if prompt not in waiting and prompt not in server.get(f"/history/{prompt}"):
            return "lost"
        time.sleep(0.2)


class Watch:
    """Asks `/system_stats` four times a second, and /proc what the server holds."""

    def __init__(self, server: ComfyServer):
        self.server, self.seconds = server, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.wait(0.25):
            started = time.perf_counter()
            self.server.get("/system_stats")
            self.seconds.append(time.perf_counter() - started)

    def state(self) -> dict[str, int]:
        process = Path("/proc") / str(self.server.process.pid)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return {
            "resident MB": int(status["VmRSS"].split()[0]) // 1024,
            "threads": int(status["Threads"]),
            "open files": len(list((process / "fd").iterdir())),
            **self.server.get("/soak/alive"),
        }

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
