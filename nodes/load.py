"""Load Model, Load Text Encoder, Load Checkpoint: files by ComfyUI's own loaders, and what is
inside.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..quant_ops.doors import Inspection, inspect_file
from ..quant_ops.options import as_json
from .bridge import clip_io, host, model_io
from .bridge.kernels import kernel_lines
from .common import NONE, inspection_text, kernels_input, schema

MODELS, ENCODERS, CHECKPOINTS = host.MODEL_FOLDERS
DEFAULT, CPU = "default", "cpu"


def file_input(folder: str, what: str) -> io.Combo.Input:
    return io.Combo.Input(
        "file",
        options=host.model_files(folder),
        tooltip=f"A safetensors file in a {folder} folder: {what}. Quantized files run as they "
        "are.",
    )


def contents_output() -> io.String.Output:
    return io.String.Output(
        "report",
        display_name="report",
        tooltip="Family, layers per format, sizes, problems, and how quantized layers are "
        "multiplied, as text.",
    )


def loaded(*values: object, inspections: list[Inspection], kernels: list[str]) -> io.NodeOutput:
    """A loader's outputs, the report last."""
    text = inspection_text(*inspections, kernels=kernels)
    return io.NodeOutput(*values, text, ui={"fewbits_inspection": as_json(inspections)})


class FewBitsLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsLoadModel",
            display_name="Load Model",
            category="FewBits/load",
            description="Loads a diffusion model, quantized or not, as ComfyUI's own loader does; "
            "says what is inside.",
            search_aliases=["load diffusion model", "load quantized", "unet", "fewbits"],
            has_intermediate_output=True,
            inputs=[file_input(MODELS, "a diffusion model")],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The model, ready to sample."
                ),
                contents_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple:
        return host.file_state(f"{MODELS}/{file}")

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = host.model_path(MODELS, file)
        found = inspect_file(path)
        model = model_io.load_file(str(path))
        return loaded(model, inspections=[found], kernels=kernel_lines(model.model))


class FewBitsLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        more = [NONE, *host.model_files(ENCODERS)]
        return schema(
            node_id="FewBitsLoadTextEncoder",
            display_name="Load Text Encoder",
            category="FewBits/load",
            description="Loads one to four text encoders, quantized or not, as ComfyUI's own "
            "loaders do; says what is inside.",
            search_aliases=["load clip", "dual clip", "triple", "t5", "load quantized", "fewbits"],
            has_intermediate_output=True,
            inputs=[
                file_input(ENCODERS, "a text encoder"),
                *(
                    io.Combo.Input(
                        f"file{number}",
                        options=more,
                        optional=True,
                        tooltip="One more text encoder, for models that use several together. "
                        "none: no more files.",
                    )
                    for number in (2, 3, 4)
                ),
                io.Combo.Input(
                    "type",
                    options=host.text_encoder_types(),
                    tooltip="The kind of model that the text is for: the same list as in ComfyUI's "
                    "own loaders. Three or four files are enough to tell.",
                ),
                io.Combo.Input(
                    "device",
                    options=[DEFAULT, CPU],
                    optional=True,
                    advanced=True,
                    tooltip="Where the text encoders run. default: where ComfyUI decides; cpu: "
                    "they never take GPU memory, and are slower.",
                ),
                kernels_input(),
            ],
            outputs=[
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="The text encoders, ready to encode."
                ),
                contents_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: object) -> tuple:
        files = [file, *(others.get(f"file{number}", NONE) for number in (2, 3, 4))]
        return tuple(host.file_state(f"{ENCODERS}/{name}") for name in files if name != NONE)

    @classmethod
    def execute(
        cls,
        file: str,
        type: str,
        file2: str = NONE,
        file3: str = NONE,
        file4: str = NONE,
        device: str = DEFAULT,
        quantized_kernels: bool = False,
    ) -> io.NodeOutput:
        paths = [
            host.model_path(ENCODERS, name) for name in (file, file2, file3, file4) if name != NONE
        ]
        found = list(map(inspect_file, dict.fromkeys(paths)))
        clip = clip_io.load_files(
            list(map(str, paths)), type, on_cpu=device == CPU, kernels=quantized_kernels
        )
        return loaded(clip, inspections=found, kernels=kernel_lines(clip.cond_stage_model))


class FewBitsLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsLoadCheckpoint",
            display_name="Load Quantized Checkpoint",
            category="FewBits/load",
            description="Loads a checkpoint, quantized or not, as ComfyUI's own loader does; says "
            "what is inside.",
            search_aliases=["load checkpoint", "checkpoint loader", "ckpt", "fewbits"],
            has_intermediate_output=True,
            inputs=[
                file_input(CHECKPOINTS, "a diffusion model with its text encoders and VAE"),
                kernels_input(),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The model, ready to sample."
                ),
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="The text encoders, if the file has any."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="The VAE, if the file has one."),
                contents_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: object) -> tuple:
        return host.file_state(f"{CHECKPOINTS}/{file}")

    @classmethod
    def execute(cls, file: str, quantized_kernels: bool = False) -> io.NodeOutput:
        path = host.model_path(CHECKPOINTS, file)
        found = inspect_file(path)
        model, clip, vae = clip_io.load_checkpoint(str(path), kernels=quantized_kernels)
        kernels = kernel_lines(model.model)
        if clip is not None:
            kernels += kernel_lines(clip.cond_stage_model)
        return loaded(model, clip, vae, inspections=[found], kernels=kernels)
