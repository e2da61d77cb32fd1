"""CLIP-L and T5-base, random, as wide as the real ones and a third as deep, quantized and opened by ComfyUI's own loaders and ours over HTTP.

Embeddings are compared as numbers: a node of this test writes them to a file. What a format predicts is measured too:
the same encoder with Gaussian noise on the same layers, as large as the format's own weight error.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.harness import PACK, ComfyServer
from support.harness.workflow import prompt_of
from support.helpers import clip_shapes, gated_t5_shapes, random_tensors, t5_shapes

ENCODERS = {"clip_l": "stable_diffusion", "t5_base": "stable_audio"}  # file -> type of CLIPLoader
LAYERS = 4
# Of this file's ComfyUI. T5-XXL is as wide as T5 v1.1 small: its own takes 9 GB.
T5_SMALL = {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": LAYERS}
SMALLER = {
    "clip_l": {"num_hidden_layers": LAYERS},
    "t5base": {"num_layers": LAYERS},
    "t5xxl": T5_SMALL,
}
FORMATS = ["int8_tensorwise", "float8_e4m3fn", "int8_blockwise", "bnb_nf4"]
EACH = pytest.mark.parametrize("encoder", ENCODERS)
# Error of the quantized encoder over that of the noisy one: measured 0.91 to 1.18 over these (torch 2.11, CPU), with
# embedding errors of 0.020 (INT8 rows), 0.024 (INT8 blocks), 0.065 (FP8) and 0.25 (NF4).
MARGIN = 1.3
WIDTH = 768
POOLED, CONDITIONING = (
    slice(-WIDTH, None),
    slice(-WIDTH),
)  # of what `embed` returns for CLIP-L with another encoder
# Writes a conditioning to a file of the output folder; encoders are as SMALLER says.
PROBE = """
import os

import folder_paths
from comfy.sd1_clip import SDClipModel
from safetensors.torch import save_file

original = SDClipModel.__init__


configs = {f"{name}_model_config": config for name, config in SMALLER.items()}


def smaller(self, *args, model_options={}, **kwargs):
    original(self, *args, model_options={**model_options, **configs}, **kwargs)


SDClipModel.__init__ = smaller


class EmbeddingsOut:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "save", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {"default": ""})}}

    def save(self, conditioning, name):
        embedding, extra = conditioning[0]
        tensors = {"cond": embedding, "pooled": extra.get("pooled_output")}
        tensors = {key: t.float().contiguous() for key, t in tensors.items() if t is not None}
        save_file(tensors, os.path.join(folder_paths.get_output_directory(), f"{name}.safetensors"))
        return {"ui": {"saved": [name]}}


NODE_CLASS_MAPPINGS = {"EmbeddingsOut": EmbeddingsOut}
"""


SHAPES = {
    "clip_l": lambda: clip_shapes(LAYERS),
    "t5_base": lambda: t5_shapes(LAYERS),
    "t5_small": lambda: gated_t5_shapes(**T5_SMALL),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`files(encoder, format)` -> path: "bf16" is the original, "noise-<format>" its noisy twin; each made once."""
    folder, made = tmp_path_factory.mktemp("encoders"), {}

    def path_of(encoder, format="bf16"):
        if (encoder, format) not in made:
            path = folder / f"{encoder}_{format}.safetensors"
            if format == "bf16":
                save_file(original(encoder), path)
            elif format.startswith("noise-"):
                save_file(noisy(load_file(path_of(encoder)), reports[encoder, format[6:]]), path)
            else:
                reports[encoder, format] = quantize_file(
                    path_of(encoder), path, Recipe(parse_wish(format))
                )
            made[encoder, format] = path
        return made[encoder, format]

    reports = {}
    path_of.reports = reports
    return path_of


def original(encoder):
    tensors = random_tensors(SHAPES[encoder]())
    for name in tensors:
        if name.endswith("SelfAttention.q.weight"):
            tensors[name] = (
                tensors[name] / 8
            )  # T5 does not divide by sqrt(64) in attention; its weights do
    return tensors


