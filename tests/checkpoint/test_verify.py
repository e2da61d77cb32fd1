"""`fewbits verify`: each mistake that a file can show, and no false alarm on our own files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.kernels.packing import unswizzle_scales
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.checkpoint.verify import MISTAKES, verify_source
from fewbits.quant_ops.checkpoint.verify.findings import REPAIR
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.doors import quantize_file, repair_file, verify_file
from fewbits.quant_ops.doors.problems import problems
from fewbits.quant_ops.errors import QuantError
from fewbits.quant_ops.planning.recipe import Recipe, Rule, parse_wish
from fewbits.quant_ops.sources import MemorySource
from support import dialects
from support.helpers import EMOJI

WIDE = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
SQUARE = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))


def native(name, weight=WIDE, marker=None, **options):
    """A layer 'a' of a format; `marker` replaces its JSON, or changes it when it is a function."""
    stored, own = dialects.native(name, weight, **options)
    own = marker(own) if callable(marker) else (marker or own)
    return dialects.under("a", stored, own)


def changed(tensors, **replaced):
    out = dict(tensors)
    for suffix, change in replaced.items():
        out[f"a.{suffix}"] = change(out[f"a.{suffix}"]) if callable(change) else change
    return out


def without(key):
    def drop(marker):
        return {name: value for name, value in marker.items() if name != key}

    return drop


ZERO_DEFECT = {"weight": torch.zeros(64, 128, dtype=torch.uint8), "absmax": torch.ones(64, 2, 1)}
NF4 = {"format": "bnb_nf4", "params": {"group_size": 64}, "group_size": 64}
MARKER = torch.zeros(0, dtype=torch.float8_e4m3fn)


def mxfp8_with_nan():
    tensors = native("mxfp8")
    tensors["a.weight"].view(torch.uint8)[0, 0] = 0x7F
    return tensors


def nvfp4_with_nan():
    return changed(native("nvfp4"), weight_scale_2=torch.tensor(float("nan")))


def conv_with_marker():
    codes = torch.randn(4, 4, 3, 3).to(torch.float8_e4m3fn)
    return dialects.under(
        "a", {"weight": codes, "weight_scale": torch.tensor(1.0)}, {"format": "float8_e4m3fn"}
    )


def full_range_without_scale():
    codes = (WIDE / WIDE.abs().max() * 448).to(torch.float8_e4m3fn)
    return {"a.weight": codes}


# name of the mistake -> tensors
SHOWN = {
    "tag-says-one-scale": native("float8_e4m3fn_rowwise", SQUARE, {"format": "float8_e4m3fn"}),
    "scale-not-0d": changed(native("float8_e4m3fn"), weight_scale=lambda s: s.reshape(1)),
    "row-scale-shape": changed(native("int8_tensorwise"), weight_scale=lambda s: s.reshape(-1)),
    "format-missing": dialects.int8_fast("a", WIDE),
    "tag-says-blocks": native("float8_e4m3fn_rowwise", WIDE, {"format": "float8_e4m3fn_blockwise", **{k: NF4[k] for k in ("group_size", "params")}}),
    "group-size-missing": native("float8_e4m3fn_block3d", WIDE, {"format": "float8_e4m3fn_block3d"}),
    "tag-hides-groups": native("float8_e4m3fn_block3d", WIDE, {"format": "float8_e4m3fn"}),
    "scale-not-finite": nvfp4_with_nan(),
    "zero-layer-unpacked": dialects.under("a", ZERO_DEFECT, NF4),
    "nibbles-swapped": dialects.d30("a", WIDE),
    "shape-missing": {name: t for name, t in dialects.d14("a", WIDE).items() if not name.endswith("bias")},
    "input-scale-wrong copy": changed(native("float8_e4m3fn"), input_scale=dialects.native("float8_e4m3fn", WIDE)[0]["weight_scale"]),
    "input-scale-wrong vector": changed(native("float8_e4m3fn"), input_scale=torch.ones(4)),
    "input-scale-wrong format": changed(native("int8_blockwise", WIDE, block_size=64), input_scale=torch.tensor(1.0)),
    "scale-not-float32": changed(native("int8_tensorwise"), weight_scale=lambda s: s.bfloat16()),
    "json-unreadable": changed(native("float8_e4m3fn"), comfy_quant=torch.zeros(30, dtype=torch.uint8)),
    "dummy-scale": {"a.weight": WIDE.bfloat16(), "a.scale_weight": torch.ones(1), "scaled_fp8": MARKER},
    "scale-lost": full_range_without_scale(),
    "marker-prefixed": {**dialects.scaled_fp8("m.a", WIDE), "m.scaled_fp8": MARKER},
    "codes-read-as-numbers embedding": {k.replace("a.", "x.embed_tokens.", 1): v for k, v in native("int8_blockwise", WIDE, block_size=64).items()},
    "codes-read-as-numbers convolution": conv_with_marker(),
    "rotation-impossible tensor scale": changed(native("int8_tensorwise", WIDE, lambda m: {**m, "convrot": True}), weight_scale=torch.tensor(1.0)),
    "rotation-impossible group": native("int8_tensorwise", WIDE, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48}),
    "hybrid-scalar": changed(native("mxfp8", WIDE, lambda m: {**m, "format": "hybrid_mxfp8"}), weight_scalar=torch.tensor(2.0)),
    "int8-tag-wrong": native("int8_lodewise", WIDE, {"format": "int8_tensorwise"}, block_size=64),
    "nan-codes": mxfp8_with_nan(),
    "group-size-once": native("int8_blockwise", WIDE, without("params"), block_size=64),
    "format-unknown": native("float8_e4m3fn", WIDE, {"format": ""}),
    "orphan-side-tensor": {"b.weight": WIDE, "a.weight_scale": torch.ones(())},
    "unreadable": {"a.weight": WIDE.to(torch.float8_e5m2), "a.weight_scale": torch.rand(64)},
}  # fmt: skip


def test_the_lowest_int8_code_is_a_number_like_any_other():
    """Written by tools that divide by 127.5; every reader multiplies it by the scale."""
    tensors = native("int8_tensorwise")
    tensors["a.weight"][0, 0] = -128
    assert verify_source(MemorySource(tensors)).ok


@pytest.mark.parametrize("case", SHOWN)
def test_a_mistake_is_found_by_its_name(case):
    found = verify_source(MemorySource(SHOWN[case]))
    assert case.split()[0] in {finding.name for finding in found.findings}, found.to_text()
    assert not found.ok and all(
        finding.to_text() and MISTAKES[finding.name] is finding.mistake
        for finding in found.findings
    )


REPAIRABLE = [
    case for case in SHOWN if MISTAKES[case.split()[0]].fix == REPAIR or case == "format-unknown"
]


@pytest.mark.parametrize("case", REPAIRABLE)
def test_what_can_be_repaired_is_and_decodes_as_it_should(case, tmp_path):
    broken, fixed = tmp_path / "broken.safetensors", tmp_path / "fixed.safetensors"
    save_file({name: tensor.clone() for name, tensor in SHOWN[case].items()}, broken)
    done = repair_file(broken, fixed)
    assert case.split()[0] in {finding.name for finding in done.fixed}
    assert done.left == () and verify_file(fixed).ok


# Told, and harmless or left: a scale that nothing reads, and an FP8 layer that nobody can mend.
CARRIED = ("orphan-side-tensor", "scale-lost")


@pytest.mark.parametrize("case", SHOWN)
def test_quantize_mends_what_it_carries_over_or_refuses(case, tmp_path):
    """An embedding table in a format that ComfyUI cannot look up was copied, input scales too."""
    broken, made = tmp_path / "broken.safetensors", tmp_path / "made.safetensors"
    tensors = {name: tensor.clone() for name, tensor in SHOWN[case].items()}
    save_file(tensors | {"z.weight": WIDE}, broken)
    rules = tuple(Rule(name, None) for name in ("a", "x*", "m*"))
    try:
        quantize_file(broken, made, Recipe(parse_wish("float8_e4m3fn"), rules=rules, preset="none"))
    except QuantError:
        assert not made.exists()
        return
    left = {finding.name for finding in inspect_findings(made)}
    assert left <= {*CARRIED} & {case}


def inspect_findings(path):
    with FileSource(path) as file:
        return problems(file)


def test_a_repaired_file_is_repaired_to_itself(tmp_path):
    broken, fixed, again = (
        tmp_path / f"{name}.safetensors" for name in ("broken", "fixed", "again")
    )
    save_file(SHOWN["format-missing"], broken)
    repair_file(broken, fixed)
    done = repair_file(fixed, again)
    assert done.fixed == () and again.read_bytes() == fixed.read_bytes()


HEADERS = {
    "header-differs": ({"layers": {"a": {"format": "int8_tensorwise"}}}, "a"),
    "header-unresolved names": ({"layers": {"b": {"format": "int8_tensorwise"}}}, "a"),
    "header-unresolved prefix": (
        {"layers": {"a": {"format": "int8_tensorwise", "per_row": True}}},
        "model.diffusion_model.a",
    ),
    "header-unresolved layers": ({"format_version": "1.0"}, "a"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_file_header_is_found_and_rewritten(case, tmp_path):
    header, base = HEADERS[case]
    tensors = dialects.under(base, *dialects.native("int8_tensorwise", WIDE))
    broken, fixed = tmp_path / "broken.safetensors", tmp_path / "fixed.safetensors"
    save_file(tensors, broken, metadata={"_quantization_metadata": json.dumps(header)})
    done = repair_file(broken, fixed)
    assert case.split()[0] in {finding.name for finding in done.fixed} and verify_file(fixed).ok


@pytest.mark.slow
@pytest.mark.parametrize("wish", ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_tensorwise:convrot=true",
                                  "int8_blockwise", "mxfp8", "nvfp4", "bnb_nf4", "bnb_fp4", "convrot_w4a4",
                                  "asym_w4a8_int8"])  # fmt: skip
def test_our_own_files_have_no_problems_and_small_errors(tmp_path, wish):
    path = tmp_path / "ours.safetensors"
    assert main(["quantize", str(EMOJI), "-o", str(path), "--format", wish, "--quiet"]) == 0
    found = verify_file(path, EMOJI)
    assert found.ok, found.to_text()
    assert found.layers and 0 < found.worst()[0].rel_l2 < 0.2
    assert found.worst()[0].rel_l2 == max(layer.rel_l2 for layer in found.layers)


@pytest.mark.parametrize(
    "make",
    [dialects.bitsandbytes, dialects.nested, dialects.d19, dialects.d19_legacy],
    ids=lambda m: m.__name__,
)
def test_foreign_files_that_are_right_have_no_problems(make):
    original = MemorySource({"a.weight": WIDE})
    found = verify_source(MemorySource(make("a", WIDE)), original)
    assert found.ok and found.layers[0].rel_l2 < 0.12, found.to_text()


def test_two_nibble_orders_in_one_file_are_a_problem():
    found = verify_source(
        MemorySource({**dialects.bitsandbytes("a", WIDE), **dialects.d19("b", WIDE)})
    )
    assert any("low nibble first, others the high" in finding.what for finding in found.findings)
    assert "bnb_nf4 (bitsandbytes, high nibble first)" in found.to_text()


# ---- against the original ----


def against(tensors, original=WIDE, metadata=None):
    found = verify_source(MemorySource(tensors), MemorySource({"a.weight": original}, metadata))
    return {finding.name: finding for finding in found.findings}


def test_truncated_int8_is_told_from_rounded():
    scale = WIDE.abs().amax(1, keepdim=True) / 127
    codes = {"weight": (WIDE / scale).to(torch.int8), "weight_scale": scale}
    assert set(
        against(dialects.under("a", codes, {"format": "int8_tensorwise", "per_row": True}))
    ) == {"truncated"}
    assert not against(native("int8_tensorwise"))


def test_swapped_nibbles_are_told_from_another_model():
    tensors = changed(native("bnb_nf4"), weight=dialects.swapped)
    assert set(against(tensors)) == {"nibbles-swapped"}
    assert set(against(native("bnb_nf4"), torch.randn(64, 128))) == {"far-from-original"}


@pytest.mark.parametrize("group", [16, 64])
def test_a_rotation_that_the_json_does_not_say_is_found(group):
    rotated, _ = dialects.native("int8_tensorwise", WIDE, convrot=True, convrot_groupsize=group)
    tensors = dialects.under("a", rotated, {"format": "int8_tensorwise", "per_row": True})
    found = against(tensors)
    assert (
        set(found) == {"rotation-unsaid"} and f"groups of {group}" in found["rotation-unsaid"].what
    )


def test_clipped_blocks_are_found():
    """Exponents rounded down instead of up, codes clamped accordingly."""
    tensors = native("mxfp8")
    exponents = tensors["a.weight_scale"].view(torch.uint8)
    exponents = exponents - (exponents > 0).to(torch.uint8)  # padding stays zero
    spread = unswizzle_scales(exponents, 64, 4).float().repeat_interleave(32, 1)
    codes = (WIDE / torch.exp2(spread - 127)).clamp(-448, 448).to(torch.float8_e4m3fn)
    found = against({**tensors, "a.weight": codes, "a.weight_scale": exponents})
    assert set(found) == {"blocks-clipped"} and found["blocks-clipped"].what == "256 blocks"
    assert not against(native("mxfp8"))


def test_unswizzled_block_scales_are_found():
    weight = WIDE * torch.logspace(-3, 3, 64)[:, None]
    tensors = native("nvfp4", weight)
    tensors["a.weight_scale"] = (
        tensors["a.weight_scale"].view(torch.uint8).flip(1).roll(3, 0).view(torch.float8_e4m3fn)
    )
    assert set(against(tensors, weight)) & {"block-scales-misplaced"}


def test_lost_metadata_is_found():
    assert set(against(native("int8_tensorwise"), metadata={"config": "{}"})) == {"metadata-lost"}


# ---- the commands ----


def test_the_command_exits_1_on_problems_and_0_without(tmp_path, capsys):
    path = tmp_path / "broken.safetensors"
    save_file(SHOWN["format-missing"], path)
    assert main(["verify", str(path)]) == 1
    assert "format-missing: layer 'a'" in capsys.readouterr().out
    assert main(["verify", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["fix"] == "fewbits repair" and report["ok"] is False
    fixed = tmp_path / "fixed.safetensors"
    assert main(["repair", str(path), "-o", str(fixed)]) == 0
    assert "1 problems fixed, 0 left" in capsys.readouterr().out
    assert main(["verify", str(fixed)]) == 0
    assert torch.equal(load_file(fixed)["a.weight"], SHOWN["format-missing"]["a.weight"])


def test_a_file_that_is_none_exits_2(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    assert main(["verify", str(tmp_path / "x.safetensors")]) == 2
    assert "not a safetensors file" in capsys.readouterr().err


def test_a_file_with_diffusers_names_is_reported(tmp_path):
    path = tmp_path / "diffusers.safetensors"
    tensors = dialects.under(
        "single_transformer_blocks.0.attn.to_q", *dialects.native("int8_tensorwise", WIDE)
    )
    save_file({**tensors, "x_embedder.weight": WIDE}, path)
    assert "foreign-names" in {finding.name for finding in verify_file(path).findings}
