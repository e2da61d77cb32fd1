"""The classic command end to end: its example commands, its corrected mistakes, and its functions."""

import json
import os
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.cli.__main__ import main as fewbits_main
from fewbits.quant_ops.compat import (
    LearnedRoundingConverter,
    convert_fp8_scaled_to_comfy_quant,
    convert_to_fp8_scaled,
    main,
    quantize,
)
from fewbits.quant_ops.errors import QuantError, RecipeError
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.spec import ModelPlan
from support.helpers import EMOJI, random_tensors, tiny_checkpoint

FEW = ["--num_iter", "2"]  # enough to run the loop; its quality is tests/methods'


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def stored(path):
    """base name -> marker of every quantized layer, from the tensors themselves."""
    tensors = load_file(path)
    return {
        name.removesuffix(".comfy_quant"): json.loads(bytes(value.tolist()))
        for name, value in tensors.items()
        if name.endswith(".comfy_quant")
    }


def decoded(path, base):
    """A layer as the reference decoder reads it, (N, K) float32."""
    with FileSource(path) as source:
        specs = {
            n[len(base) + 1 :]: s
            for n, s in source.header.tensors.items()
            if n.startswith(f"{base}.") and not n.endswith(".bias")
        }
        tensors = {suffix: source.read(f"{base}.{suffix}") for suffix in specs}
    marker = json.loads(bytes(tensors.pop("comfy_quant").tolist()))
    format = get_format(marker["format"])
    options = format.options_from(marker, {suffix: specs[suffix] for suffix in tensors})
    return format.dequantize(tensors, format.stored_layer(marker, specs), options)


EXAMPLES = {
    "basic fp8": ("--comfy_quant", {"float8_e4m3fn"}),
    "row": ("--scaling_mode row", {"float8_e4m3fn_rowwise"}),
    "block2d": ("--scaling_mode block2d", {"float8_e4m3fn_blockwise"}),
    "lodewise": ("--int8 --kernel_backend lodewise", {"int8_lodewise"}),
    "nf4": ("--nf4", {"bnb_nf4"}),
    "fp4": ("--fp4", {"bnb_fp4"}),
    "three tiers": (
        r"--fp4 --block_size=64 --fallback=fp8 --custom-layers=.*txt_attn\.proj.* --custom-type=int8 "
        "--custom-block-size=128 --custom-simple",
        {"bnb_fp4", "float8_e4m3fn", "int8_blockwise"},
    ),
    "custom scaling mode": (
        r"--custom-layers=.*txt_attn\.proj.* --custom-type=fp8 --custom-scaling-mode=row",
        {"float8_e4m3fn", "float8_e4m3fn_rowwise"},
    ),
}


@pytest.fixture
def small(tmp_path):
    """A Flux model of one block of each kind; the emoji model takes ten times as long."""
    return tiny_checkpoint(tmp_path / "small.safetensors")


