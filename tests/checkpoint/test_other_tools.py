"""Files of other tools: each has a right result or a refusal by name, through every door alike."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.doors import (
    convert_file,
    inspect_file,
    quantize_file,
    repair_file,
    verify_file,
)
from fewbits.quant_ops.errors import CheckpointError, QuantError, RecipeError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects

WIDE = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16
LAST = WIDE.abs().amax(1)


@pytest.fixture
def write(tmp_path):
    def run(tensors, name="in", **metadata):
        path = tmp_path / f"{name}.safetensors"
        stored = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(stored, path, metadata=metadata or None)
        return path

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def recipe(wish="float8_e4m3fn"):
    return Recipe(parse_wish(wish), preset="none")


def rel_l2(weight, truth=WIDE):
    return float((weight.float() - truth).norm() / truth.norm())


def llm_int8(base="a", weight=WIDE):
    scb = weight.abs().amax(1)
    codes = (weight * 127 / scb[:, None]).round().to(torch.int8)
    order = torch.tensor(0, dtype=torch.uint8)
    return {f"{base}.weight": codes, f"{base}.SCB": scb, f"{base}.weight_format": order}


def quanto(dtype, base="a", weight=WIDE):
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(1, keepdim=True) / largest).bfloat16()
    codes = weight / scale.float()
    codes = (
        codes.round().clamp(-127, 127) if dtype == torch.int8 else codes.clamp(-largest, largest)
    )
    return {
        f"{base}.weight._data": codes.to(dtype),
        f"{base}.weight._scale": scale,
        f"{base}.input_scale": torch.tensor(1.0),
        f"{base}.output_scale": torch.tensor(1.0),
    }


def awq_of_comfyui(base="a", group=64):
    """(tensors, the weight they mean) of awq_w4a16."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (64, 256), generator=generator)
    scale = torch.rand(256 // group, 64, generator=generator).half() + 0.1
    zeros = torch.randn(256 // group, 64, generator=generator).half()
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    spread = [part.float().t().repeat_interleave(group, 1) for part in (scale, zeros)]
    stored = {"weight": packed, "weight_scale": scale, "weight_zeros": zeros}
    marker = {"format": "awq_w4a16", "group_size": group}
    return dialects.under(base, stored, marker), (codes.float() - 8) * spread[0] + spread[1]


def auto_awq(base="a"):
    """(tensors, the weight they mean) of AutoAWQ, packed as its own linear layer does it."""
    generator = torch.Generator().manual_seed(2)
    n, k, group = 64, 256, 128
    codes = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.randint(0, 16, (k // group, n), generator=generator)
    scales = torch.rand(k // group, n, generator=generator).half()

    def packed(values):
        words = torch.zeros(values.shape[0], n // 8, dtype=torch.int64)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= values[:, column::8] << (4 * place)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    truth = (codes - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    return {f"{base}.{name}": tensor for name, tensor in tensors.items()}, truth.t()


# ---- what is read ----

READ = {
    "LLM.int8": (llm_int8(), "llm-int8", "int8_tensorwise", 0.01),
    "quanto int8": (quanto(torch.int8), "quanto", "int8_tensorwise", 0.01),
    "quanto e4m3": (quanto(torch.float8_e4m3fn), "quanto", "float8_e4m3fn_rowwise", 0.03),
}


@pytest.mark.parametrize("case", READ)
def test_codes_of_other_tools_become_ours_bit_for_bit(case, write, out):
    tensors, dialect, name, error = READ[case]
    path = write(tensors)
    inspection = inspect_file(path)
    assert inspection.formats == {name: 1} and inspection.findings == ()
    assert list(inspection.dialects)[0].startswith(f"{dialect}: codes kept")
    assert "needs FewBits" in inspection.loads_in
    convert_file(path, out)
    stored = load_file(out)
    codes = next(tensors[key] for key in ("a.weight", "a.weight._data") if key in tensors)
    assert torch.equal(stored["a.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert set(stored) == {"a.weight", "a.weight_scale", "a.comfy_quant"}
    assert verify_file(out, write({"a.weight": WIDE}, "original")).worst()[0].rel_l2 < error
    assert verify_file(out).ok


def test_llm_int8_is_code_times_scb_over_127(write, out):
    tensors = llm_int8()
    convert_file(write(tensors), out, to="bf16")
    wanted = tensors["a.weight"].float() * (tensors["a.SCB"] / 127)[:, None]
    assert torch.equal(load_file(out)["a.weight"], wanted.bfloat16())


def test_llm_int8_in_tiles_of_a_gpu_is_refused(write, out):
    tensors = llm_int8()
    tensors["a.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(
        CheckpointError, match="layer 'a': weight_format is 2.0: the codes are tiled"
    ):
        convert_file(write(tensors), out)


def test_a_repair_of_a_quanto_file_loses_nothing(write, out):
    """Its input_scale was taken for an orphan and dropped, its codes were left under their names."""
    done = repair_file(write(quanto(torch.int8)), out)
    assert done.left == () and rel_l2_of(out) < 0.01


def rel_l2_of(path):
    from fewbits.quant_ops.checkpoint.importers.source import ImportedSource
    from fewbits.quant_ops.checkpoint.reader import FileSource

    with (
        FileSource(path) as file,
        ImportedSource(file, retarget=lambda made: made.decoded("F32", "")) as opened,
    ):
        return rel_l2(opened.read("a.weight"))


def test_packed_quanto_codes_are_refused_by_name(write, out):
    tensors = quanto(torch.int8) | {"a.weight._shift": torch.zeros(64, 1)}
    with pytest.raises(CheckpointError, match="layer 'a': quanto's packed 2 and 4 bit codes"):
        convert_file(write(tensors), out)


def test_auto_awq_is_decoded(write, out):
    tensors, truth = auto_awq()
    convert_file(write(tensors), out)
    assert torch.equal(load_file(out)["a.weight"], truth.half())


REFUSED = {
    "GPTQ": ({"a.qweight": torch.zeros(32, 64, dtype=torch.int32), "a.g_idx": torch.zeros(256)}, "GPTQ"),
    "nunchaku": ({"a.qweight": torch.zeros(64, 64, dtype=torch.int8), "a.wscales": torch.ones(2, 64)}, "nunchaku"),
    "an unknown INT8": ({"a.weight": torch.ones(64, 64, dtype=torch.int8)}, "1 tensors hold codes"),
    "an unknown name": ({"a.weight_blob": torch.ones(64, 64, dtype=torch.uint8)}, "1 tensors hold codes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_nothing_reads_is_a_problem_through_every_door(case, write, out, capsys):
    tensors, why = REFUSED[case]
    path = write(tensors)
    inspection, found = inspect_file(path), verify_file(path)
    assert inspection.findings and "see the problems" in inspection.loads_in and not found.ok
    for door in (
        lambda: quantize_file(path, out, recipe()),
        lambda: quantize_file(path, out, recipe(), requantize=True),
        lambda: convert_file(path, out),
        lambda: convert_file(path, out, to="bf16"),
        lambda: repair_file(path, out),
    ):
        with pytest.raises(CheckpointError, match=why):
            door()
    assert main(["plan", str(path), "--format", "float8_e4m3fn"]) == 2
    assert why in capsys.readouterr().err and not out.exists()


# ---- what ComfyUI reads and nothing here writes ----


def banks():
    rows, _ = dialects.native("int8_tensorwise", WIDE)
    flat = dialects.under("e", rows, {"format": "int8_tensorwise", "num_experts": 4})
    solid = {
        "weight": rows["weight"].view(4, 16, 256),
        "weight_scale": rows["weight_scale"].view(4, 16, 1),
    }
    return {
        "flat": flat,
        "3-D": dialects.under("e", solid, {"format": "int8_tensorwise", "num_experts": 4}),
    }  # fmt: skip


def odd_asym():
    """asym_w4a8_int8 in groups of 4 with a codebook, as a published mix has it."""
    generator = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randint(-128, 128, (64, 128), generator=generator).to(torch.int8),
        "weight_s_rel": (torch.rand(64, 64, generator=generator) + 0.5).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.rand(64, generator=generator) / 100,
        "weight_codebook": torch.linspace(-60, 60, 16),
    }, {"format": "asym_w4a8_int8", "group_size": 4, "convrot_groupsize": 64}


HOST = {
    "awq_w4a16": (awq_of_comfyui()[0], "awq_w4a16", "0.38.0"),
    "flat bank": (banks()["flat"], "int8_tensorwise", "0.38.0"),
    "3-D bank": (banks()["3-D"], "int8_tensorwise", "0.27.0"),
    "asym in groups of 4": (dialects.under("e", *odd_asym()), "asym_w4a8_int8", "0.31.0"),
}


@pytest.mark.parametrize("case", HOST)
def test_layers_of_comfyuis_own_are_copied_through_every_door(case, write, out):
    tensors, name, since = HOST[case]
    path = write({**tensors, "b.weight": WIDE.bfloat16()})
    inspection, found = inspect_file(path), verify_file(path)
    assert inspection.formats == {name: 1} and inspection.findings == () and found.ok
    assert inspection.loads_in.startswith(f"loads in stock ComfyUI >= {since}, if ComfyUI knows")
    doors = {
        "quantize": lambda: quantize_file(path, out, recipe(), overwrite=True).plan,
        "convert": lambda: convert_file(path, out, overwrite=True).report.plan,
        "repair": lambda: repair_file(path, out, overwrite=True),
    }
    for door in doors.values():
        made = door()
        stored = load_file(out)
        assert all(
            torch.equal(stored[key].view(torch.uint8), tensor.contiguous().view(torch.uint8))
            for key, tensor in tensors.items()
            if tensor.dim()
        )
        assert getattr(made, "requires_pack", False) is False and verify_file(out).ok


def test_awq_is_decoded_as_comfy_kitchen_does(write, out):
    tensors, truth = awq_of_comfyui()
    convert_file(write(tensors), out, to="bf16")
    assert torch.equal(load_file(out)["a.weight"], truth.bfloat16())
    layouts = pytest.importorskip("comfy_kitchen.tensor", reason="comfy-kitchen is not installed")
    layout = layouts.TensorCoreAWQW4A16Layout
    params = layout.Params(
        scale=tensors["a.weight_scale"],
        zeros=tensors["a.weight_zeros"],
        group_size=64,
        orig_dtype=torch.float16,
        orig_shape=(64, 256),
    )
    theirs = layout.dequantize(tensors["a.weight"], params).float()
    assert (theirs - truth).abs().max() <= 2**-10 * truth.abs().max()


@pytest.mark.parametrize("case", ["flat", "3-D"])
def test_a_decoded_bank_is_3_d_as_comfyui_reads_it(case, write, out):
    """As a plain 2-D weight ComfyUI took the first expert's rows for all of them."""
    convert_file(write(banks()[case]), out, to="bf16")
    stored = load_file(out)
    assert list(stored) == ["e.weight"] and stored["e.weight"].shape == (4, 16, 256)
    assert rel_l2(stored["e.weight"].view(64, 256)) < 0.01


# ---- JSON ----


@pytest.mark.parametrize("spelling", ["w4a8", "w4a8_int8"])
def test_other_spellings_of_a_format_are_found_and_mended(spelling, write, out):
    stored, marker = dialects.native("asym_w4a8_int8", WIDE)
    path = write(dialects.under("a", stored, {**marker, "format": spelling}))
    assert [finding.name for finding in verify_file(path).findings] == ["format-misspelled"]
    assert inspect_file(path).formats == {"asym_w4a8_int8": 1}
    done = repair_file(path, out)
    assert [finding.name for finding in done.fixed] == ["format-misspelled"] and not done.left


def test_a_marker_without_group_size_is_no_alarm_where_the_format_has_one_only(write):
    """ComfyUI itself writes {"format": "nvfp4"} alone."""
    for name in ("nvfp4", "mxfp8"):
        path = write(dialects.under("a", dialects.native(name, WIDE)[0], {"format": name}))
        assert verify_file(path).ok and inspect_file(path).findings == ()


def test_an_orphan_marker_is_dropped_and_the_weight_kept(write, out):
    marker = dialects.json_tensor({"format": "float8_e4m3fn"})
    path = write({"a.weight": WIDE.bfloat16(), "a.comfy_quant": marker})
    assert [finding.name for finding in verify_file(path).findings] == ["marker-without-codes"]
    done = repair_file(path, out)
    assert done.left == () and list(load_file(out)) == ["a.weight"]
    assert torch.equal(load_file(out)["a.weight"], WIDE.bfloat16())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_transposed_block_scales_do_not_pass(name, write, out):
    stored, marker = dialects.native(name, torch.randn(128, 256))
    raw = stored["weight_scale"].view(torch.uint8).t().contiguous()
    stored["weight_scale"] = raw.view(stored["weight_scale"].dtype)
    path = write(dialects.under("a", stored, marker))
    assert not verify_file(path).ok and inspect_file(path).findings
    with pytest.raises(CheckpointError, match="weight_scale is"):
        convert_file(path, out)


# ---- nothing is called fixed or done that is not ----


def lost(marked=True):
    codes = (WIDE / WIDE.abs().max() * 448).to(torch.float8_e4m3fn)
    marker = dialects.json_tensor({"format": "float8_e4m3fn"})
    return {"a.weight": codes} | ({"a.comfy_quant": marker} if marked else {})


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "bare"])
def test_a_lost_scale_is_left_and_told(marked, write, out, capsys):
    path = write({**lost(marked), **dialects.int8_fast("b", WIDE)})
    assert main(["repair", str(path), "-o", str(out)]) == 1
    assert "scale-lost" in capsys.readouterr().out
    stored = load_file(out)
    assert "a.weight_scale" not in stored and ("a.comfy_quant" in stored) is marked
    assert {finding.name for finding in verify_file(out).findings} >= {"scale-lost"}
    with pytest.raises(CheckpointError, match="layer 'a'.*no scale: it was lost"):
        convert_file(path, out, overwrite=True)
    assert "b.weight_scale" in load_file(out)  # what was there stays when a run fails


def test_a_run_that_quantizes_nothing_is_refused(write, out, capsys):
    path = write(
        {"encoder.conv.weight": torch.randn(32, 32, 3, 3), "encoder.conv.bias": torch.zeros(32)}
    )
    assert main(["quantize", str(path), "-o", str(out), "--format", "float8_e4m3fn"]) == 2
    error = capsys.readouterr().err
    assert "nothing would be quantized" in error and "not 2-D (4-D)" in error and not out.exists()


@pytest.mark.parametrize(
    "options", [{"nibble_order": "low"}, {"assume": "nf4"}, {"assume_convrot": 64}], ids=str
)
def test_what_the_user_says_to_no_effect_is_refused(options, write, out):
    path = write(dialects.under("a", *dialects.native("int8_tensorwise", WIDE)))
    with pytest.raises(RecipeError, match="no .*layer leaves it open"):
        repair_file(path, out, options=ImportOptions(**options))
    assert not out.exists()


def test_a_finished_file_with_a_problem_is_not_kept(write, out, monkeypatch):
    """The last check: a label that a defect would get wrong."""
    from fewbits.quant_ops.formats import get_format

    format = type(get_format("float8_e4m3fn_rowwise"))
    monkeypatch.setattr(format, "marker", lambda self, layer, options: {"format": "float8_e4m3fn"})
    path = write({"a.weight": WIDE})
    out.write_bytes(b"what was there")
    with pytest.raises(CheckpointError, match="finished file has 1 problems.*tag-says-one-scale"):
        quantize_file(path, out, recipe("float8_e4m3fn_rowwise"), overwrite=True)
    assert out.read_bytes() == b"what was there"
    assert sorted(entry.name for entry in out.parent.iterdir()) == [
        "in.safetensors",
        "out.safetensors",
    ]


# ---- NVFP4 without JSON ----


def bare_nvfp4(low_first=True, swizzled=False, spread=1.5):
    """As NVIDIA's tools store it: rows of scales in order, the low nibble first."""
    from fewbits.kernels.packing import unswizzle_scales

    rows = torch.logspace(-spread, spread, 128, base=2)[torch.randperm(128)]
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(5)) * rows[:, None] / 16
    stored, _ = dialects.native("nvfp4", weight)
    if low_first:
        stored["weight"] = dialects.swapped(stored["weight"])
    if not swizzled:
        grid = unswizzle_scales(stored["weight_scale"].view(torch.uint8), 128, 16)
        stored["weight_scale"] = grid.contiguous().view(torch.float8_e4m3fn)
    return weight, {f"a.{name}": tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("swizzled", [False, True], ids=["in order", "swizzled"])
@pytest.mark.parametrize("order", ["low", "high"])
def test_nvfp4_without_json_is_read_when_the_user_says_so(order, swizzled, write, out):
    weight, tensors = bare_nvfp4(order == "low", swizzled)
    path = write(tensors)
    options = ImportOptions(assume="nvfp4", nibble_order=order)
    repair_file(path, out, options=options)
    assert verify_file(out, write({"a.weight": weight}, "original")).worst()[0].rel_l2 < 0.12


def test_nvfp4_without_json_is_refused_without_a_word_or_where_it_cannot_be(write, out, capsys):
    _, tensors = bare_nvfp4()
    path = write(tensors)
    assert main(["repair", str(path), "-o", str(out)]) == 2
    assert "say that it is nvfp4 (--assume)" in capsys.readouterr().err
    assert main(["repair", str(path), "-o", str(out), "--assume", "nvfp4"]) == 2
    assert "which nibble comes first does not show" in capsys.readouterr().err
    said = ["--assume", "nvfp4", "--nibble-order", "low"]
    reciprocal = tensors | {"a.weight_scale_2": 1 / tensors["a.weight_scale_2"]}
    assert main(["repair", str(write(reciprocal)), "-o", str(out), *said]) == 2
    assert "weight_scale_2 is a reciprocal" in capsys.readouterr().err
    _, even = bare_nvfp4(spread=0.0)
    assert main(["repair", str(write(even)), "-o", str(out), *said]) == 2
    assert "the order of its block scales does not show" in capsys.readouterr().err


# ---- from one quantized format to another ----


def test_requantizing_rounds_again_and_says_so(write, out, capsys):
    stored, marker = dialects.native("float8_e4m3fn", WIDE)
    same = dialects.under("b", *dialects.native("int8_tensorwise", WIDE))
    path = write({**dialects.under("a", stored, marker), **same})
    with pytest.raises(QuantError, match="quantized already"):
        quantize_file(path, out, recipe("int8_tensorwise"))
    report = quantize_file(path, out, recipe("int8_tensorwise"), requantize=True)
    assert report.rounded_twice == ("a",) and report.to_json()["rounded_twice"] == ["a"]
    (warning,) = [text for text in report.plan.warnings if "rounded a second time" in text]
    assert "the first format, which is unknown" in warning and "which is the one rep" in warning
    made = load_file(out)
    assert torch.equal(made["b.weight"], same["b.weight"])  # in that format already: codes copied
    decoded = stored["weight"].float() * stored["weight_scale"]
    wanted, _ = dialects.native("int8_tensorwise", decoded)
    assert torch.equal(made["a.weight"], wanted["weight"])
    assert verify_file(out).ok
    command = ["quantize", str(path), "-o", str(out), "--overwrite", "--format", "int8_tensorwise"]
    assert main([*command, "--requantize"]) == 0
    assert "rounded a second time" in capsys.readouterr().out


def test_layers_that_the_recipe_keeps_are_not_rounded_again(write, out):
    stored, marker = dialects.native("float8_e4m3fn", WIDE)
    path = write({**dialects.under("a", stored, marker), **dialects.under("b", stored, marker)})
    from fewbits.quant_ops.planning.recipe import Rule

    wish = Recipe(parse_wish("int8_tensorwise"), rules=(Rule("b", None),), preset="none")
    report = quantize_file(path, out, wish, requantize=True)
    made = load_file(out)
    assert report.rounded_twice == ("a",) and made["b.weight"].dtype == torch.float8_e4m3fn


# ---- parts that ComfyUI reads quantized and nothing here makes ----


PARTS = {
    "MiniMax H3 VAE": (
        ["decoder.transformer_blocks.0.scale1", "encoder.down.5.block.0.conv1.weight"],
        "decoder.transformer_blocks.0.attn.to_out",
        "0.33.0",
    ),
    "Qwen-Image 2.1 ControlNet": (
        ["control_img_in.weight", "control_blocks.0.img_mlp.out.weight"],
        "control_blocks.0.attn.to_q",
        "0.38.0",
    ),
    "MiniMax H3 ControlNet": (
        ["control_proj_in.weight", "control_blocks.0.mlp.fc1.weight"],
        "control_blocks.0.attn.qkv_proj",
        "0.38.0",
    ),
}


@pytest.mark.parametrize("prefix", ["", "vae."])
@pytest.mark.parametrize("part", PARTS)
def test_a_quantized_part_that_comfyui_reads_is_copied(part, prefix, write, out):
    keys, base, since = PARTS[part]
    codes = dialects.under(prefix + base, *dialects.native("int8_tensorwise", WIDE))
    tensors = {**{prefix + key: WIDE.bfloat16() for key in keys}, **codes}
    path = write(tensors)
    inspection = inspect_file(path)
    assert part in inspection.family and inspection.findings == ()
    assert inspection.loads_in == f"loads in stock ComfyUI >= {since}"
    assert verify_file(path).ok
    for door in (convert_file, repair_file):
        door(path, out, overwrite=True)
        stored = load_file(out)
        assert all(torch.equal(stored[name], tensor) for name, tensor in codes.items())
    with pytest.raises(QuantError, match=f"this is a {part} file: FewBits quantizes no"):
        quantize_file(path, out, recipe("int8"), overwrite=True)


def test_other_controlnets_and_vaes_with_codes_are_a_problem_by_name(write):
    for keys in (
        ["decoder.conv_in.weight", "encoder.conv_in.weight"],
        ["input_hint_block.0.weight", "zero_convs.0.0.weight"],
    ):
        codes = dialects.under("mid.attn", *dialects.native("int8_tensorwise", WIDE))
        path = write({**dict.fromkeys(keys, WIDE), **codes})
        (found,) = verify_file(path).findings
        assert found.name == "foreign-names" and "see the problems" in inspect_file(path).loads_in
