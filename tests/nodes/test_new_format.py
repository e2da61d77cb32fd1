"""A format is one class and one call: defined here alone, it is planned, converted, verified, loaded and run."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.kernels.grids import TiledGrid
from fewbits.kernels.levels import INT4
from fewbits.kernels.scales import Geometry
from fewbits.quant_ops.doors import inspect_file, quantize_file, verify_file
from fewbits.quant_ops.formats import FORMATS, Format, FormatOptions
from fewbits.quant_ops.formats.base import register_format, with_precision
from fewbits.quant_ops.planning.layer_config import parse_layer_config
from fewbits.quant_ops.planning.recipe import Recipe, parse_rule, parse_wish


class Toy(Format):
    """Codes from -7 to 7, one a byte; `toy_scale` is shared by one row, or by two."""

    name, short = "toy_rows", "toy"
    native, min_comfyui = False, "0.8.0"
    stores = "one scale per row or two"
    layout_options = ("rows",)

    @dataclass(frozen=True)
    class Options(FormatOptions):
        rows: int = 1

        choices: ClassVar = {"rows": (1, 2)}

    def check(self, layer, options):
        return f"N={layer.shape[0]} is odd" if layer.shape[0] % options.rows else None

    def tensor_specs(self, layer, options):
        scales = layer.shape[0] // options.rows
        return {"weight": ("I8", layer.shape), "toy_scale": ("F32", (scales,))}

    def marker(self, layer, options):
        return with_precision({"format": self.name, "rows": options.rows}, options)

    def stored_options(self, marker, specs):
        return {"rows": marker.get("rows")}

    def grid(self, layer, options):
        return TiledGrid(INT4, Geometry(options.rows, None))

    def pack(self, codes, scale, options):
        return {"weight": codes, "toy_scale": scale.reshape(-1)}

    def dequantize(self, tensors, layer, options):
        scale = tensors["toy_scale"].repeat_interleave(options.rows)
        return tensors["weight"].float() * scale[:, None]


@pytest.fixture(autouse=True)
def toy(comfy, monkeypatch):
    """Registered as a module of `quant_ops/formats` would do it, then told to ComfyUI as at its start."""
    import comfy.quant_ops

    from fewbits.nodes.bridge.seams import formats

    monkeypatch.delenv("FEWBITS_VERIFY")  # the reference decoder does not know toys
    register_format(Toy())
    formats.install()
    yield
    del FORMATS[Toy.name], comfy.quant_ops.QUANT_ALGOS[Toy.name]
    formats.OWNED.discard(Toy.name)


@pytest.fixture
def file(model_file, tmp_path):
    """The tiny Flux with scales shared by two rows."""
    path = tmp_path / "toy.safetensors"
    recipe = Recipe(parse_wish("toy:rows=2"))
    quantize_file(model_file, path, recipe)
    return path


def test_every_door_reads_its_name_and_its_options():
    wish = parse_wish("toy:rows=2")
    assert wish.format == Toy.name and wish.options == Toy.Options(rows=2)
    assert parse_rule("blocks.*=toy:rows=2").wish == wish
    table = {"*": {"format": "toy", "rows": 2}}
    assert parse_layer_config(table).entries[0].wish == wish
    problem = {"*": {"format": "toy_rows", "rows": 3}}
    with pytest.raises(Exception, match="'rows' must be one of 1, 2, got 3"):
        parse_layer_config(problem)


def test_it_is_planned_converted_and_verified(file, model_file):
    stored = load_file(file)
    marker = json.loads(bytes(stored["double_blocks.0.img_attn.qkv.comfy_quant"].tolist()))
    assert marker == {"format": "toy_rows", "rows": 2}
    assert stored["double_blocks.0.img_attn.qkv.toy_scale"].shape == (192,)
    found = verify_file(file, model_file)
    assert found.ok, found.findings
    assert {layer.format for layer in found.layers} == {"toy_rows"}
    assert 0.05 < found.worst()[0].rel_l2 < 0.2
    inspected = inspect_file(file)
    assert set(inspected.formats) == {"toy_rows"} and not inspected.findings
    assert inspected.loads_in == "needs FewBits in ComfyUI >= 0.18.0"


def test_a_shape_that_it_does_not_take_is_kept_with_its_reason():
    from fewbits.quant_ops.planning.planner import make_plan
    from fewbits.quant_ops.spec import Header, TensorSpec

    spec = TensorSpec("a.weight", "BF16", (33, 64))
    (layer,) = make_plan(Header({spec.name: spec}), Recipe(parse_wish("toy:rows=2"))).layers
    assert (layer.action, layer.reason) == ("keep", "primary; N=33 is odd")


def test_the_stock_loader_opens_it_and_it_runs_as_its_decoded_weights_do(
    comfy, file, sample, tmp_path
):
    stored, plain = load_file(file), tmp_path / "plain.safetensors"
    for name in [name for name in stored if name.endswith(".toy_scale")]:
        base = name.removesuffix(".toy_scale")
        scale = stored.pop(name).repeat_interleave(2)
        stored[f"{base}.weight"] = stored[f"{base}.weight"].float() * scale[:, None]
        del stored[f"{base}.comfy_quant"]
    save_file(stored, plain)
    loaded = comfy.sd.load_diffusion_model(str(file))
    layer = loaded.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert layer.quant_format == "toy_rows" and layer.weight._qdata.dtype == torch.int8
    drawn = sample(loaded)
    assert torch.equal(drawn, sample(comfy.sd.load_diffusion_model(str(plain))))
    assert drawn.isfinite().all() and drawn.std() > 0


def test_the_graph_writes_the_same_bytes(model, quantize, save, file, tmp_path):
    quantized, report = quantize(model, "toy:rows=2")
    assert {layer.format for layer in report.plan.layers if layer.format} == {"toy_rows"}
    saved = tmp_path / "saved.safetensors"
    save(quantized, saved)
    ours, theirs = load_file(saved), load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
