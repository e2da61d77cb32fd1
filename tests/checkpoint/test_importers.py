"""Every dialect and its golden vectors, through the one entry that all doors use."""

import pytest
import torch

from fewbits.kernels.hadamard import rotate
from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.checkpoint.importers.bitsandbytes import nested_absmax
from fewbits.quant_ops.checkpoint.importers.source import ImportedSource
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.sources import MemorySource
from support import dialects
from support.vectors import A, B, bits, floats, raw

D14_ROW = "400cd6712ef9a24f0cd5611ee8923f0bc4601de7922ffac4501de6812ef9b340"
D30_ROW = "bff56a0ee6723dc7f45a9ee6612dc7f45bafe6602ed7734cafe5691ed6724cbf"
NF4_ROW = "04c06d17e29f2af4c05d16e18e29f3b04c06d17e29f2af4c05d16e18e29f3b04"
FP4_ROW = "bf5be2a02a63d73c4be5a92a12d63c4bf5be2a02a63d73c4be5a92a12d63c4bf"
A_E5M2 = "5bdf5763d35de76552d658da4ecf505100000000000000006aea6662df5b7bf7"
WIDE = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))


def imported(tensors, metadata=None, **options):
    return ImportedSource(MemorySource(tensors, metadata, "file"), ImportOptions(**options))


def one(tensors, metadata=None, **options):
    """(translation, canonical tensors) of the only layer."""
    source = imported(tensors, metadata, **options)
    (base,) = source.translations
    stored = source.layer(base)
    made = source.translations[base]
    assert {suffix: (str(t.dtype), tuple(t.shape)) for suffix, t in stored.items()} == {
        suffix: (str(source_dtype(dtype)), shape) for suffix, (dtype, shape) in made.outputs.items()
    }
    return made, stored


def source_dtype(name):
    from fewbits.quant_ops.sources import TORCH_DTYPES

    return TORCH_DTYPES[name]


def decoded(made, stored):
    return get_format(made.format).dequantize(stored, made.layer, made.options)


def native(name, weight=WIDE, **options):
    return dialects.native(name, weight, **options)


# ---- golden vectors ----


def test_flat_nf4_of_december_2025_is_read_low_nibble_first():
    row = torch.frombuffer(bytearray.fromhex(D14_ROW), dtype=torch.uint8)
    marker = {"format": "bnb_nf4", "params": {"group_size": 64}}
    tensors = dialects.under("a", {"weight": row, "absmax": floats("3f700000")}, marker)
    made, stored = one({**tensors, "a.bias": torch.zeros(1)})
    assert made.dialect == "flat-4bit" and made.format == "bnb_nf4"
    assert raw(stored["weight"]).hex() == NF4_ROW and stored["weight"].shape == (1, 32)


def test_d30_fp4_is_renumbered_and_swapped():
    tensors = dialects.d30("a", B[:1].contiguous(), "fp4")
    assert raw(tensors["a.weight"]).hex() == D30_ROW
    made, stored = one(tensors)
    assert (made.dialect, made.format) == ("bitsandbytes-low-nibble", "bnb_fp4")
    assert raw(stored["weight"]).hex() == FP4_ROW


def test_d30_nf4_is_told_from_bitsandbytes_by_its_first_json_key():
    made, stored = one(dialects.d30("a", B))
    assert made.dialect == "bitsandbytes-low-nibble"
    assert torch.equal(stored["weight"], native("bnb_nf4", B)[0]["weight"])


