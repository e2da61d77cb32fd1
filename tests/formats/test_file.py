"""Formats through the pipeline: planned bytes are written, files decode by the reference, copies change nothing."""

import json

import numpy as np
import pytest
import torch

from fewbits.quant_ops import reference
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.errors import CheckpointError, RecipeError
from fewbits.quant_ops.pipeline import plan_source, quantize
from fewbits.quant_ops.planning.recipe import Recipe, Wish, parse_wish
from fewbits.quant_ops.sources import MemorySink, MemorySource, spec_of
from support.codec import CANONICAL, wish
from support.helpers import EMOJI
from support.vectors import raw


def model() -> dict[str, torch.Tensor]:
    """Layers with whole blocks, padding, odd K, zeros; with and without bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "whole": (256, 512),
        "padded": (250, 490),
        "odd": (64, 33),
        "small": (16, 16),
        "tall": (1000, 64),
    }
    tensors = {
        f"blocks.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }
    tensors["blocks.zeros.weight"] = torch.zeros(64, 256, dtype=torch.bfloat16)
    tensors["blocks.padded.bias"] = torch.randn(250, generator=generator).bfloat16()
    return tensors


def recipe(case: str) -> Recipe:
    name, options = wish(case)
    return Recipe(Wish(name, options), preset="none")


@pytest.mark.parametrize("case", CANONICAL)
def test_every_planned_tensor_is_written_as_planned_and_layers_decode_to_the_weights(case):
    source, sink = MemorySource(model()), MemorySink()
    report = quantize(source, sink, recipe(case))
    assert [spec_of(name, tensor) for name, tensor in sink.tensors.items()] == list(
        report.plan.outputs
    )
    markers = json.loads(sink.metadata["_quantization_metadata"])["layers"]
    assert len(markers) == len(model()) - 1
    measured = {result.name: result.rel_l2 for result in report.results}
    for base, marker in markers.items():
        assert json.loads(raw(sink.tensors[f"{base}.comfy_quant"])) == marker
        prefix = f"{base}."
        own = {
            spec.name.removeprefix(prefix): reference.Stored(
                spec.dtype, spec.shape, raw(sink.tensors[spec.name])
            )
            for spec in report.plan.outputs
            if spec.name.startswith(prefix)
        }
        truth = model()[f"{base}.weight"].float().numpy()
        decoded = reference.decode(marker, own)
        assert decoded.shape == truth.shape
        norm = np.linalg.norm(truth)
        error = np.linalg.norm(decoded - truth) / norm if norm else np.abs(decoded).max()
        assert error < 0.2
        assert error == pytest.approx(measured[base], rel=1e-3, abs=1e-12)


def parsed(metadata: dict[str, str]) -> dict:
    """Metadata with the layers as an object: they are listed in the order of the input, which is that of the file."""
    return {**metadata, "_quantization_metadata": json.loads(metadata["_quantization_metadata"])}


@pytest.mark.parametrize("case", CANONICAL)
def test_a_copy_of_a_quantized_model_has_the_same_tensors_and_metadata(case):
    first, second = MemorySink(), MemorySink()
    quantize(MemorySource(model()), first, recipe(case))
    quantize(MemorySource(first.tensors, first.metadata), second, Recipe(primary=None))
    assert parsed(first.metadata) == parsed(second.metadata)
    assert {name: raw(tensor) for name, tensor in first.tensors.items()} == {
        name: raw(tensor) for name, tensor in second.tensors.items()
    }


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("bnb_nf4", "bnb_nf4:block_size=128"), ("bnb_nf4", "bnb_fp4"), ("nvfp4", "mxfp8"),
        ("int8_tensorwise:convrot", "int8_tensorwise"), ("convrot_w4a4", "convrot_w4a4:convrot_groupsize=256"),
    ],
)  # fmt: skip
def test_quantizing_to_another_geometry_again_is_refused(case, other):
    sink = MemorySink()
    weights = {"blocks.whole.weight": model()["blocks.whole.weight"]}
    quantize(MemorySource(weights), sink, recipe(case))
    with pytest.raises(RecipeError, match="is quantized already"):
        plan_source(
            MemorySource(sink.tensors, sink.metadata), Recipe(parse_wish(other), preset="none")
        )


@pytest.mark.parametrize(
    ("name", "dtype"), [("mxfp8", torch.float8_e8m0fnu), ("nvfp4", torch.uint8)]
)
def test_block_scales_under_comfyui_s_other_dtype_keep_their_bytes(name, dtype):
    """ComfyUI saves E8M0 exponents as F8_E8M0 and reads block scales from either dtype."""
    sink, copy = MemorySink(), MemorySink()
    weights = {"blocks.whole.weight": model()["blocks.whole.weight"]}
    quantize(MemorySource(weights), sink, recipe(name))
    scale = "blocks.whole.weight_scale"
    renamed = {**sink.tensors, scale: sink.tensors[scale].view(dtype)}
    quantize(MemorySource(renamed, sink.metadata), copy, Recipe(primary=None))
    assert copy.tensors[scale].dtype == sink.tensors[scale].dtype
    assert raw(copy.tensors[scale]) == raw(sink.tensors[scale])


def test_side_tensors_that_change_what_a_layer_computes_are_copied_with_it():
    sink, copy = MemorySink(), MemorySink()
    quantize(
        MemorySource({"blocks.whole.weight": model()["blocks.whole.weight"]}), sink, recipe("nvfp4")
    )
    extra = {
        "blocks.whole.input_scale": torch.tensor(0.5),
        "blocks.whole.pre_quant_scale": torch.ones(512),
    }
    quantize(MemorySource({**sink.tensors, **extra}, sink.metadata), copy, Recipe(primary=None))
    assert set(copy.tensors) == {*sink.tensors, *extra}


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2.0**121], ids=["nan", "inf", "huge"]
)
@pytest.mark.parametrize(
    "case",
    ["nvfp4", "mxfp8", "bnb_nf4", "convrot_w4a4", "asym_w4a8_int8", "int8_tensorwise:convrot"],
)
def test_a_weight_that_is_not_finite_stops_the_run(case, value):
    tensors = model()
    tensors["blocks.whole.weight"][3, 5] = value
    with pytest.raises(CheckpointError, match=r"blocks\.whole\.weight.*nothing was written"):
        quantize(MemorySource(tensors), MemorySink(), recipe(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CANONICAL)
def test_the_emoji_model_as_a_file_decodes_by_the_reference(case, tmp_path):
    name, options = wish(case)
    target = tmp_path / "out.safetensors"
    report = quantize_file(EMOJI, target, Recipe(Wish(name, options)))
    decoded = reference.decode_file(target)
    assert len(decoded) == len(report.results) == 22
    assert report.rel_l2() < 0.16
    assert {result.format for result in report.results} == {name}
    assert target.stat().st_size < EMOJI.stat().st_size
