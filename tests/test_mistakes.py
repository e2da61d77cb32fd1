"""Where each known mistake of other writers, and each correction of the classic command, is tested.

The names with hyphens are those of `fewbits verify`; the other lines are mistakes in how a file is made or computed
with, and the corrections of the command. The tests named for one fail on the behaviour it describes. Those that have no
better place stand below.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint.verify import MISTAKES
from fewbits.quant_ops.compat import main, quantize
from fewbits.quant_ops.doors import quantize_file, verify_file
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.helpers import random_tensors, tiny_checkpoint

HERE = Path(__file__).parent
FOUND = "checkpoint/test_verify.py::test_a_mistake_is_found_by_its_name"
HEADER = "checkpoint/test_verify.py::test_a_wrong_file_header_is_found_and_rewritten"
OURS = "checkpoint/test_verify.py::test_our_own_files_have_no_problems_and_small_errors"
LABEL = "compat/test_command.py::test_a_label_agrees_with_the_stored_scale"
ODD = "compat/test_command.py::test_odd_and_zero_layers_convert_in_every_format"
INT8 = "compat/test_command.py::test_int8_rounds_to_nearest_and_does_not_truncate"
STATUS = "compat/test_command.py::test_failures_exit_with_2_and_leave_nothing"
E5M2 = "compat/test_command.py::test_convert_fp8_scaled_keeps_codes_and_scales_e5m2_too"
DOORS = "checkpoint/test_every_door.py::test_every_door_says_the_same_and_writes_what_is_right"
SCALED = "cli/test_convert.py::test_scaled_fp8_becomes_comfy_quant_table_by_table"
MARKER = "checkpoint/test_importers.py::test_the_marker_owns_the_layers_below_its_prefix"

TESTS = {
    "codes-unexplained": ("checkpoint/test_other_tools.py::test_what_nothing_reads_is_a_problem_through_every_door",),
    "format-misspelled": ("checkpoint/test_other_tools.py::test_other_spellings_of_a_format_are_found_and_mended",),
    "marker-without-codes": ("checkpoint/test_other_tools.py::test_an_orphan_marker_is_dropped_and_the_weight_kept",),
    "scale-missing": ("checkpoint/test_other_tools.py::test_a_lost_scale_is_left_and_told",),
    "tag-says-one-scale": (FOUND, LABEL, "checkpoint/test_importers.py::test_a_row_scale_under_the_scalar_tag_is_relabelled_also_when_square"),
    "scale-not-0d": (FOUND, LABEL, "checkpoint/test_importers.py::test_one_element_scales_become_0_d_and_rows_become_columns"),
    "row-scale-shape": (FOUND, LABEL, "checkpoint/test_importers.py::test_one_element_scales_become_0_d_and_rows_become_columns"),
    "format-missing": (FOUND, "checkpoint/test_importers.py::test_int8_fast_without_format_reads_as_rows"),
    "header-differs": (HEADER, "checkpoint/test_importers.py::test_the_header_wins_over_the_tensor_and_both_are_written"),
    "truncated": (INT8, "checkpoint/test_verify.py::test_truncated_int8_is_told_from_rounded",
            "formats/test_golden.py::test_int8_of_a_is_the_golden_vector"),
    "tag-says-blocks": (FOUND, LABEL, ODD),
    "group-size-missing": (FOUND, "checkpoint/test_importers.py::test_block_scales_under_other_tags_are_relabelled"),
    "tag-hides-groups": (FOUND, "checkpoint/test_importers.py::test_block_scales_under_other_tags_are_relabelled"),
    "zero-layer-unpacked": (FOUND, "checkpoint/test_importers.py::test_the_zero_layer_defect_decodes_to_zeros"),
    "scale-not-finite": (FOUND, ODD, "formats/test_decode.py::test_a_zero_layer_decodes_to_exact_zeros",
            "checkpoint/test_importers.py::test_the_zero_layer_defect_decodes_to_zeros"),
    "scale-implausible": ("checkpoint/test_odd_files.py::test_a_scale_that_may_be_a_reciprocal_is_a_problem",),
    "nibbles-swapped": (FOUND, "checkpoint/test_verify.py::test_swapped_nibbles_are_told_from_another_model",
            "checkpoint/test_importers.py::test_flat_nf4_of_december_2025_is_read_low_nibble_first"),
    "shape-missing": (FOUND, "checkpoint/test_importers.py::test_a_flat_weight_takes_its_shape_from_the_original_or_is_refused"),
    "input-scale-wrong": (FOUND, OURS, "checkpoint/test_importers.py::test_a_legacy_input_scale_is_kept_when_it_can_be_one"),
    "blocks-clipped": ("checkpoint/test_verify.py::test_clipped_blocks_are_found",
            "kernels/test_block_scaled.py::test_the_exponent_is_that_of_the_smallest_power_of_two_not_below"),
    "block-scales-misplaced": ("checkpoint/test_verify.py::test_unswizzled_block_scales_are_found",
            "kernels/test_packing.py::test_swizzled_offsets_are_the_golden_ones"),
    "scale-not-float32": (FOUND, "checkpoint/test_importers.py::test_bf16_scales_are_widened"),
    "json-unreadable": (FOUND, "checkpoint/test_importers.py::test_unreadable_json_is_inferred_from_shapes_or_refused"),
    "dummy-scale": (FOUND, "checkpoint/test_importers.py::test_high_precision_layers_lose_their_dummy_scale_and_nothing_else"),
    "scale-lost": (FOUND, E5M2, SCALED),
    "marker-prefixed": (FOUND, MARKER, "checkpoint/test_importers.py::test_the_longest_prefix_owns_a_layer"),
    "precision marker dropped": (MARKER,),
    "metadata-lost": ("checkpoint/test_verify.py::test_lost_metadata_is_found",
            "planning/test_planner.py::test_the_input_order_and_foreign_metadata_are_kept"),
    "failures look like success": (STATUS, "checkpoint/test_writer.py::test_an_impossible_target_is_refused_before_any_work",
            "compat/test_command.py::test_a_filter_that_hits_an_fp8_layer_stops_the_conversion"),
    "one odd layer aborts the run": (ODD, "formats/test_chain.py::test_no_shape_stops_a_plan"),
    "codes-read-as-numbers": (FOUND, "formats/test_chain.py::test_an_embedding_table_is_quantized_only_where_comfyui_reads_it",
            "planning/test_planner.py::test_what_is_no_candidate_is_kept_and_says_why"),
    "rotation-unsaid": ("checkpoint/test_verify.py::test_a_rotation_that_the_json_does_not_say_is_found",
            "kernels/test_hadamard.py::test_a_unit_vector_becomes_its_golden_row"),
    "rotation-impossible": (FOUND, "kernels/test_hadamard.py::test_group_sizes_are_powers_of_four_from_4_to_1024"),
    "codes quantized as numbers": ("test_mistakes.py::test_codes_are_never_quantized_as_if_they_were_numbers",),
    "scales are not those of the codes": ("test_mistakes.py::test_the_reported_error_is_that_of_the_file",),
    "hybrid-scalar": (FOUND, "checkpoint/test_importers.py::test_hybrid_mxfp8_is_mxfp8"),
    "int8-tag-wrong": (FOUND, LABEL, "checkpoint/test_labels.py::test_every_shape_has_one_reading_or_none"),
    "the lowest code is written": ("kernels/test_grids.py::test_integers_round_half_to_even_and_the_lowest_code_is_never_used",),
    "scale-zero": (DOORS,),
    "codes-of-other-width": (DOORS,),
    "nan-codes": (FOUND, "kernels/test_grids.py::test_casts_to_e4m3_at_the_edges_are_the_golden_bytes"),
    "arithmetic in bf16": ("test_mistakes.py::test_a_bf16_file_gets_the_codes_of_its_float32_values",
            "kernels/test_grids.py::test_codes_of_any_dtype_are_those_of_the_weight_widened_to_float32"),
    "group-size-once": (FOUND, OURS),
    "header-unresolved": (HEADER, "checkpoint/test_importers.py::test_header_names_without_the_prefix_are_resolved_when_one_prefix_fits_all"),
    "foreign-names": ("checkpoint/test_verify.py::test_a_file_with_diffusers_names_is_reported",
            "planning/test_planner.py::test_files_whose_layers_comfyui_cannot_read_quantized_are_refused"),
    "names-misplaced": ("planning/test_misplaced.py::test_quantized_layers_under_such_names_are_a_problem",
            "planning/test_misplaced.py::test_a_model_under_two_prefixes_is_refused"),
    "format-unknown": (FOUND, "cli/test_template.py::test_an_unedited_template_is_refused_with_the_way_out",
            "planning/test_layer_config.py::test_a_malformed_config_is_refused_in_documented_words"),
    "unseeded randomness": ("compat/test_command.py::test_two_equal_runs_are_byte_identical_and_the_seed_is_recorded",
            "methods/test_svd.py::test_equal_seeds_give_equal_bytes_whatever_ran_before"),
    "orphan-side-tensor": (FOUND, "checkpoint/test_importers.py::test_orphan_scales_are_dropped_and_listed"),
    "scale rounded before the product": ("cli/test_convert.py::test_bf16_is_the_decoder_rounded_once",),
    "failures exit non-zero": (STATUS,),
    "a bare --dry-run never converts": ("compat/test_command.py::test_a_dry_run_prints_the_plan_and_converts_nothing",),
    "a label always agrees with the stored scale": (LABEL,),
    "INT8 rounds instead of truncating": (INT8,),
    "odd shapes never abort a run": (ODD,),
    "a zero layer decodes to zero": (ODD,),
    "e5m2 sources keep their scale": (E5M2,),
}  # fmt: skip


@cache
def functions(path: str) -> set[str]:
    return {node.name for node in ast.parse((HERE / path).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


def test_every_known_mistake_is_listed():
    assert set(MISTAKES) - {"unreadable", "far-from-original"} <= set(TESTS)


@pytest.mark.parametrize("mistake", TESTS)
def test_the_tests_named_for_a_mistake_exist(mistake):
    for test in TESTS[mistake]:
        path, name = test.split("::")
        assert name in functions(path), test
        if test in (FOUND, HEADER):  # one of its cases carries the name
            assert f'"{mistake}' in (HERE / path).read_text(encoding="utf-8")


def test_codes_are_never_quantized_as_if_they_were_numbers(tmp_path, capsys):
    """An FP8 weight, with or without its scale, is not the source of another format."""
    codes = random_tensors({"a.weight": (64, 64)})["a.weight"].to(torch.float8_e4m3fn)
    scale = {"a.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.empty(0).to(codes.dtype)}
    cases = {
        "scaled": ({"a.weight": codes, **scale}, "quantized already"),
        "cast": ({"a.weight": codes}, "nothing would be quantized"),
    }
    out = tmp_path / "out.safetensors"
    for name, (tensors, why) in cases.items():
        source = tmp_path / f"{name}.safetensors"
        save_file(tensors, source)
        for flags in ("--nvfp4", "--int8", "--nf4"):
            assert main(["-i", str(source), "-o", str(out), "--simple", flags]) == 2
            assert why in capsys.readouterr().err and not out.exists()


WISHES = [
    *FORMATS,
    "int8_tensorwise:scaling=tensor",
    "int8_tensorwise:convrot=true,convrot_groupsize=16",
]
LEARNED = [
    f"{wish}:method=svd,num_iter=9"
    for wish in ("float8_e4m3fn", "int8_blockwise", "bnb_nf4", "mxfp8", "nvfp4")
]
SEARCHED = [
    f"{wish}:method=mse_clip"
    for wish in ("float8_e4m3fn_block3d", "bnb_fp4", "nvfp4", "convrot_w4a4")
]


@pytest.mark.parametrize("wish", WISHES + LEARNED + SEARCHED)
def test_the_reported_error_is_that_of_the_file(wish, tmp_path):
    """Scales stored beside the codes are the ones these codes were fitted to."""
    model = tiny_checkpoint(
        tmp_path / "m.safetensors", {"a.weight": (256, 256), "odd.weight": (48, 100)}
    )
    report = quantize_file(
        model, tmp_path / "q.safetensors", Recipe(parse_wish(wish), preset="none")
    )
    stored = {
        layer.name: layer.rel_l2 for layer in verify_file(tmp_path / "q.safetensors", model).layers
    }
    told = {result.name: result.rel_l2 for result in report.results}
    assert told and stored == {name: pytest.approx(error, rel=1e-3) for name, error in told.items()}


@pytest.mark.parametrize("wish", [*WISHES, *SEARCHED])
def test_a_bf16_file_gets_the_codes_of_its_float32_values(wish, tmp_path):
    """Arithmetic in bf16 would round scales and quotients."""
    tensors = random_tensors({"a.weight": (256, 256), "odd.weight": (48, 100)})
    outputs = []
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        save_file(
            {key: value.to(dtype) for key, value in tensors.items()},
            tmp_path / f"{name}.safetensors",
        )
        out = tmp_path / f"{name}_q.safetensors"
        quantize_file(
            tmp_path / f"{name}.safetensors", out, Recipe(parse_wish(wish), preset="none")
        )
        outputs.append(
            {key: value for key, value in load_file(out).items() if not key.endswith("comfy_quant")}
        )
    assert outputs[0].keys() == outputs[1].keys()
    for key, value in outputs[0].items():
        assert torch.equal(
            *(tensor.reshape(-1).view(torch.uint8) for tensor in (value, outputs[1][key]))
        ), key


def test_the_classic_function_returns_the_same_errors_as_the_file(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors")
    report = quantize(input=model, output=tmp_path / "q.safetensors", nf4=True, num_iter=5)
    stored = {
        layer.name: layer.rel_l2 for layer in verify_file(tmp_path / "q.safetensors", model).layers
    }
    assert stored == {
        result.name: pytest.approx(result.rel_l2, rel=1e-3) for result in report.results
    }
