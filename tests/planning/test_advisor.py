"""Advice: sizes to the byte, an order that can be explained, facts that agree with where they were measured."""

import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
import tomllib
import torch

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.doors.advise import PRODUCTS, advise_file, planned_ways, ranked, room_of
from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.advice import known_ways, oldest_comfyui
from fewbits.quant_ops.planning.gpus import card_here, card_names, find_card
from fewbits.quant_ops.planning.recipe import Draft, Recipe, Rule
from support import results
from support.comfy_models import whole_header
from support.harness import readme
from support.harness.emoji import ROOT
from support.harness.kernel_tables import rows_of
from support.helpers import EMOJI, fewbits, tiny_checkpoint
from support.wishes import WISHES

CARDS = (
    "RTX 2080 Ti", "RTX 3060 12GB", "RTX 3090", "RTX 4060", "RTX 4070 Ti Super", "RTX 4090",
    "RTX 5060 Ti 16GB", "RTX 5090", "A100 80GB", "H200",
)  # fmt: skip
MODELS = {
    "Flux.1 dev": "Flux.1",
    "Qwen-Image": "Qwen-Image",
    "Wan 2.1 t2v 14B": "Wan 2.2 14B, each file",
    "Z-Image": "Z-Image",
    "SDXL": "SDXL",
}
LABELS = {"int8_tensorwise, ConvRot": "int8_tensorwise:convrot=auto", "bnb_nf4, mse_clip": "bnb_nf4:method=mse_clip"}  # fmt: skip


@cache
def considered(name):
    """The plans of a real model in every format, from its header; for every card the same."""
    return planned_ways(SimpleNamespace(name=f"{name}.safetensors", header=whole_header(name)))


def advice(name, card):
    return ranked(considered(name), find_card(card))


def shown(wish):
    return f"`{wish.to_text()}`"


# ---- the tables of docs/advisor.md ----


def sizes_table():
    rows = {}
    for name in MODELS:
        for way in ranked(considered(name), None).ways:
            rows.setdefault(shown(way.wish), []).append(str(way.file_bytes))
    header = ["file in bytes", *MODELS.values()]
    return header, [[wish, *sizes] for wish, sizes in sorted(rows.items())]


def choices_table():
    rows = []
    for card in CARDS:
        for name, title in MODELS.items():
            best = advice(name, card).best
            room = f"{best.plan.bytes_after / 1e9:.1f} of {best.room / 1e9:.1f} GB"
            rows.append([find_card(card).label, title, shown(best.wish), room, f"{best.product.kind}: {best.product.why}"])  # fmt: skip
    return ["GPU", "model", "take", "weights of room for them", "product"], rows


@pytest.mark.slow  # plans of whole models in every format
@pytest.mark.parametrize(
    ("name", "table"), [("advised-sizes", sizes_table), ("advised", choices_table)]
)
def test_the_tables_of_the_page_are_what_the_advisor_says(name, table, comfy):
    header, rows = table()
    if readme.WRITE:
        readme.write(name, header, rows)
    assert readme.table(name) == [header, *rows]


# ---- facts ----


def test_every_format_is_advised_about():
    assert {known.wish.format for known in known_ways()} == set(FORMATS)


def test_quality_is_what_was_measured_of_the_pictures():
    measured = results.load("formats")
    wishes = {LABELS.get(label, wish): measured[label] for label, wish in WISHES.items()}
    for known in known_ways():
        row = wishes[known.wish.to_text()]
        assert (known.ssim, known.cosine) == (row["ssim"], row["latent_cosine"])


def test_speeds_are_those_of_the_benchmarks():
    """A whole model counts before single blocks; a method changes no speed."""
    found = {}
    for name in ("blocks.csv", "whole_model.csv"):
        for row in rows_of(name):
            if row["pixels"] == "1024":
                found[row["format"]] = round(float(row["bf16_ms"]) / float(row["ms"]), 2)
    for known in known_ways():
        layout = known.wish.to_text().replace(":method=mse_clip", "")
        stated = {"sm_90": found[layout]} if layout in found else {}
        assert known.speeds == stated, known.wish.to_text()


def test_the_oldest_comfyui_is_the_one_that_the_pack_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={oldest_comfyui()}"


