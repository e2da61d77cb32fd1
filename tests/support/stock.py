"""A process with ComfyUI and without FewBits, that opens files and says what it made of them.

It imports ComfyUI once and then answers one line after the other. `python -m support.stock` is the process itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.harness.first_word import hasten


class Stock:
    """The process, as seen from a test."""

    def __init__(self, comfyui: Path, folder: Path):
        paths = [str(Path(__file__).parents[1]), str(comfyui)]
        self._open = contextlib.ExitStack()
        log = self._open.enter_context((folder / "stock.log").open("wb"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.stock", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            encoding="utf-8",
        )
        self.folder = folder

    def __enter__(self) -> Stock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(300)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._open.close()

    def ask(self, what: str, **about: object) -> dict:
        """An answer of one of ANSWERS: {"error": words}, or what the function returned.

        Tensors come back as files: `output` is read here.
        """
        self._process.stdin.write(json.dumps({"what": what, **about}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            log = (self.folder / "stock.log").read_text(encoding="utf-8", errors="replace")
            raise AssertionError(f"stock ComfyUI ended:\n{log[-2000:]}")
        answer = json.loads(line)
        if "output" in answer:
            answer["output"] = load_file(answer["output"])["output"]
        return answer


def diffusion_model(path: str, name: str) -> dict:
    """The class that the stock loader takes a tiny file for, and the model's output."""
    import comfy.sd

    from support.tiny_models import forward, recognised_as_small

    with recognised_as_small(name):
        model = comfy.sd.load_diffusion_model(path)
    if model is None:
        return {"class": None}
    return {"class": type(model.model.model_config).__name__, "output": forward(model, name)}


def checkpoint(path: str, name: str) -> dict:
    """The same of the stock loader of whole checkpoints, without text encoders and VAE."""
    import comfy.sd

    from support.tiny_models import forward, recognised_as_small

    with recognised_as_small(name):
        model = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
    return {"class": type(model.model.model_config).__name__, "output": forward(model, name)}


def text_encoder(paths: list[str], type: str, files: list[str], about: int) -> dict:
    """What the stock loader's text encoders make of fixed tokens."""
    from support.small_encoders import encode, load
    from support.tiny_encoders import Route

    return {"output": encode(load(Route(type, tuple(files), about), paths))}


ANSWERS = {
    "diffusion_model": diffusion_model,
    "checkpoint": checkpoint,
    "text_encoder": text_encoder,
}


def main(folder: Path) -> None:
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # read when comfy.model_management is imported
    answers, sys.stdout = sys.stdout, sys.stderr  # ComfyUI prints
    hasten()
    assert "fewbits" not in sys.modules
    for number, line in enumerate(sys.stdin):
        about = json.loads(line)
        try:
            answer = ANSWERS[about.pop("what")](**about)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        if isinstance(answer.get("output"), torch.Tensor):
            path = folder / f"output{number}.safetensors"
            save_file({"output": answer["output"].contiguous()}, path)
            answer["output"] = str(path)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # taking the interpreter down would take two seconds
