"""Calibrate: see what a model's layers are given while it samples, and text encoders' while they
encode; Save and Load Calibration.
"""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..quant_ops.calibration import Calibration, Observer, load_calibration, save_calibration
from ..quant_ops.errors import RecipeError
from .bridge import host, observe
from .common import CALIBRATION, overwrite_input, path_output, saved_result, schema, settled

CATEGORY = "FewBits/quantize"
ALIASES = ["calibration", "gptq", "calibrated quantization", "better 4 bit", "fewbits"]


def _memory_input() -> io.Float.Input:
    return io.Float.Input(
        "memory_gb",
        default=1.0,
        min=0.1,
        max=64.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Memory for what is collected, in GB, whatever the model's size. More keeps more "
        "rows of large models.",
    )


def _seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**32 - 1,
        optional=True,
        advanced=True,
        tooltip="Chooses the rows that are kept. The sampler's noise does not depend on it.",
    )


def _effects_input() -> io.Int.Input:
    return io.Int.Input(
        "effects",
        default=0,
        min=0,
        max=64,
        optional=True,
        advanced=True,
        tooltip="For Fit to Size: in so many runs, one step is evaluated again for each layer, to "
        "see how far its errors reach the picture. 4 to 8 are enough; each takes as long as a "
        "few hundred steps of a large model.",
    )


def _collecting_output() -> io.Output:
    return CALIBRATION.Output(
        "calibration",
        display_name="calibration",
        tooltip="What is being collected. Save Calibration hands it on when the run is over.",
    )


def _observer(memory_gb: float, seed: int, effects: int = 0) -> Observer:
    if math.isnan(memory_gb):  # which ComfyUI's own limits let through
        raise RecipeError("memory_gb is not a number, allowed: 0.1 to 64")
    return Observer(int(memory_gb * 1e9), seed, effects)


class FewBitsCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsCalibrate",
            display_name="Calibrate",
            category=CATEGORY,
            description="Watches what the layers of a model are given while you sample with it, so "
            "that the method gptq can round for your own prompts. Pictures do not change.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to watch, with its LoRAs. It is not changed.",
                ),
                _memory_input(),
                _seed_input(),
                _effects_input(),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The same model, watched: sample with this one, with several prompts.",
                ),
                _collecting_output(),
            ],
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, memory_gb: float = 1.0, seed: int = 0, effects: int = 0
    ) -> io.NodeOutput:
        observer = _observer(memory_gb, seed, effects)
        return io.NodeOutput(observe.observed(model, observer), observer)


class FewBitsCalibrateTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsCalibrateTextEncoder",
            display_name="Calibrate Text Encoder",
            category=CATEGORY,
            description="Watches what the layers of text encoders are given while they encode, so "
            "that the method gptq can round for your own prompts. What they encode does not "
            "change.",
            search_aliases=["calibrate clip", *ALIASES],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoders to watch, with their LoRAs. They are not changed.",
                ),
                _memory_input(),
                _seed_input(),
            ],
            outputs=[
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="The same text encoders, watched: encode with these, several prompts.",
                ),
                _collecting_output(),
            ],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, memory_gb: float = 1.0, seed: int = 0) -> io.NodeOutput:
        observer = _observer(memory_gb, seed)
        return io.NodeOutput(observe.observed_clip(clip, observer), observer)


class FewBitsSaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsSaveCalibration",
            display_name="Save Calibration",
            category=CATEGORY,
            description="Waits for the sampler or the text encoder, then writes what Calibrate "
            "collected so far to a file and hands it on. Prompts that run later are added.",
            search_aliases=ALIASES,
            is_output_node=True,
            inputs=[
                CALIBRATION.Input("calibration", tooltip="What Calibrate is collecting."),
                io.MultiType.Input(
                    "latent",
                    types=[io.Latent, io.Conditioning],
                    tooltip="The sampler's result, or a text encoder's: the file is written after "
                    "it, never before.",
                ),
                io.String.Input(
                    "filename",
                    default="calibrations/model",
                    optional=True,
                    tooltip="Name of the file inside ComfyUI's output folder; subfolders are made. "
                    "In calibrations/ Load Calibration finds it.",
                ),
                overwrite_input(),
            ],
            outputs=[
                CALIBRATION.Output(
                    "calibration",
                    display_name="calibration",
                    tooltip="What was collected, for the calibration input of a Quantize node.",
                ),
                path_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        calibration: Observer | Calibration,
        latent: object,
        filename: str = "calibrations/model",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        collected = settled(calibration)
        target = host.output_path(filename, overwrite=overwrite)
        save_calibration(collected, target)
        text = f"{len(collected.layers)} layers, {collected.rows} rows seen"
        if collected.effects:
            text += f", effects of {len(collected.effects)} layers measured"
        return saved_result(collected, str(target), written=target, text=text)


class FewBitsLoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsLoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            description="Reads a file that Save Calibration wrote.",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.calibration_files(),
                    tooltip="A file in models/calibrations or in the output folder's calibrations.",
                ),
                CALIBRATION.Input(
                    "add_to",
                    optional=True,
                    tooltip="Another calibration of the same model: both become one.",
                ),
            ],
            outputs=[
                CALIBRATION.Output(
                    "calibration",
                    display_name="calibration",
                    tooltip="For the calibration input of a Quantize node.",
                )
            ],
        )

    @classmethod
    def execute(cls, file: str, add_to: Calibration | None = None) -> io.NodeOutput:
        loaded = load_calibration(host.model_path(host.CALIBRATIONS, file))
        if add_to is not None:
            loaded.merge(add_to)
        return io.NodeOutput(loaded)

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: object) -> tuple[int, int]:
        return host.file_state(f"{host.CALIBRATIONS}/{file}")
