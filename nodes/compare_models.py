"""Compare Models: the same noise through two to four MODELs, and how far they come apart."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..quant_ops.report.models import compare_models, sheet
from .bridge import host, sampling
from .common import schema

NAMES = ("A", "B", "C", "D")
CONTROL = 1_000_003  # added to the seeds of the control
SEEDS = 2**32


class FewBitsCompareModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FewBitsCompareModels",
            display_name="Compare Models",
            category="FewBits/tools",
            description="Samples two to four models from the same noise and shows how far they "
            "come apart: latents step by step, final pictures, time and memory, with a sheet.",
            search_aliases=["quality", "difference", "ssim", "psnr", "before and after", "fewbits"],
            inputs=[
                io.Model.Input(
                    "model_a", tooltip="The measure: every other model is compared with this one."
                ),
                io.Model.Input("model_b", tooltip="The model that is compared with A."),
                io.Conditioning.Input("positive", tooltip="The prompt, the same for all models."),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt, the same for all models."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The size of the pictures; every model starts from it, with the same "
                    "noise.",
                ),
                io.Vae.Input("vae", tooltip="Decodes the results, so that pictures are compared."),
                io.Model.Input(
                    "model_c", optional=True, tooltip="One more model to compare with A."
                ),
                io.Model.Input(
                    "model_d", optional=True, tooltip="One more model to compare with A."
                ),
                io.Int.Input(
                    "seed",
                    optional=True,
                    default=0,
                    min=0,
                    max=SEEDS - 1,
                    tooltip="The first seed; further runs take the next ones.",
                ),
                io.Int.Input(
                    "seeds",
                    optional=True,
                    default=3,
                    min=1,
                    max=64,
                    tooltip="How many runs, a seed each: the more, the surer the numbers.",
                ),
                io.Int.Input(
                    "steps",
                    optional=True,
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps of each run, the same for all models.",
                ),
                io.Float.Input(
                    "cfg",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Strength of the guidance, the same for all models.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    optional=True,
                    options=sampling.samplers(),
                    default="euler",
                    tooltip="The sampler, the same for all models.",
                ),
                io.Combo.Input(
                    "scheduler",
                    optional=True,
                    options=sampling.schedulers(),
                    default="simple",
                    tooltip="The schedule of the steps, the same for all models.",
                ),
                io.Boolean.Input(
                    "control",
                    optional=True,
                    default=False,
                    advanced=True,
                    tooltip="Also sample A with other seeds: a difference as large as that nobody "
                    "minds.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="A sheet: a row for each seed, A, then each other model and the "
                    "amplified difference.",
                ),
                io.String.Output(
                    "sentence", display_name="sentence", tooltip="What to do about it, in words."
                ),
                io.String.Output("report", display_name="report", tooltip="All numbers, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model_a: io.Model.Type,
        model_b: io.Model.Type,
        positive: list,
        negative: list,
        latent_image: dict,
        vae: object,
        model_c: io.Model.Type | None = None,
        model_d: io.Model.Type | None = None,
        seed: int = 0,
        seeds: int = 3,
        steps: int = 20,
        cfg: float = 1.0,
        sampler_name: str = "euler",
        scheduler: str = "simple",
        control: bool = False,
    ) -> io.NodeOutput:
        run = host.Run(cls.hidden.unique_id)
        how = sampling.Settings(
            positive=positive,
            negative=negative,
            latent=latent_image,
            steps=steps,
            cfg=cfg,
            sampler=sampler_name,
            scheduler=scheduler,
            vae=vae,
        )
        models = [(NAMES[0], model_a), (NAMES[1], model_b)]
        models += [(name, model) for name, model in zip(NAMES[2:], (model_c, model_d)) if model]
        runs = [(seed + i) % SEEDS for i in range(seeds)]
        total = len(models) + control
        found = []
        for done, (name, model) in enumerate(models):
            run.on_progress(done, total, name)
            found.append(sampling.sampled(model, name, runs, how))
        again = None
        if control:
            run.on_progress(len(models), total, "control")
            other = [(number + CONTROL) % SEEDS for number in runs]
            again = sampling.sampled(model_a, "A with other seeds", other, how)
        for compared, (_, model) in zip(found[1:], models[1:], strict=True):
            errors, unpatched = sampling.layer_errors(model_a, model)
            compared.layers.update(errors)
            compared.unpatched.update(unpatched)
        run.on_progress(total, total, "")
        report = compare_models(found[0], found[1:], again)
        pictures = sheet(found[0], found[1:], again)[None]
        text = json.dumps(report, indent=2)
        ui = {"fewbits_comparison": [report]}
        return io.NodeOutput(pictures, report["sentence"], text, ui=ui)
