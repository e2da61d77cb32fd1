"""`fewbits calibrate`: says how a calibration is made; sampling needs ComfyUI."""

from __future__ import annotations

import argparse

from .door import say

TEXT = """\
A calibration is what a model's layers are given while you sample your own prompts, so it is made
where you sample: in ComfyUI.

  1. Put the node Calibrate between the model (with its LoRAs) and the KSampler, and Save
     Calibration behind the KSampler.
  2. Queue sixteen to thirty-two of your prompts. They add up in one file.
  3. fewbits quantize MODEL.safetensors -o OUT.safetensors --format nf4 --method gptq \\
         --calibration ComfyUI/output/calibrations/model.safetensors
     or connect the calibration to a Quantize node.

Over HTTP the same graph does it: docs/calibration.md has the workflow."""


def run(args: argparse.Namespace) -> None:
    say(TEXT)