@pytest.mark.slow  # learned rounding of 22 layers, twice
@pytest.mark.parametrize(("arguments", "formats"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_example_commands_give_the_documented_formats(
    small, arguments, formats, tmp_path, capsys
):
    out = tmp_path / "q.safetensors"
    run("-i", small, "-o", out, *arguments.split(), *FEW)
    markers = stored(out)
    assert {marker["format"] for marker in markers.values()} == formats
    shown = capsys.readouterr().out
    assert shown.startswith("+ fewbits quantize ")
    by_name = {base: marker["format"] for base, marker in markers.items()}
    if "int8_blockwise" in formats:
        assert by_name["double_blocks.0.txt_attn.proj"] == "int8_blockwise"
        assert markers["double_blocks.0.txt_attn.proj"]["group_size"] == 128
        assert (
            by_name["txt_in"] == "float8_e4m3fn" and by_name["single_blocks.0.linear1"] == "bnb_fp4"
        )
    again = tmp_path / "again.safetensors"
    equal = shlex.split(shown.splitlines()[0].removeprefix("+ fewbits "))
    assert fewbits_main([str(again) if part == str(out) else part for part in equal]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_example_of_the_issue_runs_as_it_is_written_and_says_that_its_pattern_matches_nothing_here(
    small, tmp_path, capsys
):
    out = tmp_path / "q.safetensors"
    run("-i", small, "-o", out, "--fp4", "--block_size=64", "--fallback=fp8", r"--custom-layers=.*txt_attn\.to_out.*",
        "--custom-type=int8", "--custom-block-size=128", "--custom-simple", *FEW)  # fmt: skip
    assert {marker["format"] for marker in stored(out).values()} == {"bnb_fp4", "float8_e4m3fn"}
    assert r"rule 'search:.*txt_attn\.to_out.*' matched nothing" in capsys.readouterr().err


def test_a_filled_template_decides_every_layer(tmp_path):
    model = tmp_path / "emoji.safetensors"
    model.write_bytes(EMOJI.read_bytes())
    run("-i", model, "--dry-run", "create-template")
    path = tmp_path / "emoji_layer_config_template.json"
    assert main(["-i", str(model), "--layer-config", str(path), "--simple"]) == 2
    template = json.loads(path.read_text())
    template["_default"] = {"skip": True}
    names = [name for name in template if not name.startswith("_")]
    for name in names:
        template[name]["format"] = (
            "int8_tensorwise" if "single" in name else "float8_e4m3fn_rowwise"
        )
    path.write_text(json.dumps(template))
    run("-i", model, "--layer-config", path, "--simple")
    markers = stored(tmp_path / "emoji_float8_e4m3fn_mixed.safetensors")
    assert {name: marker["format"] for name, marker in markers.items()} == {
        n: template[n]["format"] for n in names
    }


@pytest.mark.parametrize("flag", [["--dry-run"], ["--dry-run", "analyze"]], ids=["bare", "analyze"])
def test_a_dry_run_prints_the_plan_and_converts_nothing(flag, tmp_path, capsys):
    run("-i", EMOJI, "-o", tmp_path / "q.safetensors", "--int8", *flag)
    shown = capsys.readouterr().out
    assert (
        "rules, in order; the first that matches a layer decides" in shown
        and "int8_tensorwise" in shown
    )
    assert os.listdir(tmp_path) == []


def test_failures_exit_with_2_and_leave_nothing(tmp_path, capsys):
    damaged = tmp_path / "bad.safetensors"
    damaged.write_bytes(EMOJI.read_bytes()[:1000])
    for arguments in (
        ["-i", tmp_path / "none.safetensors"],
        ["-i", damaged],
        ["-i", EMOJI, "-o", tmp_path / "no" / "such" / "folder.safetensors"],
        ["-i", EMOJI, "-o", damaged],
    ):
        assert main([*map(str, arguments), "--simple"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["bad.safetensors"]


SCALES = {  # flags -> (scale's suffix, shape for a weight of 256 x 128)
    "": ("weight_scale", ()),
    "--scaling_mode row": ("weight_scale", (256,)),
    "--scaling_mode block --block_size 64": ("weight_scale", (256, 2, 1)),
    "--scaling_mode block2d --block_size 64": ("weight_scale", (4, 2)),
    "--int8": ("weight_scale", ()),
    "--int8 --scaling_mode row": ("weight_scale", (256, 1)),
    "--int8 --scaling_mode block --block_size 64": ("weight_scale", (4, 2)),
    "--int8 --kernel_backend lodewise --block_size 64": ("weight_scale", (256, 2)),
    "--nf4": ("absmax", (512,)),
}


@pytest.mark.parametrize(
    ("flags", "scale"), SCALES.items(), ids=lambda value: value if isinstance(value, str) else None
)
def test_a_label_agrees_with_the_stored_scale(flags, scale, tmp_path):
    model = tiny_checkpoint(
        tmp_path / "m.safetensors", {"a.weight": (256, 128), "odd.weight": (100, 70)}
    )
    out = tmp_path / "q.safetensors"
    run("-i", model, "-o", out, "--simple", *flags.split())
    tensors, (suffix, shape) = load_file(out), scale
    assert tensors[f"a.{suffix}"].shape == shape
    for base in stored(out):
        weight = load_file(model)[f"{base}.weight"].float()
        error = (decoded(out, base) - weight).norm() / weight.norm()
        assert error < 0.15, base  # NF4 has 0.09, a wrong label more than 1


FORMAT_FLAGS = ["", "--scaling_mode row", "--scaling_mode block", "--scaling_mode block2d", "--int8", "--int8 --scaling_mode row",
                "--int8 --scaling_mode block", "--int8 --kernel_backend lodewise", "--nf4", "--fp4", "--nvfp4", "--mxfp8",
                "--convrot"]  # fmt: skip


@pytest.mark.parametrize("flags", FORMAT_FLAGS, ids=FORMAT_FLAGS)
def test_odd_and_zero_layers_convert_in_every_format(flags, tmp_path):
    """An odd shape never aborts a run, and zeros stay zeros."""
    tensors = random_tensors(
        {"odd.weight": (100, 70), "odder.weight": (17, 129), "even.weight": (256, 128)}
    )
    tensors["zero.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "m.safetensors")
    out = tmp_path / "q.safetensors"
    run("-i", tmp_path / "m.safetensors", "-o", out, "--simple", *flags.split())
    assert set(stored(out)) == {"odd", "odder", "even", "zero"}
    assert not decoded(out, "zero").any()


def test_int8_rounds_to_nearest_and_does_not_truncate(tmp_path):
    weight = torch.zeros(16, 16)
    weight[0, :6] = torch.tensor([127.0, 63.5, -63.5, 1.9, -1.9, 0.5])
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    run("-i", tmp_path / "m.safetensors", "-o", tmp_path / "q.safetensors", "--int8", "--simple")
    assert load_file(tmp_path / "q.safetensors")["a.weight"][0, :6].tolist() == [
        127,
        64,
        -64,
        2,
        -2,
        0,
    ]


@pytest.fixture
def scaled_file(tmp_path):
    """A legacy scaled_fp8 file with an e4m3, an e5m2 and a high-precision layer."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(32, 48, generator=generator)
    path = tmp_path / "old.safetensors"
    save_file(
        {
            "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn),
            "a.weight": codes.to(torch.float8_e4m3fn), "a.scale_weight": torch.tensor([0.5]),
            "b.weight": codes.to(torch.float8_e5m2), "b.scale_weight": torch.tensor(0.25),
            "norm_out.weight": codes.bfloat16(),
        },
        path,
    )  # fmt: skip
    return path


def test_convert_fp8_scaled_keeps_codes_and_scales_e5m2_too(scaled_file, tmp_path):
    run("-i", scaled_file, "--convert-fp8-scaled", "--hp-filter", "norm")
    out, old = load_file(tmp_path / "old_comfy_quant.safetensors"), load_file(scaled_file)
    for base, label, scale in (("a", "float8_e4m3fn", 0.5), ("b", "float8_e5m2", 0.25)):
        assert torch.equal(
            out[f"{base}.weight"].view(torch.uint8), old[f"{base}.weight"].view(torch.uint8)
        )
        assert (
            out[f"{base}.weight_scale"].item() == scale and out[f"{base}.weight_scale"].shape == ()
        )
        assert stored(tmp_path / "old_comfy_quant.safetensors")[base]["format"] == label
    assert out["norm_out.weight"].dtype == torch.bfloat16


def test_a_filter_that_hits_an_fp8_layer_stops_the_conversion(scaled_file, tmp_path, capsys):
    assert main(["-i", str(scaled_file), "--convert-fp8-scaled", "--hp-filter", "^(a|norm)"]) == 2
    assert "a (F8_E4M3)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["old.safetensors"]


def test_two_equal_runs_are_byte_identical_and_the_seed_is_recorded(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors", {"a.weight": (64, 128)})
    outputs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for out, seed in zip(outputs, (3, 3, 4)):
        run("-i", model, "-o", out, "--int8", "--manual_seed", seed, *FEW)
    first, second, third = (path.read_bytes() for path in outputs)
    assert first == second != third


def test_quiet_prints_nothing_and_json_only_the_report(tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "m.safetensors")
    run("-i", model, "--simple", "--quiet")
    assert capsys.readouterr().out == ""
    run("-i", model, "--int8", "--simple", "--json")
    assert json.loads(capsys.readouterr().out)["family"] == "flux"


def test_an_existing_output_needs_overwrite(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors")
    run("-i", model, "--simple")
    assert main(["-i", str(model), "--simple"]) == 2
    run("-i", model, "--simple", "--overwrite")


def test_quantize_takes_the_flags_as_keywords(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors")
    report = quantize(
        input=model,
        output=tmp_path / "f.safetensors",
        int8=True,
        scaling_mode="row",
        simple=True,
        heur=False,
    )
    run(
        "-i", model, "-o", tmp_path / "c.safetensors", "--int8", "--scaling_mode", "row", "--simple"
    )
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert report.plan.family == "flux"
    assert isinstance(quantize(input=model, nf4=True, dry_run="analyze"), ModelPlan)
    assert quantize(input=model, dry_run="create-template").name == "m_layer_config_template.json"
    with pytest.raises(RecipeError, match="unknown flag --blocksize, did you mean --block_size"):
        quantize(input=model, blocksize=64)
    with pytest.raises(RecipeError, match="--int8 is a switch and takes no value, got 'yes'"):
        quantize(input=model, int8="yes")


def test_convert_to_fp8_scaled_quantizes_as_the_classic_function_did(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors")
    out = tmp_path / "q.safetensors"
    convert_to_fp8_scaled(str(model), str(out), True, {"wan": False, "distillation_small": True}, 3072, -1,
                          int8=True, no_learned_rounding=True, custom_layers="img_in", custom_type="fp8")  # fmt: skip
    markers = stored(out)
    assert (
        markers["img_in"]["format"] == "float8_e4m3fn"
        and markers["final_layer.linear"]["format"] == "int8_tensorwise"
    )
    with pytest.raises(QuantError, match="never written"):
        convert_to_fp8_scaled(str(model), str(out), comfy_quant=False, simple=True)


def test_convert_fp8_scaled_to_comfy_quant_is_the_recode(scaled_file, tmp_path):
    out = tmp_path / "new.safetensors"
    result = convert_fp8_scaled_to_comfy_quant(scaled_file, out, full_precision_mm=True)
    assert sum(result.origins.values()) >= 2
    assert all(marker["full_precision_matrix_mult"] for marker in stored(out).values())


CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8, "fp4": torch.uint8}


@pytest.mark.parametrize("name", CODES)
def test_the_converter_returns_codes_scale_and_the_decoded_weight(name):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    converter = LearnedRoundingConverter(target_format=name, num_iter=3)
    codes, scale, decoded_weight = converter.convert(weight)
    assert (codes.shape, codes.dtype) == (weight.shape, CODES[name])
    assert scale.dtype == torch.float32 and decoded_weight.shape == weight.shape
    assert (decoded_weight - weight.float()).norm() / weight.float().norm() < 0.15
    assert all(
        torch.equal(a, b) for a, b in zip(converter.convert(weight), (codes, scale, decoded_weight))
    )


def test_the_converter_stores_what_the_command_stores(tmp_path):
    weight = random_tensors({"a.weight": (96, 128)})["a.weight"]
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    run(
        "-i",
        tmp_path / "m.safetensors",
        "-o",
        tmp_path / "q.safetensors",
        "--int8",
        "--scaling_mode",
        "row",
        "--simple",
    )
    codes, scale, _ = LearnedRoundingConverter(
        target_format="int8", scaling_mode="row", no_learned_rounding=True
    ).convert(weight)
    tensors = load_file(tmp_path / "q.safetensors")
    assert torch.equal(codes, tensors["a.weight"]) and torch.equal(scale, tensors["a.weight_scale"])


def test_the_converter_refuses_what_does_not_exist_or_fit():
    with pytest.raises(RecipeError, match="unknown format type 'int9', did you mean 'int8'"):
        LearnedRoundingConverter(target_format="int9")
    with pytest.raises(RecipeError, match="no option 'num_iters', did you mean 'num_iter'"):
        LearnedRoundingConverter(num_iters=3)
    with pytest.raises(
        QuantError,
        match=re.escape(
            "int8_blockwise does not take a weight of [100, 128]: N=100 not divisible by 64"
        ),
    ):
        LearnedRoundingConverter(target_format="int8", block_size=64).convert(torch.zeros(100, 128))


@pytest.mark.parametrize("learned", [True, False], ids=["svd", "nearest"])
@pytest.mark.parametrize("target", ["fp8", "int8", "nf4"])
def test_the_converter_takes_parameters_that_still_learn(target, learned):
    weight = torch.nn.Parameter(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    options = {"num_iter": 3} if learned else {"no_learned_rounding": True}
    converter = LearnedRoundingConverter(target_format=target, **options)
    given, plain = converter.convert(weight), converter.convert(weight.detach())
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(given, plain, strict=True))