def noisy(tensors, report):
    """Independent noise on every quantized layer, with the relative error that the format has there."""
    generator = torch.Generator().manual_seed(7)
    out = dict(tensors)
    for result in report.results:
        weight = tensors[f"{result.name}.weight"].float()
        noise = torch.randn(weight.shape, generator=generator)
        out[f"{result.name}.weight"] = (
            weight + noise * (result.rel_l2 * weight.norm() / noise.norm())
        ).bfloat16()
    return out


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """A ComfyUI of its own: encoders are large, and it ends with them."""
    base = tmp_path_factory.mktemp("text_encoders")
    probe = tmp_path_factory.mktemp("nodes") / "embeddings_out"
    probe.mkdir()
    (probe / "__init__.py").write_text(f"SMALLER = {SMALLER}\n{PROBE}", encoding="utf-8")
    shared = {"tree": comfyui, "arguments": ["--cache-none"], "forked": True}
    with ComfyServer(base, custom_nodes=[PACK, probe], **shared) as running:
        yield running


@pytest.fixture(scope="module")
def embed(server):
    """Run a loader (and what comes after it) and return the embeddings of a text; `outputs` are those of its nodes."""
    seen = {}

    def run(loader, *, then=None, text="a watercolor painting of a lighthouse at dawn"):
        workflow = {"loader": loader, **(then or {})}
        clip = [list(workflow)[-1], 0]
        workflow["encode"] = node("CLIPTextEncode", clip=clip, text=text)
        workflow["out"] = node("EmbeddingsOut", conditioning=["encode", 0], name="embeddings")
        key = json.dumps(workflow)
        if key not in seen:
            done = server.run(workflow)
            assert done.status == "success", done.error
            stored = load_file(server.output / "embeddings.safetensors")
            values = torch.cat([stored[name].flatten() for name in sorted(stored)])
            seen[key] = values, done.history["outputs"]
        values, run.outputs = seen[key]
        return values

    return run


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def placed(server, path):
    return server.add_model("text_encoders", path).name


def stock(server, path, kind):
    return node("CLIPLoader", clip_name=placed(server, path), type=kind)


def ours(server, path, kind, **inputs):
    return node("FewBitsLoadTextEncoder", file=placed(server, path), type=kind, **inputs)


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@EACH
@pytest.mark.parametrize("format", FORMATS)
def test_both_loaders_open_the_file_and_the_error_is_what_the_format_predicts(
    server, embed, files, encoder, format
):
    kind = ENCODERS[encoder]
    wanted = embed(stock(server, files(encoder), kind))
    got = embed(stock(server, files(encoder, format), kind))
    predicted = error(embed(stock(server, files(encoder, f"noise-{format}"), kind)), wanted)
    report = files.reports[encoder, format]
    print(
        f"{encoder} {format}: weights {report.rel_l2():.4f}, predicted {predicted:.4f}, got {error(got, wanted):.4f}"
    )
    assert 0 < error(got, wanted) < MARGIN * predicted
    assert torch.equal(embed(ours(server, files(encoder, format), kind)), got)
    (inspection,) = embed.outputs["loader"]["fewbits_inspection"]
    assert inspection["formats"] == {format: len(report.results)} and inspection["findings"] == []


@pytest.mark.parametrize("format", ["int8_tensorwise", "bnb_nf4"])
def test_one_encoder_twice(server, embed, files, format):
    """SD3 takes CLIP-L for both of its CLIPs."""
    plain, small = placed(server, files("clip_l")), placed(server, files("clip_l", format))
    wanted = embed(node("DualCLIPLoader", clip_name1=plain, clip_name2=plain, type="sd3"))
    got = embed(node("DualCLIPLoader", clip_name1=small, clip_name2=small, type="sd3"))
    assert 0 < error(got, wanted) < (0.5 if format == "bnb_nf4" else 0.05)
    both = node("FewBitsLoadTextEncoder", file=small, file2=small, type="sd3")
    assert torch.equal(embed(both), got)


