"""`fewbits quantize`, `plan` and `inspect` as a user runs them: exit status, one-line errors, nothing lost."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.helpers import (
    EMOJI,
    fewbits,
    flux_shapes,
    random_tensors,
    tiny_checkpoint,
)


def refused(result, *parts):
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_a_file_is_quantized_and_the_report_says_what_was_done(tmp_path):
    out = tmp_path / "q.safetensors"
    result = fewbits("quantize", EMOJI, "-o", out, "--format", "int8_tensorwise")
    assert result.returncode == 0, result.stderr
    assert "loads in stock ComfyUI >= 0.27.0" in result.stdout
    assert "int8_tensorwise" in result.stdout
    weights = load_file(out)
    assert weights["single_blocks.0.linear1.weight"].dtype == torch.int8
    assert weights["single_blocks.0.linear1.weight_scale"].shape == (1792, 1)
    assert weights["img_in.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_a_process_ends_with_the_status_and_the_line_of_a_refusal(tmp_path):
    """All other tests call the command in this process."""
    command = [
        sys.executable,
        "-m",
        "fewbits.quant_ops.cli",
        "quantize",
        str(tmp_path / "none.safetensors"),
    ]
    command += ["-o", str(tmp_path / "q.safetensors"), "--format", "int8_tensorwise"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    refused(run, "none.safetensors")
    assert run.stdout == "" and not (tmp_path / "q.safetensors").exists()


def test_json_report_states_plan_and_measured_errors(tmp_path):
    result = fewbits(
        "quantize", EMOJI, "-o", tmp_path / "q.safetensors", "--format", "float8_e4m3fn", "--json"
    )
    report = json.loads(result.stdout)
    assert report["min_comfyui"] == "0.4.0" and report["requires_pack"] is False
    layer = next(row for row in report["layers"] if row["name"] == "single_blocks.0.linear1")
    assert 0.02 < layer["rel_l2"] < 0.03
    assert len(report["worst"]) == 5


def test_plan_reads_no_weights_and_predicts_the_size(tmp_path):
    plan = json.loads(fewbits("plan", EMOJI, "--format", "int8_tensorwise", "--json").stdout)
    fewbits("quantize", EMOJI, "-o", tmp_path / "q.safetensors", "--format", "int8_tensorwise")
    assert plan["file_bytes"] == (tmp_path / "q.safetensors").stat().st_size
    text = fewbits("plan", EMOJI, "--format", "int8_tensorwise").stdout
    assert "preset flux: first projection" in text
    assert all(row["reason"] for row in plan["layers"])


def test_rules_and_keeps_apply_in_the_order_written(tmp_path):
    plan = json.loads(
        fewbits(
            "plan",
            EMOJI,
            "--format",
            "float8_e4m3fn",
            "--json",
            "--keep",
            "*.img_mlp.0",
            "--rule",
            "double_blocks.*=int8_tensorwise:scaling=tensor",
            "--keep",
            "*mlp.2",
            "--rule",
            "nothing.*=float8_e5m2",
        ).stdout  # fmt: skip
    )
    rows = {row["name"]: row for row in plan["layers"]}
    assert rows["double_blocks.0.img_mlp.0"]["action"] == "keep"
    assert rows["double_blocks.0.img_mlp.2"]["options"]["scaling"] == "tensor"
    assert rows["single_blocks.0.linear2"]["format"] == "float8_e4m3fn"
    assert "nothing.*" in plan["unmatched"]


def test_a_nan_weight_names_file_tensor_and_count(tmp_path):
    tensors = random_tensors(flux_shapes())
    tensors["single_blocks.0.linear1.weight"][3, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, tmp_path / "nan.safetensors")
    out = tmp_path / "q.safetensors"
    result = fewbits(
        "quantize", tmp_path / "nan.safetensors", "-o", out, "--format", "float8_e4m3fn"
    )
    refused(result, "nan.safetensors", "single_blocks.0.linear1.weight", "1 NaN and 1 infinite")
    assert sorted(os.listdir(tmp_path)) == ["nan.safetensors"]


def test_a_truncated_file_is_refused(tmp_path):
    path = tiny_checkpoint(tmp_path / "m.safetensors")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    refused(fewbits("quantize", path, "-o", tmp_path / "q.safetensors", "--format", "int8_tensorwise"),
            "m.safetensors", "truncated: tensor '")  # fmt: skip


def test_a_scale_of_the_wrong_dtype_is_refused_by_layer_and_a_narrow_one_is_widened(tmp_path):
    out = tmp_path / "q.safetensors"
    fewbits("quantize", EMOJI, "-o", out, "--format", "int8_tensorwise")
    tensors = load_file(out)
    key = "single_blocks.0.linear1.weight_scale"
    whole = tensors[key]
    copy = ("-o", tmp_path / "x.safetensors", "--format", "int8_tensorwise", "--overwrite")
    for dtype, stored in ((torch.int32, "I32"), (torch.uint8, "U8")):
        save_file({**tensors, key: whole.to(dtype)}, tmp_path / "bad.safetensors")
        result = fewbits("quantize", tmp_path / "bad.safetensors", *copy)
        refused(
            result, "bad.safetensors", "single_blocks.0.linear1", f"weight_scale is {stored}", "F32"
        )
        assert (
            f"weight_scale is {stored}" in fewbits("inspect", tmp_path / "bad.safetensors").stdout
        )
    save_file({**tensors, key: whole.bfloat16()}, tmp_path / "narrow.safetensors")
    assert fewbits("quantize", tmp_path / "narrow.safetensors", *copy).returncode == 0
    assert torch.equal(load_file(tmp_path / "x.safetensors")[key], whole.bfloat16().float())


def test_quantizing_twice_is_refused_and_copying_is_not(tmp_path):
    out = tmp_path / "q.safetensors"
    fewbits("quantize", EMOJI, "-o", out, "--format", "int8_tensorwise")
    refused(
        fewbits("quantize", out, "-o", tmp_path / "x.safetensors", "--format", "float8_e4m3fn"),
        "quantized already",
    )
    again = tmp_path / "again.safetensors"
    assert fewbits("quantize", out, "-o", again, "--format", "int8_tensorwise").returncode == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "fp8_scaled"], "did you mean 'float8_e4m3fn'"),
        (
            ["--format", "int8_tensorwise", "--scaling", "rows"],
            "scaling must be one of row, tensor",
        ),
        (["--format", "float8_e4m3fn", "--method", "gtpq"], "unknown method 'gtpq'"),
        (["--format", "float8_e4m3fn", "--preset", "fluks"], "unknown preset 'fluks'"),
        (["--format", "float8_e4m3fn:block_size=64"], "has no option 'block_size'"),
        (["--format", "float8_e4m3fn", "--device", "tpu9"], "--device tpu9"),
        ([], "missing: --format F"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wish_that_cannot_be_fulfilled_is_refused_before_work(tmp_path, arguments, message):
    refused(fewbits("quantize", EMOJI, "-o", tmp_path / "q.safetensors", *arguments), message)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors")
    script = (
        "import fewbits.quant_ops.pipeline as pipeline, sys\n"
        "from fewbits.quant_ops.cli.__main__ import main\n"
        "def interrupt(*args): raise KeyboardInterrupt\n"
        "pipeline._convert = interrupt\n"
        f"sys.exit(main(['quantize', {str(model)!r}, '-o', {str(tmp_path / 'q.safetensors')!r}, '--format', 'int8_tensorwise']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 130
    assert os.listdir(tmp_path) == ["m.safetensors"]


CONVERSIONS = {
    "fewbits": ["cli", "quantize", "IN", "-o", "OUT", "--format", "int8_tensorwise"],
    "convert_to_quant": ["compat", "-i", "IN", "-o", "OUT", "--int8", "--simple"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", CONVERSIONS)
def test_an_interrupt_from_outside_ends_either_command(command, tmp_path):
    """The process sends itself the signal that a terminal sends, once a layer is written."""
    model, out = tiny_checkpoint(tmp_path / "m.safetensors"), tmp_path / "q.safetensors"
    words = [{"IN": str(model), "OUT": str(out)}.get(word, word) for word in CONVERSIONS[command]]
    main = "cli.__main__" if words[0] == "cli" else "compat"
    script = (
        "import os, signal, sys\n"
        "import fewbits.quant_ops.pipeline as pipeline\n"
        f"from fewbits.quant_ops.{main} import main\n"
        "write = pipeline._write\n"
        "def interrupted(*given):\n"
        "    write(*given)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "pipeline._write = interrupted\n"
        f"sys.exit(main({words[1:]!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith(f"{command}: interrupted; nothing was written\n")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_recipe_file_may_leave_the_primary_to_the_format_argument(tmp_path):
    (tmp_path / "r.toml").write_text('preset = "none"\n[[rule]]\nmatch = "img_in"\nkeep = true\n')
    plan = ("plan", EMOJI, "--recipe", tmp_path / "r.toml", "--json")
    rows = {
        row["name"]: row for row in json.loads(fewbits(*plan, "--format", "mxfp8").stdout)["layers"]
    }
    assert rows["img_in"]["rule"] == "rule 'img_in'" and rows["txt_in"]["format"] == "mxfp8"
    refused(fewbits(*plan), "say --format (one of", "[primary]")
    refused(fewbits(*plan, "--scaling", "row"), "say --format (one of")
    (tmp_path / "r.toml").write_text('[primary]\nformat = "mxfp8"\n')
    refused(fewbits(*plan, "--format", "mxfp8"), "--recipe already says format")
