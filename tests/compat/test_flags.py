"""The flag table: every flag of the classic command in both spellings, and what each of them changes."""

import json
import re

import pytest

from fewbits.quant_ops.cli.__main__ import build_parser
from fewbits.quant_ops.cli.common import recipe_from
from fewbits.quant_ops.compat import main
from fewbits.quant_ops.compat.command import parse
from fewbits.quant_ops.compat.flags import FLAGS, TARGETS, dashed, underscored
from fewbits.quant_ops.compat.job import make_job
from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.recipe import parse_wish

# Every flag of the classic command.
DOCUMENTED = """--input --output --comfy_quant --int8 --nf4 --fp4 --nvfp4 --mxfp8 --convrot --convrot-group-size --scaling_mode
--block_size --kernel_backend --fallback --fallback-block-size --fallback-simple --custom-layers --custom-type
--custom-block-size --custom-scaling-mode --custom-simple --custom-heur --exclude-layers --simple --heur --optimizer
--num_iter --lr --lr_schedule --lr_gamma --lr_patience --lr_factor --lr_min --lr_cooldown --lr_threshold
--lr_adaptive_mode --top_p --min_k --max_k --full_matrix --early-stop-loss --early-stop-lr --early-stop-stall
--calib_samples --manual_seed --input_scale --full_precision_matrix_mult --full-precision-mm --t5xxl --mistral
--distillation_large --distillation_small --nerf_large --nerf_small --radiance --wan --qwen --hunyuan --zimage
--zimage_refiner --flux2 --preset --layer-config --fullmatch --dry-run --convert-fp8-scaled --hp-filter --low-memory
--save-quant-metadata --legacy --quiet --json --device --seed --overwrite""".split()  # noqa: SIM905


def job(*arguments):
    return make_job(parse(["-i", "m.safetensors", *map(str, arguments)]))


def recipe(*arguments):
    return job(*arguments).recipe


def primary(*arguments):
    return recipe(*arguments).primary


def learned(text):
    """The wish as the command makes it without --simple."""
    return parse_wish(text + ("," if ":" in text else ":") + "method=svd")


def simple(text):
    """The wish as the command makes it with --simple: nearest, whatever the format's own method is."""
    return parse_wish(text + ("," if ":" in text else ":") + "method=nearest")


@pytest.mark.parametrize("flag", DOCUMENTED)
def test_every_documented_flag_exists_in_both_spellings(flag):
    spelled = {spelling for entry in FLAGS for spelling in entry.spellings}
    assert {flag, "--" + dashed(flag[2:]), "--" + underscored(flag[2:])} <= spelled


FORMAT_CASES = {
    "": "float8_e4m3fn",
    "--scaling_mode tensor": "float8_e4m3fn",
    "--scaling_mode row": "float8_e4m3fn_rowwise",
    "--scaling_mode block": "float8_e4m3fn_block3d",
    "--scaling_mode block2d": "float8_e4m3fn_blockwise",
    "--scaling_mode block2d --block_size 128": "float8_e4m3fn_blockwise:block_size=128",
    "--int8": "int8_tensorwise:scaling=tensor",
    "--int8 --scaling_mode tensor": "int8_tensorwise:scaling=tensor",
    "--int8 --scaling_mode row": "int8_tensorwise:scaling=row",
    "--int8 --scaling_mode block": "int8_blockwise",
    "--int8 --scaling_mode block2d --block_size 64": "int8_blockwise:block_size=64",
    "--int8 --block_size 128": "int8_blockwise:block_size=128",
    "--int8 --kernel_backend blockwise": "int8_blockwise",
    "--int8 --kernel_backend lodewise": "int8_lodewise",
    "--int8 --kernel-backend lodewise --block-size 64": "int8_lodewise:block_size=64",
    "--nf4": "bnb_nf4",
    "--nf4 --block_size 128": "bnb_nf4:block_size=128",
    "--fp4": "bnb_fp4",
    "--nvfp4": "nvfp4",
    "--mxfp8": "mxfp8",
    "--convrot": "int8_tensorwise:scaling=row,convrot=true",
    "--int8 --convrot --convrot-group-size 64": "int8_tensorwise:scaling=row,convrot=true,convrot_groupsize=64",
    "--full_precision_matrix_mult": "float8_e4m3fn:full_precision_matrix_mult=true",
    "--int8 --full-precision-mm": "int8_tensorwise:scaling=tensor,full_precision_matrix_mult=true",
    "--int8 --nf4": "bnb_nf4",
    "--fp4 --int8": "bnb_fp4",
    "--fp4 --nf4": "bnb_nf4",
}