def test_bitsandbytes_files_have_the_golden_rows_in_one_column():
    tensors = dialects.bitsandbytes("a", B)
    assert tensors["a.weight"].shape == (128, 1) and raw(tensors["a.weight"])[:32].hex() == NF4_ROW
    text = bytes(tensors["a.weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert text == '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}'
    made, stored = one(tensors)
    assert (made.dialect, made.format) == ("bitsandbytes", "bnb_nf4")
    assert raw(stored["weight"]).hex().startswith(NF4_ROW)
    assert (
        stored["weight"].untyped_storage().data_ptr()
        == tensors["a.weight"].untyped_storage().data_ptr()
    )
    assert made.marker == {
        "format": "bnb_nf4", "group_size": 64, "params": {"group_size": 64}, "shape": [4, 64], "nibble_order": "high",
        "dtype": "bfloat16",
    }  # fmt: skip


def test_nested_absmax_is_table_times_absmax_plus_offset():
    table = (torch.arange(256) - 128) / 128
    found = nested_absmax(
        torch.tensor([0, 64, 128, 255], dtype=torch.uint8), table, torch.tensor([0.5]), 256, 0.25
    )
    assert found.tolist() == [-0.25, 0.0, 0.25, 0.74609375]


def test_the_zero_layer_defect_decodes_to_zeros():
    tensors = {"weight": torch.zeros(128, 128, dtype=torch.uint8), "absmax": torch.ones(128, 2, 1)}
    made, stored = one(
        dialects.under("a", tensors, {"format": "bnb_nf4", "params": {"group_size": 64}})
    )
    assert made.format == "bnb_nf4" and made.layer.shape == (128, 128)
    assert torch.equal(decoded(made, stored), torch.zeros(128, 128))


def test_int8_fast_without_format_reads_as_rows():
    codes = native("int8_tensorwise", A)[0]
    made, stored = one(dialects.under("a", codes, {"convrot": False, "per_row": True}))
    assert made.dialect == "int8-fast" and made.marker == {
        "format": "int8_tensorwise",
        "per_row": True,
    }
    assert torch.equal(stored["weight"], codes["weight"]) and stored["weight_scale"].shape == (4, 1)


def test_scaled_e5m2_stays_e5m2():
    codes = (
        torch.frombuffer(bytearray.fromhex(A_E5M2), dtype=torch.uint8)
        .view(torch.float8_e5m2)
        .view(4, 8)
    )
    marker = torch.zeros(2).to(torch.float8_e5m2)
    made, stored = one(
        {"a.weight": codes, "a.scale_weight": floats("3b112492"), "scaled_fp8": marker}
    )
    assert made.marker == {"format": "float8_e5m2", "full_precision_matrix_mult": True}
    assert bits(stored["weight_scale"]) == "3b112492" and stored["weight_scale"].shape == ()
    assert raw(stored["weight"]).hex() == A_E5M2


# ---- recognition ----

LOSSLESS = {
    "B0 nf4": (dialects.bitsandbytes("a", WIDE), "bitsandbytes", "bnb_nf4"),
    "B0 fp4": (dialects.bitsandbytes("a", WIDE, "fp4"), "bitsandbytes", "bnb_fp4"),
    "B0 g128": (dialects.bitsandbytes("a", WIDE, "nf4", 128), "bitsandbytes", "bnb_nf4"),
    "D30 nf4": (dialects.d30("a", WIDE), "bitsandbytes-low-nibble", "bnb_nf4"),
    "D30 fp4": (dialects.d30("a", WIDE, "fp4"), "bitsandbytes-low-nibble", "bnb_fp4"),
    "D14 nf4": (dialects.d14("a", WIDE), "flat-4bit", "bnb_nf4"),
    "D14 fp4": (dialects.d14("a", WIDE, "fp4"), "flat-4bit", "bnb_fp4"),
    "D19 nf4": (dialects.d19("a", WIDE), "flat-4bit-with-shape", "bnb_nf4"),
    "D19 fp4": (dialects.d19("a", WIDE, "fp4"), "flat-4bit-with-shape", "bnb_fp4"),
    "flat-4bit-with-state": (dialects.d19_legacy("a", WIDE), "flat-4bit-with-state", "bnb_nf4"),
    "int8-fast": (dialects.int8_fast("a", WIDE), "int8-fast", "int8_tensorwise"),
    "R1 convrot": (dialects.int8_fast("a", WIDE, 64), "int8-fast", "int8_tensorwise"),
    "L1 e4m3": (dialects.scaled_fp8("a", WIDE), "scaled_fp8", "float8_e4m3fn"),
    "L1 e5m2": (dialects.scaled_fp8("a", WIDE, "float8_e5m2"), "scaled_fp8", "float8_e5m2"),
}


@pytest.mark.parametrize("case", LOSSLESS)
def test_a_dialect_becomes_our_own_bytes(case):
    tensors, dialect, name = LOSSLESS[case]
    made, stored = one(tensors)
    assert (made.dialect, made.format) == (dialect, name)
    options = {"convrot": True, "convrot_groupsize": 64} if "convrot" in case else {}
    wanted, _ = native(name, **({"block_size": 128} if "g128" in case else options))
    assert set(stored) == set(wanted)
    assert all(torch.equal(raw_bytes(stored[key]), raw_bytes(wanted[key])) for key in wanted)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_legacy_marker_does_not_turn_4_bit_layers_into_fp8():
    tensors = {**dialects.d14("a", WIDE), "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    assert one(tensors)[0].format == "bnb_nf4"


def test_4_bit_bytes_with_scales_need_a_word_from_the_user():
    stored, _ = native("bnb_nf4")
    tensors = {
        "a.weight": dialects.swapped(stored["weight"]).reshape(-1), "a.scale_weight": stored["absmax"],
        "a.bias": torch.zeros(32), "scaled_fp8": torch.zeros(1),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="layer 'a'.*NF4 or FP4; say which to assume"):
        imported(tensors)
    made, found = one(tensors, assume="nf4")
    assert made.dialect == "flat-4bit-bytes" and torch.equal(found["weight"], stored["weight"])


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "text_encoders.t5xxl.transformer."]
)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_marker_owns_the_layers_below_its_prefix(prefix, size):
    tensors = dialects.scaled_fp8(f"{prefix}a", WIDE)
    source = imported(
        {**tensors, f"{prefix}scaled_fp8": torch.zeros(size, dtype=torch.float8_e4m3fn)}
    )
    marker = source.translations[f"{prefix}a"].marker
    assert marker.get("full_precision_matrix_mult", False) is (size == 2)
    assert not any("scaled_fp8" in name for name in source.header.tensors)


def test_the_longest_prefix_owns_a_layer():
    tensors = {**dialects.scaled_fp8("m.te.a", WIDE), **dialects.scaled_fp8("m.b", WIDE)}
    source = imported(
        {**tensors, "m.scaled_fp8": torch.zeros(2), "m.te.scaled_fp8": torch.zeros(0)}
    )
    assert "full_precision_matrix_mult" not in source.translations["m.te.a"].marker
    assert source.translations["m.b"].marker["full_precision_matrix_mult"] is True


@pytest.mark.parametrize(
    "value, kept",
    [(torch.tensor([0.5]), True), (torch.tensor(1.0), True), (torch.tensor([1.0, 2.0]), False),
     (torch.tensor(float("inf")), False), (torch.tensor(0.0), False)],
    ids=["half", "one", "vector", "infinite", "zero"],
)  # fmt: skip
def test_a_legacy_input_scale_is_kept_when_it_can_be_one(value, kept):
    source = imported(
        {**dialects.scaled_fp8("a", WIDE), "a.scale_input": value, "scaled_fp8": torch.zeros(0)}
    )
    assert ("input_scale" in source.translations["a"].outputs) is kept
    if kept:
        assert source.read("a.input_scale").shape == () and source.read(
            "a.input_scale"
        ) == value.reshape(())
    else:
        assert any(
            "'a'" in text and "scale_input dropped" in text for text in source.header.warnings
        )


def test_high_precision_layers_lose_their_dummy_scale_and_nothing_else():
    weight = WIDE.to(torch.bfloat16)
    tensors = {
        "a.weight": weight, "a.scale_weight": torch.tensor([2.0]), "a.scale_input": torch.ones(1),
        "scaled_fp8": torch.zeros(0),
    }  # fmt: skip
    source = imported(tensors)
    assert list(source.header.tensors) == ["a.weight"] and torch.equal(
        source.read("a.weight"), weight
    )
    assert any("2.0" in text for text in source.header.warnings)


def test_fp8_that_is_no_matrix_is_decoded_to_bf16():
    conv = torch.randn(4, 4, 3, 3).to(torch.float8_e4m3fn)
    norm = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    tensors = {
        "c.weight": conv, "c.scale_weight": torch.tensor(0.5), "n.weight": norm, "n.bias": norm,
        "scaled_fp8": torch.zeros(0),
    }  # fmt: skip
    source = imported(tensors)
    assert torch.equal(source.read("c.weight"), (conv.float() * 0.5).bfloat16())
    assert (
        source.read("n.weight").tolist() == [1.0, 2.0]
        and source.read("n.bias").dtype == torch.bfloat16
    )
    assert "_quantization_metadata" not in source.header.metadata


def test_fp8_without_a_scale_below_a_marker_gets_one():
    codes = WIDE.to(torch.float8_e4m3fn)
    made, stored = one({"a.weight": codes, "scaled_fp8": torch.zeros(0)})
    assert stored["weight_scale"] == 1.0 and "no scale: assumed 1.0" in made.note


def test_a_plain_fp8_cast_is_converted_but_left_alone_at_run_time():
    tensors = {"a.weight": WIDE.to(torch.float8_e4m3fn)}
    assert one(tensors)[0].dialect == "plain-fp8"
    assert imported(tensors, foreign_only=True).changes_nothing


def test_orphan_scales_are_dropped_and_listed():
    source = imported(
        {
            "b.weight": WIDE,
            "a.weight_scale": torch.ones(()),
            "a.b.comfy_quant": torch.zeros(4).byte(),
        }
    )
    assert list(source.header.tensors) == ["b.weight"]
    assert [
        text for text in source.header.warnings if "a.weight_scale" in text and "no weight" in text
    ]


# ---- labels and side tensors of comfy_quant files ----


def test_a_row_scale_under_the_scalar_tag_is_relabelled_also_when_square():
    square = torch.randn(64, 64)
    stored, _ = native("float8_e4m3fn_rowwise", square)
    made, found = one(dialects.under("a", stored, {"format": "float8_e4m3fn"}))
    assert made.format == "float8_e4m3fn_rowwise"
    assert torch.equal(
        decoded(made, found),
        decoded(*one(dialects.under("a", *native("float8_e4m3fn_rowwise", square)))),
    )


def test_block_scales_under_other_tags_are_relabelled():
    stored, _ = native("float8_e4m3fn_block3d", block_size=64)
    assert (
        one(dialects.under("a", stored, {"format": "float8_e4m3fn"}))[0].format
        == "float8_e4m3fn_block3d"
    )
    stored, _ = native("float8_e4m3fn_rowwise")
    assert (
        one(dialects.under("a", stored, {"format": "float8_e4m3fn_blockwise"}))[0].format
        == "float8_e4m3fn_rowwise"
    )


def test_one_element_scales_become_0_d_and_rows_become_columns():
    stored, marker = native("float8_e4m3fn")
    stored["weight_scale"] = stored["weight_scale"].reshape(1)
    assert one(dialects.under("a", stored, marker))[1]["weight_scale"].shape == ()
    stored, marker = native("int8_tensorwise")
    stored["weight_scale"] = stored["weight_scale"].reshape(-1)
    assert one(dialects.under("a", stored, marker))[1]["weight_scale"].shape == (32, 1)


def test_bf16_scales_are_widened():
    stored, marker = native("int8_tensorwise")
    stored["weight_scale"] = stored["weight_scale"].bfloat16()
    found = one(dialects.under("a", stored, marker))[1]["weight_scale"]
    assert found.dtype == torch.float32 and torch.equal(found, stored["weight_scale"].float())


def test_hybrid_mxfp8_is_mxfp8():
    weight = torch.randn(64, 64)
    stored, marker = native("mxfp8", weight)
    hybrid = {**stored, "weight_scalar": torch.tensor(3.0)}
    made, found = one(dialects.under("a", hybrid, {**marker, "format": "hybrid_mxfp8"}))
    assert (made.dialect, made.format) == ("hybrid_mxfp8", "mxfp8") and "weight_scalar" not in found
    assert torch.equal(found["weight_scale"], stored["weight_scale"])


def test_torch_dtype_names_are_read():
    stored, marker = native("nvfp4", torch.randn(32, 32))
    made, _ = one(dialects.under("a", stored, {**marker, "orig_dtype": "torch.bfloat16"}))
    assert made.marker["orig_dtype"] == "bfloat16"


def test_unreadable_json_is_inferred_from_shapes_or_refused():
    stored, _ = native("int8_tensorwise")
    tensors = {**dialects.under("a", stored), "a.comfy_quant": torch.zeros(40, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="layer 'a'.*could have said .* rotated"):
        imported(tensors)
    made, _ = one(tensors, assume_convrot=16)
    assert made.format == "int8_tensorwise" and made.options.convrot
    stored, _ = native("float8_e4m3fn")
    tensors = {**dialects.under("a", stored), "a.comfy_quant": torch.zeros(40, dtype=torch.uint8)}
    assert one(tensors)[0].format == "float8_e4m3fn"
    stored, _ = native("nvfp4", torch.randn(32, 32))
    with pytest.raises(CheckpointError, match="layer 'a'.*order of scales and nibbles"):
        imported(
            {**dialects.under("a", stored), "a.comfy_quant": torch.zeros(40, dtype=torch.uint8)}
        )


def test_the_header_wins_over_the_tensor_and_both_are_written():
    import json

    stored, marker = native("int8_tensorwise")
    header = json.dumps({"layers": {"a": marker}})
    source = imported(
        dialects.under("a", stored, {"format": "int8_tensorwise"}),
        {"_quantization_metadata": header, "x": "y"},
    )
    assert any("header/tensor mismatch" in text for text in source.header.warnings)
    assert json.loads(source.header.metadata["_quantization_metadata"])["layers"] == {"a": marker}
    assert source.header.metadata["x"] == "y"


def test_header_names_without_the_prefix_are_resolved_when_one_prefix_fits_all():
    import json

    stored, marker = native("int8_tensorwise")
    header = json.dumps({"layers": {"a": marker}})
    source = imported(
        dialects.under("model.diffusion_model.a", stored), {"_quantization_metadata": header}
    )
    assert source.translations["model.diffusion_model.a"].marker == marker


def test_embeddings_in_formats_comfyui_cannot_look_up_are_decoded():
    tensors = dialects.bitsandbytes("model.embed_tokens", WIDE)
    source = imported(tensors)
    assert list(source.header.tensors) == ["model.embed_tokens.weight"]
    made, stored = one(dialects.bitsandbytes("a", WIDE))
    assert torch.equal(source.read("model.embed_tokens.weight"), decoded(made, stored).bfloat16())


def test_unknown_formats_are_named_in_files_and_left_alone_at_run_time():
    tensors = dialects.under(
        "a", {"weight": torch.zeros(16, 8, dtype=torch.uint8)}, {"format": "svdquant_w4a4"}
    )
    with pytest.raises(CheckpointError, match="layer 'a': format svdquant_w4a4 is not read"):
        imported(tensors)
    assert imported(tensors, foreign_only=True).changes_nothing


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "int8_tensorwise", "int8_blockwise", "bnb_nf4", "nvfp4", "mxfp8"]
)
def test_our_own_files_stay_as_they_are(name):
    tensors = dialects.under("a", *native(name, torch.randn(128, 128)))
    made, stored = one(tensors)
    assert made.dialect == "comfy_quant" and made.note == ""
    assert all(torch.equal(raw_bytes(stored[k]), raw_bytes(tensors[f"a.{k}"])) for k in stored)
    assert imported(tensors, foreign_only=True).changes_nothing


