"""What `fewbits quantize` and `fewbits plan` refuse before they look at the model: the file named here does not exist."""

import json

import pytest

from fewbits.quant_ops.cli.__main__ import main

REFUSED = {
    "--format fp8_scaled": "unknown format 'fp8_scaled', did you mean 'float8_e4m3fn'?",
    "--format float8_e4m3fn_block_wise": "did you mean 'float8_e4m3fn_blockwise'?",
    "--format int8_tensorwise --scaling rows": "scaling must be one of row, tensor; got 'rows'",
    "--format int8_tensorwise:scalling=row": "unknown key 'scalling', did you mean 'scaling'?",
    "--format int8_blockwise:block_size=48": "block_size must be one of 16, 32, 64, 128, 256; got 48",
    "--format int8_tensorwise:convrot=true,scaling=tensor": "convrot needs scaling row",
    "--format bnb_nf4 --method gtpq": "unknown method 'gtpq'; known methods: ",
    "--format bnb_nf4:method=svd,num_iters=5": "unknown key 'num_iters', did you mean 'num_iter'?",
    "--format bnb_nf4:method=svd,optimizer=adam": "got 'adam', did you mean 'radam'?",
    "--format bnb_nf4:num_iter=5": "unknown key 'num_iter'",
    "--format mxfp8 --keep re:(": "pattern 're:(' is not a regular expression",
    "--format mxfp8 --rule a=fp9": "unknown format 'fp9'",
    "--format mxfp8 --rule a": "write PATTERN=FORMAT or PATTERN=FORMAT:option=value,...",
    "--format mxfp8 --fallback int9": "unknown format 'int9'",
    "--format mxfp8 --seed x": "invalid int value: 'x'",
    "--format mxfp8 --fullmatch": "--fullmatch is about the keys of --layer-config FILE, which is missing",
    "--format mxfp8 --layer-config DIR/none.json": "layer-config not found",
    "--format mxfp8 --layer-config DIR/bad.json": "unknown format 'int8_block', did you mean 'int8_blockwise'?",
    "--format mxfp8 --layer-config DIR/syntax.json": "syntax.json line 1 column 7",
    "--recipe DIR/none.toml": "recipe not found",
    "--recipe DIR/bad.toml": "recipe bad.toml: top level: unknown key 'presets', did you mean 'preset'?",
    "--recipe DIR/syntax.toml": "recipe syntax.toml: ",
    "--recipe DIR/good.toml --format mxfp8": "--recipe already says format, scaling and method",
    "--recipe DIR/good.toml --layer-config DIR/bad.json": "the recipe has a [layer_config] of its own",
    "--method svd": "missing: --format F, or --recipe R.toml with a [primary] table",
}


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize(("arguments", "message"), REFUSED.items(), ids=REFUSED)
def test_a_wish_that_makes_no_sense_is_one_line_and_status_2(
    command, arguments, message, tmp_path, capsys
):
    files = {
        "bad.json": json.dumps({"a": {"format": "int8_block"}}), "syntax.json": '{"a": }', "bad.toml": "presets = 'flux'",
        "syntax.toml": "preset flux", "good.toml": "[primary]\nformat='mxfp8'\n[layer_config]\na={skip=true}",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = arguments.replace("DIR", str(tmp_path)).split()
    target = ["-o", str(tmp_path / "q.safetensors")] if command == "quantize" else []
    status = main([command, str(tmp_path / "missing.safetensors"), *target, *words])
    shown = capsys.readouterr()
    assert status == 2 and message in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert "missing.safetensors" not in shown.err
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see fewbits --help"),
        (["quantise"], "invalid choice: 'quantise'"),
        (
            ["quantize"],
            "missing: the input; and --format F, or --recipe R.toml with a [primary] table;",
        ),
        (["plan", "--format", "nf4"], "missing: the input; see fewbits plan --help"),
        (
            ["plan", "m", "--fromat", "x"],
            "unrecognized arguments: --fromat x, did you mean --format?; see fewbits plan --help",
        ),
        (
            ["quantize", "m", "--overwite"],
            "unrecognized arguments: --overwite, did you mean --overwrite?",
        ),
        (
            ["plan", "m", "--metod=svd"],
            "unrecognized arguments: --metod=svd, did you mean --method?",
        ),
        (["verify", "m", "extra"], "unrecognized arguments: extra; see fewbits verify --help"),
        (
            ["--verzion", "plan", "m"],
            "unrecognized arguments: --verzion, did you mean --version?; see fewbits --help",
        ),
        (
            ["plan", "m", "--seed", "x"],
            "argument --seed: invalid int value: 'x'; see fewbits plan --help",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_arguments_that_do_not_parse_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("fewbits: ") and message in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]], ids=" ".join)
def test_help_and_version_go_to_stdout_with_status_0(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0 and capsys.readouterr().out