@pytest.mark.parametrize(
    ("arguments", "wish"), FORMAT_CASES.items(), ids=lambda value: value or "nothing"
)
def test_format_flags_choose_the_primary(arguments, wish):
    assert primary(*arguments.split()) == learned(wish)
    assert primary("--simple", *arguments.split()) == simple(wish)


def test_the_format_table_reaches_every_classic_format_and_only_real_ones():
    names = {target.format for target in TARGETS.values()}
    assert names == set(FORMATS) - {"float8_e5m2", "convrot_w4a4", "asym_w4a8_int8"}


def test_several_formats_are_decided_by_priority_and_said():
    assert (
        job("--int8", "--nf4")
        .notes[0]
        .startswith("several formats were named; nf4 is used (nf4 > fp4 >")
    )
    assert not job("--int8", "--convrot").notes


SVD = {
    "optimizer": "adamw", "num_iter": 7, "lr": 0.5, "lr_schedule": "plateau", "lr_gamma": 0.5, "lr_patience": 5,
    "lr_factor": 0.25, "lr_min": 0.001, "lr_cooldown": 3, "lr_threshold": 0.125, "lr_adaptive_mode": "no-reset",
    "top_p": 0.5, "min_k": 3, "max_k": 9, "early_stop_loss": 0.25, "early_stop_lr": 0.125, "early_stop_stall": 4,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SVD.items())
def test_options_of_learned_rounding_reach_the_method(name, value):
    assert dict(primary(f"--{name}", value).method_options) == {name: value}
    assert dict(primary(f"--{dashed(name)}={value}").method_options) == {name: value}
    with pytest.raises(
        RecipeError, match="is an option of learned rounding, which --simple switches off"
    ):
        recipe("--simple", f"--{name}", value)


def test_full_matrix_reaches_the_method():
    assert dict(primary("--full_matrix").method_options) == {"full_matrix": True}


def test_simple_is_nearest_for_every_tier_and_learned_rounding_is_the_default():
    tiers = ["--fallback", "int8", "--custom-layers", "a", "--custom-type", "nf4"]
    for arguments, methods in (
        ([], ["svd", "svd", "svd"]),
        (["--simple"], ["nearest", "nearest", "nearest"]),
        (["--custom-simple"], ["svd", "svd", "nearest"]),
        (["--fallback-simple"], ["svd", "nearest", "svd"]),
    ):
        made = recipe(*tiers, *arguments)
        assert [made.primary.method, made.fallback.method, made.rules[0].wish.method] == methods


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        ("--fallback fp8", "float8_e4m3fn"),
        ("--fallback int8", "int8_tensorwise:scaling=tensor"),
        ("--fallback int8 --fallback-block-size 64", "int8_blockwise:block_size=64"),
        ("--fallback nf4 --fallback-block-size 256", "bnb_nf4:block_size=256"),
        ("--fallback fp4", "bnb_fp4"),
    ],
)
def test_fallback_flags_describe_the_fallback_tier(arguments, wish):
    assert recipe("--simple", *arguments.split()).fallback == simple(wish)
    assert recipe("--simple").fallback is None


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        ("--custom-type fp8", "float8_e4m3fn"),
        ("--custom-type fp8 --custom-scaling-mode row", "float8_e4m3fn_rowwise"),
        (
            "--custom-type fp8 --custom-scaling-mode block2d --custom-block-size 32",
            "float8_e4m3fn_blockwise:block_size=32",
        ),
        ("--custom-type int8", "int8_tensorwise:scaling=tensor"),
        ("--custom-type int8 --custom-block-size 128", "int8_blockwise:block_size=128"),
        ("--custom-type nf4 --custom_block_size 32", "bnb_nf4:block_size=32"),
        ("--custom-type fp4", "bnb_fp4"),
    ],
)
def test_custom_flags_describe_the_custom_tier(arguments, wish):
    (rule,) = recipe("--simple", "--custom-layers", r"a\.(b|c)$", *arguments.split()).rules
    assert (rule.match, rule.wish, rule.heuristics) == (r"search:a\.(b|c)$", simple(wish), False)