# ---- decoding where no format holds the codes ----


@pytest.mark.slow
def test_an_odd_width_is_decoded():
    import bitsandbytes.functional as oracle

    weight = torch.randn(7, 33)
    codes, state = oracle.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    pieces = {f"a.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    source = imported({"a.weight": codes, **pieces})
    made = source.translations["a"]
    assert made.format is None and "K=33 is odd" in made.note
    assert torch.equal(source.read("a.weight"), oracle.dequantize_4bit(codes, state))


def test_af4_is_decoded_with_its_own_table():
    stored, _ = native("bnb_nf4")
    marker = {
        "format": "bnb_af4",
        "group_size": 64,
        "shape": [32, 128],
        "params": {"group_size": 64},
    }
    source = imported(
        dialects.under(
            "a", {"weight": stored["weight"].reshape(-1), "absmax": stored["absmax"]}, marker
        )
    )
    assert source.translations["a"].format is None
    first = int(stored["weight"].reshape(-1)[0]) & 15
    from fewbits.quant_ops.checkpoint.importers.four_bit import AF4_VALUES

    wanted = torch.tensor(AF4_VALUES[first]) * stored["absmax"][0]
    assert source.read("a.weight")[0, 0] == wanted.bfloat16()


def test_blocks_of_a_size_that_is_not_written_are_decoded():
    codes = torch.randint(-127, 128, (16, 24), dtype=torch.int8)
    scale = torch.rand(2, 3)
    source = imported({"a.weight": codes, "a.weight_scale": scale})
    assert "blocks of 8" in source.translations["a"].note
    wanted = codes.float() * scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(source.read("a.weight"), wanted.bfloat16())


@pytest.mark.parametrize("six_bits", [False, True], ids=["4 bit", "6 bit"])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
def test_asymmetric_w4a8_without_a_codebook(six_bits, corrected):
    generator = torch.Generator().manual_seed(1)
    n, k, group = 16, 64, 16
    codes = torch.randint(0, 64 if six_bits else 16, (n, k), generator=generator)
    low = (codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4
    top = sum((codes[:, i::4] >> 4) << 2 * i for i in range(4))
    packed = torch.cat([low, top], 1) if six_bits else low
    relative, channel = (
        torch.rand(n, k // group, generator=generator) * 4,
        torch.rand(n, generator=generator),
    )
    correction = torch.randn(k // group, n, generator=generator)
    tensors = {
        "weight": packed.to(torch.uint8).view(torch.int8),
        "weight_s_rel": relative,
        "weight_s_channel": channel,
    }
    if corrected:
        tensors["weight_correction"] = correction
    marker = {"format": "asym_w4a8_int8", "group_size": group, "convrot_groupsize": 64}
    made, stored = one(dialects.under("a", tensors, marker))
    assert made.dialect == "asym_w4a8" and made.format is None
    levels = codes.float() - (32 if six_bits else 8)
    grid = (levels * relative.repeat_interleave(group, 1)).round().clamp(-127, 127) * channel[
        :, None
    ]
    if corrected:
        grid += correction.t().repeat_interleave(group, 1)
    assert torch.equal(stored["weight"], rotate(grid, 64).bfloat16())


def test_a_pre_quant_scale_is_multiplied_into_a_decoded_weight():
    tensors = {
        **dialects.bitsandbytes("shared", WIDE),
        "shared.pre_quant_scale": torch.arange(1.0, 129.0),
    }
    source = imported(tensors)
    plain = imported(dialects.bitsandbytes("a", WIDE))
    weight = get_format("bnb_nf4").dequantize(
        plain.layer("a"), plain.translations["a"].layer, plain.translations["a"].options
    )
    assert torch.equal(source.read("shared.weight"), (weight * torch.arange(1.0, 129.0)).bfloat16())


# ---- nibble order and shape, never guessed ----


def test_without_any_evidence_the_high_nibble_comes_first_and_says_so():
    tensors = dialects.bitsandbytes("a", WIDE)
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = dialects.json_tensor(
        {"shape": [32, 128], "blocksize": 64}
    )
    source = imported(tensors)
    assert source.translations["a"].nibbles == "high"
    assert any("say that the low one comes first" in text for text in source.header.warnings)
    assert imported(tensors, nibble_order="low").translations["a"].nibbles == "low"
    assert (
        imported({**tensors}, {"_quantization_metadata": '{"formats": {}}'})
        .translations["a"]
        .nibbles
        == "low"
    )
    tensors["a.weight.absmax"][3] = 1e-12
    assert imported(tensors).translations["a"].nibbles == "low"


def test_both_orders_in_one_file_are_refused():
    with pytest.raises(CheckpointError, match="one file has one order"):
        imported({**dialects.bitsandbytes("a", WIDE), **dialects.d30("b", WIDE)})


def test_a_flat_weight_takes_its_shape_from_the_original_or_is_refused():
    tensors = dialects.d14("a", WIDE)
    del tensors["a.bias"]
    with pytest.raises(CheckpointError, match="layer 'a'.*give the original file for the shapes"):
        imported(tensors)
    assert one(tensors, shapes={"a.weight": (32, 128)})[1]["weight"].shape == (32, 64)


def test_counts_that_do_not_fit_are_refused():
    tensors = dialects.bitsandbytes("a", WIDE)
    tensors["a.weight.absmax"] = tensors["a.weight.absmax"][:-1]
    with pytest.raises(CheckpointError, match="absmax has 63 entries.*needs 64"):
        imported(tensors)


def test_a_rotated_layer_without_json_needs_a_word_from_the_user():
    tensors = dialects.int8_fast("a", WIDE, 64)
    del tensors["a.comfy_quant"]
    assert one(tensors)[0].marker == {"format": "int8_tensorwise", "per_row": True}
    assert one(tensors, assume_convrot=64)[0].marker["convrot_groupsize"] == 64
