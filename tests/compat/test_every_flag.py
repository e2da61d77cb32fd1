"""Every flag of the classic command, one case each: the run with it differs from the run without it where the flag says.

A case that nobody wrote for a flag fails `test_every_flag_has_a_case`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewbits.quant_ops.compat import main
from fewbits.quant_ops.compat.flags import FLAGS, PRESET_FLAGS
from fewbits.quant_ops.report.file import SUFFIX  # the report that lies beside a model
from support.helpers import random_tensors, tiny_checkpoint

LAYER = "double_blocks.0.img_mlp.0"  # an ordinary layer, (512, 128)
KEPT = "img_in"  # one that Flux's preset keeps
# A base under which learned rounding has something to do, on two layers.
LEARNING = "-i DIR/learned.safetensors --int8 --num_iter 40"


LEARNED = {"a.weight": (128, 96), "b.weight": (64, 160)}


@dataclass
class Outcome:
    """What a run did: its status and texts, the files it made, and the written model's layers and tensors."""

    status: int
    out: str
    err: str
    files: list[str]
    markers: dict[str, dict] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)

    @property
    def codes(self) -> list[bytes]:
        flat = [value.contiguous().view(-1) for value in self.tensors.values()]
        return [value.view(torch.uint8).numpy().tobytes() for value in flat]

    def format(self, name: str) -> str | None:
        return self.markers.get(name, {}).get("format")

    def method(self, name: str) -> str:
        """Of a layer, from a run with --json."""
        return next(row["method"] for row in json.loads(self.out)["layers"] if row["name"] == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run("--int8")` -> Outcome, in a folder DIR of input files; the model is a tiny Flux unless -i says otherwise."""
    folder = tmp_path_factory.mktemp("flags")
    tiny_checkpoint(folder / "m.safetensors")
    tiny_checkpoint(folder / "other.safetensors", {"a.weight": (64, 64)})
    tiny_checkpoint(folder / "learned.safetensors", LEARNED)
    save_file(old_file(), folder / "old.safetensors")
    (folder / "c.json").write_text(json.dumps(LAYER_CONFIG), encoding="utf-8")
    inputs = set(folder.iterdir())

    def once(arguments: str) -> Outcome:
        words = [word.replace("DIR", str(folder)) for word in arguments.split()]
        source = [] if {"-i", "--input"} & set(words) else ["-i", str(folder / "m.safetensors")]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*source, *words])
        made = sorted(set(folder.iterdir()) - inputs)
        models = [path.name for path in made if not path.name.endswith(SUFFIX)]
        outcome = Outcome(status, out.getvalue(), err.getvalue(), models)
        for path in made:
            if path.suffix == ".safetensors":
                read(path, outcome)
            path.unlink()
        return outcome

    return once


@pytest.fixture(scope="module")
def base(run):
    """`run`, each once: a run without a flag, which several flags are held against."""
    return functools.cache(run)


LAYER_CONFIG = {
    "single_blocks.0.linear1": {"format": "bnb_nf4"},
    r"double_blocks\.\d+\.img_mlp\.0": {"format": "bnb_nf4"},
}


def old_file() -> dict[str, torch.Tensor]:
    """A layer of old scaled FP8."""
    weight = random_tensors({"a.weight": (32, 48)})["a.weight"].to(torch.float8_e4m3fn)
    return {
        "a.weight": weight,
        "a.scale_weight": torch.tensor(0.5),
        "scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn),
    }


def read(path: Path, outcome: Outcome) -> None:
    with safe_open(path, "pt") as file:
        outcome.tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        outcome.recipe = json.loads((file.metadata() or {}).get("fewbits.recipe", "{}"))
    for name, value in outcome.tensors.items():
        if name.endswith(".comfy_quant"):
            outcome.markers[name.removesuffix(".comfy_quant")] = json.loads(bytes(value.tolist()))


def becomes(name: str, **wanted: object):
    """The layer's marker has these entries with the flag, and did not have all of them without it."""

    def check(without: Outcome, with_it: Outcome) -> None:
        def fits(outcome: Outcome) -> bool:
            return all(
                outcome.markers.get(name, {}).get(key) == value for key, value in wanted.items()
            )

        assert fits(with_it) and not fits(without), (
            without.markers.get(name),
            with_it.markers.get(name),
        )

    return check


def kept(name: str):
    def check(without: Outcome, with_it: Outcome) -> None:
        assert name in without.markers and name not in with_it.markers

    return check


def methods(**wanted: str):
    """layer=method after the flag; before it all of them are svd."""

    def check(without: Outcome, with_it: Outcome) -> None:
        for name, method in wanted.items():
            assert without.method(LAYERS[name]) == "svd" and with_it.method(LAYERS[name]) == method
        assert without.codes != with_it.codes

    return check


LAYERS = {"primary": LAYER, "fallback": KEPT, "custom": "double_blocks.0.txt_mlp.0"}


def other_codes(without: Outcome, with_it: Outcome) -> None:
    """The same layers in the same formats, and other codes."""
    assert without.markers == with_it.markers and without.tensors.keys() == with_it.tensors.keys()
    assert without.codes != with_it.codes


def nothing_changes(without: Outcome, with_it: Outcome) -> None:
    assert (
        without.codes == with_it.codes and without.recipe == with_it.recipe and with_it.status == 0
    )


def refused(message: str):
    def check(without: Outcome, with_it: Outcome) -> None:
        assert without.status == 0 and with_it.status == 2
        assert message in with_it.err and with_it.files == []

    return check


def check_input(without: Outcome, with_it: Outcome) -> None:
    assert with_it.files == ["other_float8_e4m3fn.safetensors"] and set(with_it.markers) == {"a"}


def check_output(without: Outcome, with_it: Outcome) -> None:
    assert without.files == ["m_float8_e4m3fn.safetensors"] and with_it.files == [
        "named.safetensors"
    ]


def check_json(without: Outcome, with_it: Outcome) -> None:
    assert json.loads(with_it.out)["family"] == "flux" and without.out.startswith(
        "+ fewbits quantize "
    )


def check_quiet(without: Outcome, with_it: Outcome) -> None:
    assert without.out and not with_it.out and with_it.codes == without.codes


def check_device(without: Outcome, with_it: Outcome) -> None:
    assert json.loads(with_it.out)["device"] == "cpu"


def check_dry_run(without: Outcome, with_it: Outcome) -> None:
    assert without.files and not with_it.files and "rules, in order" in with_it.out


def check_seed(without: Outcome, with_it: Outcome) -> None:
    assert (without.recipe["seed"], with_it.recipe["seed"]) == (0, 5)
    other_codes(without, with_it)


def check_heur(without: Outcome, with_it: Outcome) -> None:
    assert (
        LAYER in without.markers and not with_it.markers
    )  # every layer of the tiny model is too small to gain


def check_custom_heur(without: Outcome, with_it: Outcome) -> None:
    assert without.format(LAYER) == "int8_tensorwise" and LAYER not in with_it.markers
    assert (
        with_it.format("double_blocks.0.txt_mlp.0") == "float8_e4m3fn"
    )  # the other tiers are not judged


def check_preset(without: Outcome, with_it: Outcome) -> None:
    assert KEPT not in without.markers and with_it.format(KEPT) == "float8_e4m3fn"


def check_fullmatch(without: Outcome, with_it: Outcome) -> None:
    assert (
        without.format(LAYER) == "float8_e4m3fn"
        and "matched nothing; for regular expressions" in without.err
    )
    assert with_it.format(LAYER) == "bnb_nf4"


def check_convert(without: Outcome, with_it: Outcome) -> None:
    assert (
        without.status == 2 and "quantized already" in without.err
    )  # quantizing would round the codes again
    assert (
        with_it.format("a") == "float8_e4m3fn" and with_it.tensors["a.weight_scale"].item() == 0.5
    )


def check_hp_filter(without: Outcome, with_it: Outcome) -> None:
    assert (
        without.files and with_it.status == 2 and not with_it.files and "a (F8_E4M3)" in with_it.err
    )


CUSTOM = r"--simple --custom-layers img_mlp\.0 --custom-type int8"
# flag -> (arguments without it, arguments with it, what must differ)
CASES = {
    "input": ("--simple", "-i DIR/other.safetensors --simple", check_input),
    "output": ("--simple", "--simple -o DIR/named.safetensors", check_output),
    "overwrite": ("--simple -o DIR/other.safetensors --overwrite", "--simple -o DIR/other.safetensors",
                  refused("exists already")),
    "device": ("--simple", "--simple --device cpu --json", check_device),
    "quiet": ("--simple", "--simple --quiet", check_quiet),
    "json": ("--simple", "--simple --json", check_json),
    "dry-run": ("--simple", "--simple --dry-run", check_dry_run),
    "int8": ("--simple", "--simple --int8", becomes(LAYER, format="int8_tensorwise")),
    "nf4": ("--simple", "--simple --nf4", becomes(LAYER, format="bnb_nf4")),
    "fp4": ("--simple", "--simple --fp4", becomes(LAYER, format="bnb_fp4")),
    "nvfp4": ("--simple", "--simple --nvfp4", becomes(LAYER, format="nvfp4")),
    "mxfp8": ("--simple", "--simple --mxfp8", becomes(LAYER, format="mxfp8")),
    "convrot": ("--simple --int8", "--simple --int8 --convrot", becomes(LAYER, format="int8_tensorwise", convrot=True)),
    "convrot-group-size": ("--simple --convrot", "--simple --convrot --convrot-group-size 16",
                           becomes(LAYER, convrot=True, convrot_groupsize=16)),
    "scaling_mode": ("--simple", "--simple --scaling_mode row", becomes(LAYER, format="float8_e4m3fn_rowwise")),
    "block_size": ("--simple --nf4", "--simple --nf4 --block_size 128", becomes(LAYER, group_size=128)),
    "kernel_backend": ("--simple --int8", "--simple --int8 --kernel_backend lodewise",
                       becomes(LAYER, format="int8_lodewise")),
    "simple": ("--int8 --num_iter 5 --json", "--int8 --simple --json", methods(primary="nearest")),
    "full_precision_matrix_mult": ("--simple", "--simple --full_precision_matrix_mult",
                                   becomes(LAYER, full_precision_matrix_mult=True)),
    "full-precision-mm": ("--simple", "--simple --full-precision-mm", becomes(LAYER, full_precision_matrix_mult=True)),
    "fallback": ("--simple", "--simple --fallback int8", becomes(KEPT, format="int8_tensorwise")),
    "fallback-block-size": ("--simple --fallback nf4", "--simple --fallback nf4 --fallback-block-size 32",
                            becomes("time_in.in_layer", group_size=32)),
    "fallback-simple": ("--num_iter 5 --fallback int8 --json", "--num_iter 5 --fallback int8 --fallback-simple --json",
                        methods(fallback="nearest", primary="svd")),
    "custom-layers": ("--simple", CUSTOM, becomes(LAYER, format="int8_tensorwise")),
    "custom-type": (CUSTOM, CUSTOM.replace("int8", "fp4"), becomes(LAYER, format="bnb_fp4")),
    "custom-block-size": (CUSTOM, CUSTOM + " --custom-block-size 64", becomes(LAYER, format="int8_blockwise", group_size=64)),
    "custom-scaling-mode": (CUSTOM, CUSTOM + " --custom-scaling-mode row", becomes(LAYER, per_row=True)),
    "custom-simple": ("--num_iter 5 --json --custom-layers txt_mlp --custom-type int8",
                      "--num_iter 5 --json --custom-layers txt_mlp --custom-type int8 --custom-simple",
                      methods(custom="nearest", primary="svd")),
    "custom-heur": (CUSTOM, CUSTOM + " --custom-heur", check_custom_heur),
    "exclude-layers": ("--simple", r"--simple --exclude-layers img_mlp\.0\.weight$", kept(LAYER)),
    "heur": ("--simple", "--simple --heur", check_heur),
    "layer-config": ("--simple", "--simple --layer-config DIR/c.json", becomes("single_blocks.0.linear1", format="bnb_nf4")),
    "fullmatch": ("--simple --layer-config DIR/c.json", "--simple --layer-config DIR/c.json --fullmatch", check_fullmatch),
    "preset": ("--simple", "--simple --preset none", check_preset),
    "manual_seed": (LEARNING, LEARNING + " --manual_seed 5", check_seed),
    "seed": (LEARNING, LEARNING + " --seed 5", check_seed),
    # learned rounding; a schedule's own options need that schedule
    "optimizer": (LEARNING, LEARNING + " --optimizer adamw", other_codes),
    "num_iter": (LEARNING, LEARNING.replace("40", "2"), other_codes),
    "lr": (LEARNING, LEARNING + " --lr 0.01", other_codes),
    "lr_schedule": (LEARNING, LEARNING + " --lr_schedule exponential", other_codes),
    "lr_gamma": (LEARNING + " --lr_schedule exponential", LEARNING + " --lr_schedule exponential --lr_gamma 0.5", other_codes),
    "lr_patience": (LEARNING + " --lr_schedule plateau", LEARNING + " --lr_schedule plateau --lr_patience 0", other_codes),
    "lr_factor": (LEARNING + " --lr_schedule plateau", LEARNING + " --lr_schedule plateau --lr_factor 0.1", other_codes),
    "lr_min": (LEARNING + " --lr_schedule exponential --lr_gamma 0.1",
               LEARNING + " --lr_schedule exponential --lr_gamma 0.1 --lr_min 0.2", other_codes),
    "lr_cooldown": (LEARNING + " --lr_schedule plateau --lr_patience 0",
                    LEARNING + " --lr_schedule plateau --lr_patience 0 --lr_cooldown 9", other_codes),
    "lr_threshold": (LEARNING + " --lr_schedule plateau", LEARNING + " --lr_schedule plateau --lr_threshold 0.2", other_codes),
    "lr_adaptive_mode": (LEARNING, LEARNING + " --lr_adaptive_mode no-reset", other_codes),
    "top_p": (LEARNING, LEARNING + " --top_p 0.05", other_codes),
    "min_k": (LEARNING, LEARNING + " --min_k 60", other_codes),
    "max_k": (LEARNING, LEARNING + " --max_k 3", other_codes),
    "full_matrix": (LEARNING, LEARNING + " --full_matrix", other_codes),
    "early-stop-loss": (LEARNING, LEARNING + " --early-stop-loss 0.9", other_codes),
    "early-stop-lr": (LEARNING, LEARNING + " --early-stop-lr 0.24", other_codes),
    "early-stop-stall": (LEARNING, LEARNING + " --early-stop-stall 1", other_codes),
    "convert-fp8-scaled": ("--simple --int8 -i DIR/old.safetensors", "--convert-fp8-scaled -i DIR/old.safetensors",
                           check_convert),
    "hp-filter": ("--convert-fp8-scaled -i DIR/old.safetensors", "--convert-fp8-scaled --hp-filter a -i DIR/old.safetensors",
                  check_hp_filter),
    "input_scale": ("--simple", "--simple --input_scale", refused("must be measured")),
    "legacy": ("--simple", "--simple --legacy", refused("are read, never written")),
    "comfy_quant": ("--simple", "--simple --comfy_quant", nothing_changes),
    "low-memory": ("--simple", "--simple --low-memory", nothing_changes),
    "save-quant-metadata": ("--simple", "--simple --save-quant-metadata", nothing_changes),
    "calib_samples": ("--simple", "--simple --calib_samples 7", nothing_changes),
}  # fmt: skip


def test_every_flag_has_a_case():
    assert set(CASES) == {flag.name for flag in FLAGS} - set(PRESET_FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("flag", CASES)
def test_a_flag_changes_the_outcome_it_names(flag, base, run):
    without, with_it, check = CASES[flag]
    check(base(without), run(with_it))


@pytest.mark.parametrize("flag", PRESET_FLAGS)
def test_a_preset_flag_brings_the_rules_of_its_preset(flag, base, run):
    def named(outcome: Outcome) -> list[str]:
        rules = [rule["rule"] for rule in json.loads(outcome.out)["rules"]]
        return [rule for rule in rules if rule.startswith(f"preset {flag} ")]

    plan = "--simple --dry-run --json"
    assert named(run(f"{plan} --{flag}"))
    assert bool(named(base(plan))) == (flag == "flux")


def test_other_values_of_a_choice_change_the_outcome_too(run):
    """Flags with a list of values: each of them, not only the one in CASES."""
    formats = {
        mode: run(f"--simple --scaling_mode {mode}").format(LAYER)
        for mode in ("tensor", "row", "block", "block2d")
    }
    assert len(set(formats.values())) == 4
    assert run("--simple --int8 --kernel_backend blockwise").format(LAYER) == "int8_blockwise"
    codes = [run(f"{LEARNING} --optimizer {name}").codes for name in ("original", "adamw", "radam")]
    assert codes[0] != codes[1] != codes[2] != codes[0]
    codes = [
        run(f"{LEARNING} --lr_schedule {name}").codes
        for name in ("adaptive", "exponential", "plateau")
    ]
    assert codes[0] != codes[1] != codes[2] != codes[0]
    template = run("--dry-run create-template")
    assert template.files == ["m_layer_config_template.json"]