def test_custom_heur_judges_the_custom_tier_alone():
    made = recipe("--custom-layers", "a", "--custom-type", "int8", "--custom-heur")
    assert made.rules[0].heuristics and not made.heuristics


def test_exclude_layers_keeps_after_the_custom_tier():
    custom, excluded = recipe(
        "--exclude-layers", "b", "--custom-layers", "a", "--custom-type", "int8"
    ).rules
    assert (excluded.match, excluded.wish, custom.match) == ("search:b", None, "search:a")


def test_heur_marks_layers_that_gain_nothing():
    assert recipe("--heur").heuristics and not recipe().heuristics


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.field == "recipe.presets"], ids=lambda flag: flag.name
)
def test_a_preset_flag_names_its_preset(flag):
    assert recipe(f"--{flag.name}").preset == flag.name
    assert recipe("--preset", flag.name).preset == flag.name


def test_presets_are_automatic_and_add_up():
    assert recipe().preset == "auto"
    assert recipe("--preset", "none").preset == "none"
    assert recipe("--distillation_small", "--nerf_small").preset == "distillation_small+nerf_small"


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [("", 0), ("--manual_seed -1", 0), ("--manual_seed 5", 5), ("--seed 6", 6)],
)
def test_the_seed_is_the_recipes(arguments, seed):
    assert recipe(*arguments.split()).seed == seed


def test_layer_config_is_read_with_the_primarys_method(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps(
            {r"a\.\d": {"format": "bnb_nf4"}, "b": {"format": "float8_e4m3fn", "simple": True}}
        )
    )
    config = recipe("--layer-config", path, "--num_iter", "3").layer_config
    assert [entry.wish.method for entry in config.entries] == ["svd", "nearest"]
    assert dict(config.entries[0].wish.method_options) == {"num_iter": 3} and not config.fullmatch
    assert recipe("--layer_config", path, "--fullmatch").layer_config.fullmatch


def test_simple_reaches_the_entries_of_a_layer_config_and_the_equal_command_says_so(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"a": {"format": "bnb_fp4"}, "b": {"format": "bnb_fp4", "method": "mse_clip"}})
    )
    made = job("--simple", "--layer-config", path, "-o", "x.safetensors")
    assert [entry.wish.method for entry in made.recipe.layer_config.entries] == [
        "nearest",
        "mse_clip",
    ]
    assert recipe_from(build_parser().parse_args(made.arguments)) == made.recipe


def test_dry_run_analyzes_unless_told_to_make_a_template():
    assert job("--dry-run").kind == job("--dry-run", "analyze").kind == "analyze"
    assert job("--dry-run", "create-template").kind == "create-template"
    assert job("--dry_run=create-template").arguments == ("plan", "m.safetensors", "--template")


def test_conversion_flags_become_fewbits_convert():
    made = job(
        "--convert-fp8-scaled", "--hp-filter", "norm", "--full-precision-mm", "-o", "x.safetensors"
    )
    assert made.arguments == ("convert", "m.safetensors", "-o", "x.safetensors", "--from", "fp8_scaled",
                              "--hp-filter", "norm", "--full-precision-mm")  # fmt: skip
    assert job("--convert-fp8-scaled").output.name == "m_comfy_quant.safetensors"


