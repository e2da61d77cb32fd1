"""`fewbits bench`, and the report of kernels that nodes show."""

import json

import pytest
import torch

from fewbits.kernels.device import CLASSES
from fewbits.quant_ops import bench
from fewbits.quant_ops.bench import ROWS, WORDS, bench_linears, kernel_report
from fewbits.quant_ops.formats import FORMATS
from support.harness import kernel_tables, readme
from support.helpers import fewbits


def test_the_report_names_a_kernel_and_a_reason_for_every_format():
    report = kernel_report(device="cpu")
    assert [entry["format"] for entry in report] == list(FORMATS)
    for entry in report:
        assert entry["text"].startswith(f"{entry['format']}: ") and tuple(entry["rows"]) == ROWS
        assert all(row["backend"] in WORDS for row in entry["rows"].values())
    assert (
        kernel_report(["bnb_nf4"])[0]["text"] == "bnb_nf4: eager PyTorch, because tensor is on cpu"
    )


def test_a_kernel_by_rows_is_said_in_one_line():
    (entry,) = kernel_report(["int8_blockwise"], CLASSES["sm_86"])
    assert entry["text"] == (
        "int8_blockwise: native CUDA up to 16 rows, native Triton up to 256 rows, "
        "decoded, then the library's matmul above"
    )
    assert entry["native_since"] is None
    assert kernel_report(["float8_e4m3fn"])[0]["native_since"] == "0.4.0"


def test_the_command_says_which_kernel_runs_on_a_gpu_that_is_not_here():
    arguments = ("bench", "--format", "int8_tensorwise", "--rows", "16")
    text = fewbits(*arguments, "--gpu", "sm_90").stdout.splitlines()
    assert text[0].startswith("sm_90 (such as H200)")
    assert text[2].strip().startswith("M=16  native CUDA: M=16 .0141 / .0149, triton .0160 / .0186")
    old = fewbits(*arguments, "--gpu", "sm_75").stdout
    assert "not native CUDA: sm_75 is older than sm_80" in old


def test_every_linear_is_timed_against_bf16_and_decoding():
    seen = []
    rows = bench_linears(
        torch.device("cpu"), ["int8_blockwise", "bnb_nf4"], (1, 3), (128, 128), on_row=seen.append
    )
    assert rows == seen and [(row["format"], row["M"]) for row in rows] == [
        ("int8_blockwise", 1), ("int8_blockwise", 3), ("bnb_nf4", 1), ("bnb_nf4", 3)]  # fmt: skip
    assert all(row["ms"] > 0 and row["bf16_ms"] > 0 and row["decoded_ms"] > 0 for row in rows)


def test_a_row_is_given_before_the_next_is_measured(monkeypatch):
    measured, at_row = [], []

    def measure(calls, device):
        measured.append(len(calls))
        return 1.0

    monkeypatch.setattr(bench, "median_ms", measure)

    def given(row):
        at_row.append(len(measured))

    bench_linears(torch.device("cpu"), ["int8_blockwise"], (1, 2), (128, 128), on_row=given)
    assert at_row == [3, 6]  # the codes, decoding first, bf16


def test_on_a_cpu_the_command_measures_a_small_layer_and_says_so():
    run = fewbits("bench", "--device", "cpu", "--format", "int8_blockwise", "--format", "nf4")
    assert "weights of 1024x1024 in bf16" in run.stdout and "a small layer, for a CPU" in run.stdout
    timed = [line.split() for line in run.stdout.splitlines() if "  eager PyTorch" in line]
    assert [(row[0], row[1]) for row in timed] == [
        (name, rows) for name in ("int8_blockwise", "bnb_nf4") for rows in ("1", "16", "256")
    ]
    assert run.stderr == ""  # progress is for terminals


def test_the_command_prints_reasons_or_json():
    arguments = (
        "bench",
        "--device",
        "cpu",
        "--format",
        "int8_lodewise",
        "--size",
        "128x256",
        "--rows",
        "2",
    )
    text = fewbits(*arguments)
    assert (
        text.returncode == 0
        and "int8_lodewise: eager PyTorch" in text.stdout
        and "128x256" in text.stdout
    )
    found = json.loads(fewbits(*arguments, "--json").stdout)
    assert found["device"] == "cpu" and [row["M"] for row in found["linears"]] == [2]
    assert "milliseconds" not in fewbits(*arguments, "--reasons").stdout


@pytest.mark.parametrize(
    ("argument", "value"), [("--size", "128"), ("--rows", "0"), ("--format", "nf5")]
)
def test_the_command_refuses_in_one_line(argument, value):
    run = fewbits("bench", "--device", "cpu", argument, value)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and value in run.stderr


def test_the_tables_in_the_readme_are_those_of_the_measurements():
    if readme.WRITE:
        readme.write_block("kernels", kernel_tables.text())
    assert readme.block("kernels") == kernel_tables.text()
