"""`fewbits convert`: dialect to dialect without new codes; scaled FP8 row by row."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.sources import spec_of
from support import dialects
from support.helpers import EMOJI, fewbits

WIDE = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
MARKER = torch.zeros(0, dtype=torch.float8_e4m3fn)


@pytest.fixture
def write(tmp_path):
    def run(tensors, **metadata):
        path = tmp_path / "in.safetensors"
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()},
            path,
            metadata=metadata or None,
        )
        return path

    return run


@pytest.fixture
def convert(write, tmp_path, capfd):
    """(exit status, output path, captured text)"""

    def run(tensors, *arguments, **metadata):
        output = tmp_path / "out.safetensors"
        status = main(["convert", str(write(tensors, **metadata)), "-o", str(output), *arguments])
        return status, output, capfd.readouterr()

    return run


def markers(path):
    with FileSource(path) as source:
        header = json.loads(source.header.metadata["_quantization_metadata"])["layers"]
    stored = {
        name.removesuffix(".comfy_quant"): json.loads(bytes(tensor.tolist()))
        for name, tensor in load_file(path).items()
        if name.endswith(".comfy_quant")
    }
    assert header == stored
    return header


def mixed_fp8():
    """One of everything that a scaled FP8 file may hold."""
    e4m3, e5m2 = WIDE.to(torch.float8_e4m3fn), WIDE.to(torch.float8_e5m2)
    return {
        "scaled_fp8": MARKER,
        "scalar.weight": e4m3, "scalar.scale_weight": torch.tensor([0.5]), "scalar.scale_input": torch.ones(1),
        "scalar.bias": torch.ones(32, dtype=torch.float16),
        "rows.weight": e4m3, "rows.scale_weight": torch.rand(32) + 1,
        "wide.weight": e5m2, "wide.scale_weight": torch.tensor(0.25),
        "bare.weight": e4m3,
        "precise.weight": WIDE.bfloat16(), "precise.scale_weight": torch.tensor([3.0]),
        "norm.weight": torch.ones(32).to(torch.float8_e4m3fn),
        "gone.scale_weight": torch.ones(1),
    }  # fmt: skip


def test_scaled_fp8_becomes_comfy_quant_table_by_table(convert):
    tensors = mixed_fp8()
    status, output, text = convert(
        tensors, "--to", "comfy_quant", config="{}", **{"modelspec.title": "x"}
    )
    assert status == 0
    out = load_file(output)
    assert markers(output) == {
        "scalar": {"format": "float8_e4m3fn"},
        "rows": {"format": "float8_e4m3fn_rowwise"},
        "wide": {"format": "float8_e5m2", "full_precision_matrix_mult": True},
        "bare": {"format": "float8_e4m3fn"},
    }
    for base in ("scalar", "rows", "wide", "bare"):
        assert torch.equal(
            out[f"{base}.weight"].view(torch.uint8), tensors[f"{base}.weight"].view(torch.uint8)
        )
    assert out["scalar.weight_scale"].shape == () and out["scalar.weight_scale"] == 0.5
    assert torch.equal(out["rows.weight_scale"], tensors["rows.scale_weight"])
    assert out["wide.weight_scale"] == 0.25 and out["bare.weight_scale"] == 1.0
    assert out["scalar.input_scale"].shape == () and out["scalar.input_scale"] == 1.0
    assert (
        torch.equal(out["scalar.bias"], tensors["scalar.bias"])
        and out["scalar.bias"].dtype == torch.float16
    )
    assert torch.equal(out["precise.weight"], tensors["precise.weight"])
    assert out["norm.weight"].dtype == torch.bfloat16
    assert not [
        name
        for name in out
        if "scale_weight" in name or "scaled_fp8" in name or name.startswith("gone")
    ]
    with safe_open(output, "pt") as file:
        assert file.metadata()["config"] == "{}" and file.metadata()["modelspec.title"] == "x"
        assert file.metadata()["fewbits.requires_pack"] == "true"
    assert "3.0 is dropped" in text.out and "'gone.scale_weight' dropped" in text.out
    assert "no scale: assumed 1.0" in text.out


CASES = {
    "scaled_fp8": mixed_fp8(),
    "bitsandbytes": dialects.bitsandbytes("a", WIDE),
    "nested": dialects.nested("a", WIDE),
    "D30": dialects.d30("a", WIDE, "fp4"),
    "D14": dialects.d14("a", WIDE),
    "INT8-Fast": {**dialects.int8_fast("z", WIDE), **dialects.int8_fast("a", WIDE)},
    "plain FP8": {"a.weight": WIDE.to(torch.float8_e5m2)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_second_run_changes_nothing(convert, tmp_path, case):
    status, output, _ = convert(CASES[case])
    assert status == 0
    again = tmp_path / "again.safetensors"
    assert main(["convert", str(output), "-o", str(again), "--quiet"]) == 0
    assert again.read_bytes() == output.read_bytes()


def test_converting_our_own_file_changes_nothing(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(["quantize", str(EMOJI), "-o", str(first), "--format", "bnb_nf4", "--quiet"]) == 0
    assert main(["convert", str(first), "-o", str(second), "--quiet"]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_export_to_bitsandbytes_and_back_gives_the_same_bytes(tmp_path):
    ours, theirs, back = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "back"))
    assert main(["quantize", str(EMOJI), "-o", str(ours), "--format", "bnb_nf4", "--quiet"]) == 0
    assert main(["convert", str(ours), "-o", str(theirs), "--to", "bnb", "--quiet"]) == 0
    exported = load_file(theirs)
    assert not [name for name in exported if name.endswith("comfy_quant")]
    with safe_open(theirs, "pt") as file:
        assert not [key for key in (file.metadata() or {}) if key.startswith(("fewbits", "_quant"))]
    assert main(["convert", str(theirs), "-o", str(back), "--quiet"]) == 0
    first, second = load_file(ours), load_file(back)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("group", [64, 128])
def test_bitsandbytes_itself_decodes_what_we_export(tmp_path, kind, group):
    import bitsandbytes.functional as oracle

    from fewbits.quant_ops.formats import get_format

    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    stored, marker = dialects.native(f"bnb_{kind}", weight, block_size=group)
    save_file(dialects.under("a", stored, marker), ours)
    assert main(["convert", str(ours), "-o", str(theirs), "--to", "bnb", "--quiet"]) == 0
    pieces = {
        name.removeprefix("a.weight."): t
        for name, t in load_file(theirs).items()
        if name != "a.weight"
    }
    state = oracle.QuantState.from_dict(pieces, torch.device("cpu"))
    decoded = oracle.dequantize_4bit(load_file(theirs)["a.weight"], state)
    format = get_format(f"bnb_{kind}")
    specs = {name: spec_of(name, tensor) for name, tensor in stored.items()}
    ours = format.dequantize(
        stored, format.stored_layer(marker, specs), format.options_from(marker, specs)
    )
    assert decoded.shape == weight.shape and torch.equal(decoded, ours)


def test_other_layers_are_decoded_to_their_own_dtype_for_bitsandbytes(convert):
    tensors = {
        **dialects.bitsandbytes("a", WIDE),
        **dialects.under("b", *dialects.native("int8_tensorwise", WIDE)),
    }
    status, output, _ = convert(tensors, "--to", "bnb")
    assert status == 0
    out = load_file(output)
    assert (
        out["b.weight"].dtype == torch.bfloat16
        and "b.weight_scale" not in out
        and out["a.weight"].shape[1] == 1
    )


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "int8_tensorwise", "bnb_nf4", "mxfp8", "nvfp4", "convrot_w4a4"]
)
def test_bf16_is_the_decoder_rounded_once(convert, name):
    from fewbits.quant_ops.formats import get_format

    weight = torch.randn(32, 256)
    stored, marker = dialects.native(name, weight)
    status, output, _ = convert(dialects.under("a", stored, marker), "--to", "bf16")
    assert status == 0
    format = get_format(name)
    specs = {suffix: spec_of(suffix, tensor) for suffix, tensor in stored.items()}
    decoded = format.dequantize(
        stored, format.stored_layer(marker, specs), format.options_from(marker, specs)
    )
    out = load_file(output)
    assert list(out) == ["a.weight"] and torch.equal(out["a.weight"], decoded.bfloat16())


# ---- options and refusals ----


def test_the_filter_refuses_and_writes_nothing(convert, tmp_path):
    status, output, text = convert(mixed_fp8(), "--hp-filter", "scalar|wide|precise")
    assert status == 2
    assert (
        "scalar (F8_E4M3)" in text.err
        and "wide (F8_E5M2)" in text.err
        and "precise" not in text.err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]


def test_the_filter_counts_what_it_matches(convert):
    status, _, text = convert(mixed_fp8(), "--hp-filter", "^prec")
    assert status == 0 and "1 layers match the filter" in text.out


def test_a_filter_that_matches_nothing_warns(convert, caplog):
    assert convert(mixed_fp8(), "--hp-filter", "nothing")[0] == 0
    assert "matches no layer" in caplog.text


def test_an_invalid_filter_is_refused_before_the_file_is_read(tmp_path, capsys):
    status = main(
        [
            "convert",
            str(tmp_path / "absent.safetensors"),
            "-o",
            str(tmp_path / "o.safetensors"),
            "--hp-filter",
            "(",
        ]
    )
    assert status == 2 and "not a regular expression" in capsys.readouterr().err


def test_full_precision_is_asked_for_every_fp8_layer(convert):
    status, output, _ = convert(mixed_fp8(), "--full-precision-mm")
    assert status == 0 and all(
        marker["full_precision_matrix_mult"] for marker in markers(output).values()
    )


def test_only_scaled_fp8_files_when_asked(convert):
    status, _, text = convert(dialects.bitsandbytes("a", WIDE), "--from", "fp8_scaled")
    assert status == 2 and "not a scaled_fp8 file" in text.err
    assert convert({"a.weight": WIDE.to(torch.float8_e4m3fn)}, "--from", "fp8_scaled")[0] == 2
    assert convert(mixed_fp8(), "--from", "fp8_scaled")[0] == 0


def test_a_missing_marker_is_a_warning(convert):
    status, _, text = convert(dialects.scaled_fp8("a", WIDE))
    assert status == 0 and "without a scaled_fp8 marker" in text.out


def test_a_row_scale_of_e5m2_is_refused(convert):
    status, output, text = convert(
        {"a.weight": WIDE.to(torch.float8_e5m2), "a.scale_weight": torch.rand(32)}
    )
    assert status == 2 and "layer 'a'" in text.err and not output.exists()


def test_shapes_come_from_the_original_when_asked(convert, tmp_path):
    flat = dialects.d14("a", WIDE)
    del flat["a.bias"]
    assert convert(flat)[0] == 2
    original = tmp_path / "original.safetensors"
    save_file({"a.weight": WIDE}, original)
    status, output, _ = convert(flat, "--shapes-from", str(original))
    assert status == 0 and load_file(output)["a.weight"].shape == (32, 64)


def test_unsaid_4_bit_types_and_rotations_come_from_the_user(convert):
    stored, _ = dialects.native("bnb_fp4", WIDE)
    tensors = {"a.weight": dialects.swapped(stored["weight"]).reshape(-1), "a.scale_weight": stored["absmax"],
               "a.bias": torch.zeros(32), "scaled_fp8": MARKER}  # fmt: skip
    assert convert(tensors)[0] == 2
    assert markers(convert(tensors, "--assume", "fp4")[1])["a"]["format"] == "bnb_fp4"
    rotated = dialects.int8_fast("a", WIDE, 64)
    del rotated["a.comfy_quant"]
    assert (
        markers(convert(rotated, "--assume-convrot", "64", "--overwrite")[1])["a"][
            "convrot_groupsize"
        ]
        == 64
    )


def test_the_command_prints_json_and_leaves_an_existing_output_alone(write, tmp_path):
    path, output = write(dialects.bitsandbytes("a", WIDE)), tmp_path / "out.safetensors"
    done = fewbits("convert", path, "-o", output, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["origins"] == {"bitsandbytes: codes kept": 1}
    again = fewbits("convert", path, "-o", output)
    assert (
        again.returncode == 2
        and "exists already" in again.stderr
        and len(again.stderr.splitlines()) == 1
    )


# ---- the other commands on foreign files ----


def test_inspect_says_dialect_and_problems(write, capsys):
    assert main(["inspect", str(write(dialects.int8_fast("a", WIDE)))]) == 0
    text = capsys.readouterr().out
    assert (
        "1 layers  in dialect int8-fast: format added" in text
        and "format-missing" in text
        and "needs FewBits" in text
    )


def test_quantize_refuses_to_round_a_foreign_layer_again_and_copies_its_codes(
    write, tmp_path, capsys
):
    path, output = write(dialects.bitsandbytes("a", WIDE)), tmp_path / "out.safetensors"
    assert (
        main(["quantize", str(path), "-o", str(output), "--format", "int8_tensorwise", "--quiet"])
        == 2
    )
    assert "quantized already (bnb_nf4)" in capsys.readouterr().err
    assert main(["quantize", str(path), "-o", str(output), "--format", "bnb_nf4", "--quiet"]) == 0
    assert torch.equal(load_file(output)["a.weight"], dialects.native("bnb_nf4", WIDE)[0]["weight"])


def test_bitsandbytes_keys_are_labelled_as_what_reads_them(tmp_path, capsys):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert main(["quantize", str(EMOJI), "-o", str(ours), "--format", "bnb_nf4", "--quiet"]) == 0
    assert main(["convert", str(ours), "-o", str(theirs), "--to", "bnb"]) == 0
    shown = capsys.readouterr().out
    assert "bitsandbytes' own keys, as diffusers and transformers read them" in shown
    assert "loads in stock ComfyUI" not in shown


def test_a_file_without_a_format_of_bitsandbytes_does_not_become_a_plain_one(tmp_path, capsys):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    quantize = ["quantize", str(EMOJI), "-o", str(ours), "--format", "int8_tensorwise"]
    assert main([*quantize, "--quiet"]) == 0
    assert main(["convert", str(ours), "-o", str(theirs), "--to", "bnb"]) == 2
    assert "found int8_tensorwise: convert it to bf16" in capsys.readouterr().err
    assert not theirs.exists()