def test_common_flags_are_passed_on():
    arguments = job("--device", "cpu", "--overwrite", "--quiet", "--json").arguments
    assert set(arguments) >= {"--device", "cpu", "--overwrite", "--quiet", "--json"}


@pytest.mark.parametrize(
    "flag", ["--comfy_quant", "--low-memory", "--save-quant-metadata", "--calib_samples=99"]
)
def test_flags_accepted_for_old_scripts_change_nothing_and_say_so(flag):
    assert job(flag) == job()
    entry = next(entry for entry in FLAGS if flag.split("=")[0] in entry.spellings)
    assert entry.help.startswith("accepted: ")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "m_float8_e4m3fn.safetensors"),
        ("--nf4", "m_bnb_nf4.safetensors"),
        ("--int8 --fallback fp8", "m_int8_tensorwise_mixed.safetensors"),
        ("--int8 --fallback int8", "m_int8_tensorwise.safetensors"),
        ("--nf4 --custom-layers x --custom-type fp8", "m_bnb_nf4_mixed.safetensors"),
        ("-o bare.safetensors", "bare.safetensors"),
    ],
)
def test_the_output_is_named_after_the_format(arguments, name):
    assert job(*arguments.split()).output.name == name


def test_the_output_of_a_sharded_model_lies_beside_its_index():
    made = make_job({"input": "dir/m.safetensors.index.json", "int8": True})
    assert made.output.as_posix() == "dir/m_int8_tensorwise.safetensors"


REFUSED = {
    "": "-i/--input MODEL.safetensors is required",
    "-i m --int9": "unknown argument --int9, did you mean --int8?",
    "-i m --custom-typ int8": "unknown argument --custom-typ, did you mean --custom-type?",
    "-i m stray": "unknown argument stray; see --help",
    "-i m --scaling_mode rows": "--scaling_mode must be one of tensor, row, block, block2d; got 'rows', did you mean 'row'?",
    "-i m --fallback int4": "--fallback must be one of fp8, int8, nf4, fp4; got 'int4', did you mean 'int8'?",
    "-i m --optimizer adam": "--optimizer must be one of original, adamw, radam; got 'adam', did you mean 'radam'?",
    "-i m --dry-run analyse": "--dry-run must be one of analyze, create-template; got 'analyse', did you mean 'analyze'?",
    "-i m --block_size x": "--block_size must be int, got 'x'",
    "-i m --num_iter 1.5": "--num_iter must be int, got '1.5'",
    "-i m --lr fast": "--lr must be float, got 'fast'",
    "-i m --top_p 2": "top_p must be from 0 to 1, got 2.0",
    "-i m --int8 --block_size 48": "block_size must be one of 16, 32, 64, 128, 256; got 48",
    "-i m --block_size 64": "--block_size 64 do not fit fp8: its scaling modes are tensor, row, block, block2d (block sizes go with the block modes)",
    "-i m --int8 --scaling_mode tensor --block_size 64": "--scaling_mode tensor and --block_size 64 do not fit int8",
    "-i m --int8 --scaling_mode row --kernel_backend lodewise": "--scaling_mode row and --kernel_backend lodewise do not fit int8",
    "-i m --int8 --scaling_mode block2d --kernel_backend lodewise": "do not fit int8",
    "-i m --nf4 --scaling_mode row": "--scaling_mode row do not fit nf4: it has no scaling modes",
    "-i m --kernel_backend lodewise": "--kernel_backend lodewise do not fit fp8",
    "-i m --convrot --scaling_mode tensor": "--scaling_mode tensor do not fit convrot: its scaling modes are row",
    "-i m --convrot-group-size 64": "--convrot-group-size has no effect without --convrot",
    "-i m --custom-layers x": "--custom-layers has no effect without --custom-type",
    "-i m --custom-type fp8": "--custom-type has no effect without --custom-layers",
    "-i m --custom-simple": "--custom-simple has no effect without --custom-type",
    "-i m --custom-heur": "--custom-heur has no effect without --custom-type",
    "-i m --fallback-simple": "--fallback-simple has no effect without --fallback",
    "-i m --fallback-block-size 64": "--fallback-block-size has no effect without --fallback",
    "-i m --fallback fp8 --fallback-block-size 64": "--fallback-block-size 64 do not fit fp8",
    "-i m --fullmatch": "--fullmatch has no effect without --layer-config",
    "-i m --hp-filter x": "--hp-filter has no effect without --convert-fp8-scaled",
    "-i m --convert-fp8-scaled --int8": "--convert-fp8-scaled copies codes as they are; --int8 does not apply",
    "-i m --convert-fp8-scaled --dry-run": "--dry-run does not apply",
    "-i m --custom-layers ( --custom-type fp8": "--custom-layers '(' is not a regular expression: missing )",
    "-i m --exclude-layers [": "--exclude-layers '[' is not a regular expression",
    "-i m --preset wan --wan": "--preset and a preset's own flag say the same thing",
    "-i m --preset wann": "unknown preset 'wann', did you mean 'wan'?",
    "-i m --legacy": "--legacy: legacy scaled_fp8 files are read, never written",
    "-i m --input_scale": "--input_scale: float8_e4m3fn quantizes activations with it, so it must be measured",
    "-i m --nvfp4 --input_scale": "--input_scale: nvfp4 quantizes activations with it",
    "-i m --layer-config none.json": "layer-config not found: none.json",
    "-i m --num_iter 5 --simple": "--num_iter is an option of learned rounding, which --simple switches off",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items(), ids=REFUSED)