# ---- cards ----


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("RTX 3060 12GB", "RTX 3060, 12 GB"),
        ("rtx3060", "RTX 3060, 12 GB"),
        ("NVIDIA GeForce RTX 3060 (8 GB)", "RTX 3060, 8 GB"),
        ("4070 ti super", "RTX 4070 Ti Super, 16 GB"),
        ("NVIDIA H200", "H200, 141 GB"),
        ("RTX 3060 12G", "RTX 3060, 12 GB"),
        ("RTX3060-12GB", "RTX 3060, 12 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100, 40 GB"),
        ("NVIDIA H100 80GB HBM3", "H100, 80 GB"),
        ("Tesla T4", "T4, 16 GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada, 48 GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090, 16 GB"),
    ],
)
def test_cards_are_found_as_people_write_them(text, label):
    assert find_card(text).label == label


def test_every_card_is_found_by_its_own_name():
    assert len(card_names()) > 60
    for name in card_names():
        assert find_card(name).name == re.sub(r" \d+GB$", "", name)


@pytest.mark.parametrize(
    ("text", "said"),
    [("RTX 3060 10GB", "RTX 3060 has 12 GB, 8 GB"), ("Voodoo 2", "known: RTX 2060 6GB"), ("", "known:"), ("RTX 4090 S", "RTX 4090 24GB, RTX 4090 16GB")],
)  # fmt: skip
def test_an_unknown_card_is_refused_with_those_that_are_known(text, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        find_card(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [("AMD Radeon RX 7900 XTX", "of AMD"), ("MI300X", "of AMD"), ("Apple M3 Max", "of Apple"), ("Intel Arc A770", "of Intel"), ("GTX 1080 Ti", "without tensor cores for 8 bit"), ("CPU", "no GPU")],
)  # fmt: skip
def test_what_nothing_is_known_of_is_called_what_it_is(text, what):
    with pytest.raises(RecipeError, match=f"no advice for '{text}', {what}: "):
        find_card(text)


def test_a_gpu_of_another_maker_is_no_card_though_torch_calls_it_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert card_here() is None


# ---- the advice ----


def test_the_size_is_that_of_the_file_to_the_byte(tmp_path):
    model = tiny_checkpoint(tmp_path / "model.safetensors")
    ways = advise_file(model, find_card("RTX 4090")).ways
    assert len(ways) == len(known_ways())
    for way in ways:
        out = tmp_path / "out.safetensors"
        quantize_file(model, out, Recipe(way.wish), overwrite=True)
        assert out.stat().st_size == way.file_bytes, way.wish.to_text()


def test_rules_of_the_user_count_for_the_sizes():
    kept = Draft(rules=(Rule("single_blocks.*", None),))
    card = find_card("RTX 4090")
    assert (
        advise_file(EMOJI, card, draft=kept).best.file_bytes
        > advise_file(EMOJI, card).best.file_bytes
    )


@pytest.mark.slow  # plans of whole models in every format
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_order_is_the_one_that_is_explained(name, card, comfy):
    found = advice(name, card)
    assert len(found.ways) == len(known_ways())
    best = found.best
    assert best.known.quality < 2
    if any(way.fits and way.known.quality < 2 for way in found.ways):
        assert best.fits
        assert best.plan.bytes_after <= room_of(find_card(card))
        fitting = [way for way in found.ways if way.fits and way.known.quality < 2]
        assert [way.known.quality for way in fitting] == sorted(
            way.known.quality for way in fitting
        )
    for way in found.ways:
        assert way.product.kind in PRODUCTS and way.product.why and way.reason
    assert [way.known.quality for way in found.ways][-2:] == [2, 2]


@pytest.mark.slow  # as above
def test_where_nothing_fits_the_smaller_ones_come_first_but_not_the_visibly_different(comfy):
    found = advice("Qwen-Image", "RTX 4060")
    assert not any(way.fits for way in found.ways)
    sizes = [way.file_bytes for way in found.ways if way.known.quality < 2]
    assert max(sizes[:4]) < min(sizes[5:]) and found.ways[-1].file_bytes < sizes[0]
    assert "does not fit" in found.best.reason


def test_units_decide_what_is_native():
    native = {}
    for card in ("RTX 2080 Ti", "RTX 3090", "RTX 4090", "RTX 5090"):
        ways = advise_file(EMOJI, find_card(card)).ways
        native[card] = {way.wish.to_text() for way in ways if way.product.kind == "native"}
    assert "int8_tensorwise:convrot=auto" in native["RTX 2080 Ti"]
    assert "float8_e4m3fn" not in native["RTX 3090"] and "float8_e4m3fn" in native["RTX 4090"]
    assert not {"nvfp4", "mxfp8"} & native["RTX 4090"] and {"nvfp4", "mxfp8"} <= native["RTX 5090"]
    assert "native" not in {way.product.kind for way in advise_file(EMOJI, None).ways}


@pytest.mark.parametrize(
    ("version", "opens"),
    [(None, "stock"), ("0.30.0", "stock"), ("0.27", "stock"), ("0.26.1", "FewBits"), ("v0.18.2", "FewBits"), ("0.10", None)],
)  # fmt: skip
def test_what_opens_depends_on_the_comfyui(version, opens):
    ways = advise_file(EMOJI, find_card("RTX 4090"), comfyui=version).ways
    found = {way.wish.to_text(): way.opens for way in ways}
    assert found["int8_tensorwise"] == opens
    assert found["float8_e4m3fn"] == "stock" and found["bnb_nf4"] == (opens and "FewBits")
    if opens is None:
        assert ways[0].opens == "stock"  # what opens comes first


# ---- the command ----


def test_the_command_says_it_in_order_with_reasons(tmp_path):
    done = fewbits("plan", EMOJI, "--advise", "--gpu", "RTX 3060 12GB", "--comfyui", "0.30.0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("emoji_flux.safetensors, Flux.1: 13.61 MB as it is, which fits too")
    assert "GPU: RTX 3060, 12 GB (sm_86)" in lines and "ComfyUI 0.30.0" in lines
    assert " 1 int8_tensorwise:convrot=auto " in done.stdout
    assert lines[-1].startswith("take int8_tensorwise:convrot=auto: fits: ")
    data = json.loads(fewbits("plan", EMOJI, "--advise", "--gpu", "h200", "--json").stdout)
    assert data["gpu"] == {"name": "H200", "sm": "sm_90", "memory_bytes": 141 * 10**9}
    assert data["best"] == data["formats"][0]["wish"]


def test_own_measurements_take_the_place_of_ours(tmp_path):
    rows = [{"format": "float8_e4m3fn", "M": m, "ms": 1.0, "bf16_ms": x} for m, x in ((16, 9.0), (4096, 1.5))]  # fmt: skip
    rows.append({"format": "int8_tensorwise", "M": 4096, "ms": 1.0, "bf16_ms": 0.5})
    bench = tmp_path / "b.json"
    bench.write_text(json.dumps({"device": "Some GPU", "kernels": [], "linears": rows}))
    run = fewbits("plan", EMOJI, "--advise", "--gpu", "RTX 4090", "--bench", bench, "--json")
    ways = {row["wish"]: row for row in json.loads(run.stdout)["formats"]}
    assert ways["float8_e4m3fn"]["speed"] == "faster than 16 bit (1.50 x, measured on Some GPU)"
    assert ways["int8_tensorwise"]["speed_ratio"] == 0.5
    assert ways["int8_tensorwise:convrot=auto"]["speed"] == "not measured on Some GPU"
    bench.write_text("[1]")
    refused = fewbits("plan", EMOJI, "--advise", "--bench", bench)
    assert refused.returncode == 2 and "not what `fewbits bench --json` prints" in refused.stderr


def test_auto_is_the_first_choice_and_has_a_full_name_in_the_plan(tmp_path):
    out = tmp_path / "out.safetensors"
    done = fewbits("quantize", EMOJI, "-o", out, "--format", "auto", "--gpu", "RTX 4090", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    best = advise_file(EMOJI, find_card("RTX 4090")).best
    assert out.stat().st_size == best.file_bytes
    assert f'format = "{best.wish.format}"' in report["recipe"] and '"auto"' not in report["recipe"].partition("[primary]")[2].partition("convrot")[0]  # fmt: skip


def test_auto_takes_a_method_and_rules():
    words = ("--format", "auto", "--gpu", "RTX 4090", "--method", "mse_clip", "--keep", "single_blocks.*")  # fmt: skip
    plan = json.loads(fewbits("plan", EMOJI, *words, "--json").stdout)
    methods = {row["method"] for row in plan["layers"] if row["action"] == "quantize"}
    assert methods == {"mse_clip"}
    assert all(row["action"] == "keep" for row in plan["layers"] if "single_blocks" in row["name"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--advise", "--format", "int8"), "leave out --format"),
        (("--format", "int8", "--gpu", "RTX 4090"), "--gpu and --comfyui are about"),
        (("--format", "auto", "--scaling", "row"), "leave --scaling out"),
        (("--format", "int8", "--bench", "b.json"), "--bench is about --advise"),
        (("--advise", "--comfyui", "new"), "is written as 0.30.0"),
        (("--advise", "--gpu", "Voodoo 2"), "unknown GPU"),
    ],
)
def test_contradictions_are_refused(words, said):
    done = fewbits("plan", EMOJI, *words)
    assert done.returncode == 2 and said in done.stderr