PAIRS = [
    ("bf16", "bf16"), ("int8_tensorwise", "bf16"), ("bf16", "int8_tensorwise"), ("bnb_nf4", "bf16"),
    ("bf16", "bnb_nf4"), ("bnb_nf4", "int8_tensorwise"), ("float8_e4m3fn", "int8_blockwise"), ("bnb_nf4", "bnb_nf4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def flux(server, files):
    """`flux(clip, t5)` -> DualCLIPLoader with CLIP-L and T5 in these formats."""

    def dual(clip="bf16", t5="bf16", *, swap=False):
        names = [placed(server, files("clip_l", clip)), placed(server, files("t5_small", t5))]
        first, second = reversed(names) if swap else names
        return node("DualCLIPLoader", clip_name1=first, clip_name2=second, type="flux")

    return dual


@pytest.mark.parametrize(("clip", "t5"), PAIRS, ids=[f"clip-{clip} t5-{t5}" for clip, t5 in PAIRS])
def test_two_different_encoders_together(embed, flux, clip, t5):
    """Flux: its conditioning is T5's output and its pooled output CLIP-L's, so each shows its own file's error only."""
    wanted, got = embed(flux()), embed(flux(clip, t5))
    assert wanted.numel() == 256 * T5_SMALL["d_model"] + WIDTH
    for encoder, format, part in (("clip", clip, POOLED), ("t5", t5, CONDITIONING)):
        if format == "bf16":
            assert torch.equal(got[part], wanted[part])
        else:
            predicted = error(embed(flux(**{encoder: f"noise-{format}"}))[part], wanted[part])
            print(
                f"{encoder} {format}: predicted {predicted:.4f}, got {error(got[part], wanted[part]):.4f}"
            )
            assert 0 < error(got[part], wanted[part]) < MARGIN * predicted
    assert torch.equal(embed(flux(clip, t5, swap=True)), got)
    names = flux(clip, t5)["inputs"]
    ours = node(
        "FewBitsLoadTextEncoder", file=names["clip_name1"], file2=names["clip_name2"], type="flux"
    )
    assert torch.equal(embed(ours), got)


def test_quantizing_both_in_the_graph_gives_the_embeddings_of_their_files(embed, flux):
    quantize = node("FewBitsQuantizeTextEncoder", clip=["loader", 0], format="bnb_nf4")
    got, wanted = embed(flux(), then={"quantize": quantize}), embed(flux("bnb_nf4", "bnb_nf4"))
    for part in (POOLED, CONDITIONING):
        assert error(got[part], wanted[part]) < 1e-5


@EACH
@pytest.mark.parametrize(("format", "wish"), [("int8_tensorwise", "int8"), ("bnb_nf4", "bnb_nf4")])
def test_quantizing_in_the_graph_gives_the_embeddings_of_the_file(
    server, embed, files, encoder, format, wish
):
    kind = ENCODERS[encoder]
    quantize = node("FewBitsQuantizeTextEncoder", clip=["loader", 0], format=format)
    got = embed(stock(server, files(encoder), kind), then={"quantize": quantize})
    # Weights mapped from a file are aligned differently, and torch then adds in another order.
    assert error(got, embed(stock(server, files(encoder, wish), kind))) < 1e-5


@pytest.mark.parametrize("format", ["int8_blockwise", "bnb_nf4", "int8_tensorwise"])
def test_quantized_kernels_give_nearly_the_same(server, embed, files, format):
    path = files("t5_base", format)
    decoded = embed(ours(server, path, "stable_audio"))
    got = embed(ours(server, path, "stable_audio", quantized_kernels=True))
    # INT8 kernels round activations too: measured 0.013.
    assert error(got, decoded) < 0.05 if format.startswith("int8") else error(got, decoded) < 1e-4


@EACH
def test_clip_save_and_the_stock_loader_round_trip(server, embed, files, encoder):
    kind = ENCODERS[encoder]
    workflow = {
        "loader": stock(server, files(encoder), kind),
        "quantize": node("FewBitsQuantizeTextEncoder", clip=["loader", 0], format="bnb_nf4"),
        "save": node("CLIPSave", clip=["quantize", 0], filename_prefix=f"clip/saved_{encoder}"),
    }
    done = server.run(workflow)
    assert done.status == "success", done.error
    (report,) = done.history["outputs"]["quantize"]["fewbits_report"]
    assert report["kernels"][0].endswith("decoded, then multiplied at full precision")
    (path,) = (server.output / "clip").glob(f"saved_{encoder}*.safetensors")
    got = embed(
        node("CLIPLoader", clip_name=path.name, type=kind)
    )  # the output folder is in the loader's list
    assert error(got, embed(stock(server, files(encoder, "bnb_nf4"), kind))) < 1e-5
    assert path.stat().st_size < 0.75 * files(encoder).stat().st_size  # the embedding table stays


def test_the_example_workflow_runs_as_it_is(server, embed, files, tmp_path):
    path = tmp_path / "clip_l.safetensors"
    path.write_bytes(files("clip_l").read_bytes())
    server.add_model("text_encoders", path)
    graph = json.loads(
        (PACK / "example_workflows" / "Quantize a text encoder.json").read_text(encoding="utf-8")
    )
    done = server.run(prompt_of(server, graph))
    assert done.status == "success", done.error
    (saved,) = (server.output / "clip").glob("clip_l_int8*.safetensors")
    got = embed(node("CLIPLoader", clip_name=saved.name, type="stable_diffusion"))
    assert error(got, embed(stock(server, files("clip_l", "int8"), "stable_diffusion"))) < 1e-5