def test_wrong_or_contradicting_flags_are_one_line_and_status_2_before_any_file_is_read(
    arguments, message, capsys
):
    assert main(arguments.split()) == 2
    shown = capsys.readouterr()
    assert (
        shown.err.startswith("convert_to_quant: ") and shown.err.count("\n") == 1 and not shown.out
    )
    assert message in shown.err


def test_input_scale_without_effect_is_a_note():
    assert job("--int8", "--input_scale").notes == (
        "--input_scale: these formats store none; nothing is written",
    )


COMMANDS = [
    "",
    "--simple",
    r"--fp4 --block_size=64 --fallback=fp8 --custom-layers=.*txt_attn\.to_out.* --custom-type=int8 --custom-block-size=128 --custom-simple",
    "--nf4 --optimizer adamw --num_iter 7 --lr 1e-3 --lr_adaptive_mode no-reset --full_matrix --early-stop-loss 1e-6",
    "--convrot --convrot-group-size 16 --heur --seed 4 --preset none",
    r"--custom-layers (?:a:b|c=d),e --custom-type nf4 --custom-heur --exclude-layers ^x.*weight$ --full-precision-mm",
    "--distillation_large --nerf_large --layer-config LAYERS --fullmatch",
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=COMMANDS)
def test_the_printed_command_describes_the_same_recipe(arguments, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(
        json.dumps(
            {"a.*": {"format": "bnb_nf4"}, "_default": {"format": "float8_e4m3fn", "simple": True}}
        )
    )
    made = job(*arguments.replace("LAYERS", str(path)).split())
    args = build_parser().parse_args(list(made.arguments))
    assert recipe_from(args) == made.recipe
    assert (args.input, args.output) == (made.input, made.output)


def test_the_table_names_each_field_of_the_recipe_it_writes():
    groups = {flag.field.partition(".")[0] for flag in FLAGS}
    assert groups == {
        "run",
        "primary",
        "fallback",
        "custom",
        "recipe",
        "svd",
        "convert",
        "refused",
        "accepted",
    }
    assert all(re.fullmatch(r"[a-z]\w*\.\w+", flag.field) for flag in FLAGS)
