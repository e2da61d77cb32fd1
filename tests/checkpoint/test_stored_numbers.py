"""Numbers that a file states decide about no more memory than the file's own size, and scales are numbers."""

import json
import resource
import time

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops import doors
from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.checkpoint.importers.source import ImportedSource
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.errors import CheckpointError, QuantError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.sources import MemorySource
from support import dialects, hostile
from support.hostile import WEIGHT

HUGE = 2**31
INT8 = Recipe(primary=parse_wish("int8_tensorwise"), preset="none")


def tiny(size, *, nested_size=None, group=None):
    """One block of 64 weights whose size is stated as `size`."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    if group:
        tensors = dialects.d14("a", weight)
        marker = {"format": "bnb_nf4", "params": {"group_size": group}, "shape": [1, 64]}
        return {**tensors, "a.comfy_quant": dialects.json_tensor(marker)}
    tensors = dialects.nested("a", weight) if nested_size else dialects.bitsandbytes("a", weight)
    key = next(key for key in tensors if "quant_state" in key)
    state = json.loads(bytes(tensors[key].tolist())) | {"blocksize": size}
    if nested_size:
        state["nested_blocksize"] = nested_size
    return {**tensors, key: dialects.json_tensor(state)}


CASES = {
    "blocksize": tiny(HUGE),
    "nested_blocksize": tiny(64, nested_size=HUGE),
    "flat group_size": tiny(64, group=HUGE),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stated_size_allocates_no_more_than_the_layer_needs(case):
    ImportedSource(MemorySource(dialects.nested("a", WEIGHT))).layer("a")  # torch is warm
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    source = ImportedSource(MemorySource(CASES[case]))
    (made,) = source.translations.values()
    weight = made.decoded("F32", "").convert(dict(source_tensors(source)))["weight"]
    assert (
        weight.shape == (1, 64) and bool(weight.isfinite().all()) and float(weight.abs().max()) > 0
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert time.process_time() - started < 5


def source_tensors(source):
    stored = source.contents.layers["a"]
    return {suffix: stored.read(suffix) for suffix in stored.specs}


def test_a_single_block_decodes_alike_whatever_its_stated_size():
    exact = ImportedSource(MemorySource(tiny(64)), retarget=lambda made: made.decoded("F32", ""))
    stated = ImportedSource(MemorySource(tiny(HUGE)), retarget=lambda made: made.decoded("F32", ""))
    assert torch.equal(
        exact.layer("a")["weight"].bfloat16(), stated.layer("a")["weight"]
    )  # not a size of ours


MISFITS = {
    "too few nested blocks": ("weight.nested_absmax", torch.zeros(3), "has 3 entries, 64 codes in groups of 256 need 1"),
    "a short nested table": ("weight.nested_quant_map", torch.zeros(16), "of 16 entries; 256 are needed"),
    "codes as floats": ("weight.absmax", torch.zeros(64), "is F32, nested it is U8 codes"),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "tensor", "message"), MISFITS.values(), ids=MISFITS)
def test_nested_tensors_that_do_not_fit_each_other_are_refused(suffix, tensor, message):
    tensors = dialects.nested("a", WEIGHT) | {f"a.{suffix}": tensor}
    with pytest.raises(CheckpointError, match=message):
        ImportedSource(MemorySource(tensors, name="x"))


@pytest.mark.parametrize("value", [None, True, "1", [1], 10**400, -1, 0, 1.5, 2**63], ids=repr)
@pytest.mark.parametrize("key", ["blocksize", "nested_blocksize", "nested_offset", "shape"])
def test_a_number_that_is_none_is_refused_by_layer(key, value):
    tensors = dialects.nested("a", WEIGHT)
    name = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[name].tolist())) | {key: value}
    tensors[name] = dialects.json_tensor(state)
    if key == "nested_offset" and value in (-1, 0, 1.5, 2**63):
        assert ImportedSource(MemorySource(tensors)).layer("a")
        return
    with pytest.raises(CheckpointError, match="layer 'a'"):
        ImportedSource(MemorySource(tensors))


def test_text_that_is_too_long_is_not_read():
    class Counting(MemorySource):
        asked = ()

        def read(self, name):
            self.asked = (*self.asked, name)
            return super().read(name)

    long = torch.full((1 << 20,), 32, dtype=torch.uint8)
    codes = {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    source = Counting({**codes, "a.comfy_quant": long})
    with pytest.raises(CheckpointError, match="of 1048576 bytes; JSON of 65536 is read at most"):
        ImportedSource(source)
    assert "a.comfy_quant" not in source.asked


BROKEN = {"NaN": float("nan"), "infinite": float("inf"), "negative": -1.0}
SCALES = {
    "weight_scale": dialects.under("a", *dialects.native("int8_tensorwise", WEIGHT)),
    "scale_weight": dialects.scaled_fp8("a", WEIGHT) | {"scaled_fp8": torch.zeros(2)},
    "weight_scale_2": dialects.under("a", *dialects.native("nvfp4", WEIGHT)),
    "absmax": dialects.under("a", *dialects.native("bnb_nf4", WEIGHT)),
    "weight.absmax": dialects.bitsandbytes("a", WEIGHT),
    "weight.nested_absmax": dialects.nested("a", WEIGHT),
    "weight_s_channel": dialects.under("a", *dialects.native("asym_w4a8_int8", torch.randn(32, 256))),
}  # fmt: skip


@pytest.fixture(params=SCALES)
def damaged(request, tmp_path):
    """kind -> a file whose scale of this name has one value of that kind."""

    def make(kind):
        tensors = dict(SCALES[request.param])
        name = f"a.{request.param}"
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = BROKEN[kind]
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, tmp_path / "m.safetensors"
        )
        return tmp_path / "m.safetensors"

    return make


DOORS = {
    "convert": lambda source, out: doors.convert_file(source, out),
    "to bf16": lambda source, out: doors.convert_file(source, out, to="bf16"),
    "quantize": lambda source, out: doors.quantize_file(source, out, Recipe(primary=None)),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_scale_that_is_no_number_is_refused_by_layer_and_nothing_is_written(damaged, door, kind, tmp_path):  # fmt: skip
    with pytest.raises(CheckpointError, match=f"layer 'a': .* has .*1 {kind} of"):
        door(damaged(kind), tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_block_scales_that_are_no_numbers_are_refused(tmp_path, name):
    tensors = dialects.under("a", *dialects.native(name, WEIGHT))
    tensors["a.weight_scale"].view(torch.uint8).view(-1)[0] = 255
    save_file(tensors, tmp_path / "m.safetensors")
    for door in DOORS.values():
        with pytest.raises(CheckpointError, match="weight_scale has 1 NaN of"):
            door(tmp_path / "m.safetensors", tmp_path / "out.safetensors")


def test_absmax_that_bitsandbytes_rounded_below_zero_is_read(tmp_path):
    """A block of zeros beside others: nested statistics are rounded around their mean."""
    for seed in range(50):
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
        weight[::7] = 0
        tensors = dialects.nested("a", weight)
        if float(ImportedSource(MemorySource(tensors)).layer("a")["absmax"].min()) < 0:
            break
    else:
        raise AssertionError("no layer came out below zero")
    save_file(tensors, tmp_path / "m.safetensors")
    doors.convert_file(tmp_path / "m.safetensors", tmp_path / "ours.safetensors")
    doors.convert_file(tmp_path / "ours.safetensors", tmp_path / "bf16.safetensors", to="bf16")
    with FileSource(tmp_path / "bf16.safetensors") as found:
        assert not found.read("a.weight")[::7].any()


MALFORMED = {
    "format is a number": {"format": 5},
    "format is a list": {"format": ["int8_tensorwise"]},
    "format is a list in params": {"params": {"format": []}},
    "a list": [1, 2],
    "text": "int8_tensorwise",
}


@pytest.mark.parametrize("marker", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("place", ["layer", "file"])
def test_json_of_a_wrong_kind_is_an_error_of_ours(tmp_path, marker, place):
    tensors, _ = dialects.native("bnb_nf4", WEIGHT)
    header = (
        {"_quantization_metadata": json.dumps({"layers": {"a": marker}})}
        if place == "file"
        else None
    )
    named = dialects.under("a", tensors, marker if place == "layer" else None)
    save_file(named, tmp_path / "m.safetensors", metadata=header)
    for run in (*DOORS.values(), lambda source, out: doors.quantize_file(source, out, INT8)):
        try:
            run(
                tmp_path / "m.safetensors",
                tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors",
            )
        except QuantError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("shape", [(127,), (1, 128), (128, 1), ()], ids=str)
def test_a_pre_quant_scale_of_another_shape_is_refused(shape):
    tensors = dialects.bitsandbytes("a", WEIGHT) | {"a.pre_quant_scale": torch.ones(shape)}
    with pytest.raises(CheckpointError, match="pre_quant_scale is F32 .*one number per column"):
        ImportedSource(MemorySource(tensors))


def test_asym_w4a8_tensors_that_do_not_fit_are_refused():
    good = hostile.layers()["asym of another"]
    assert ImportedSource(MemorySource(good), ImportOptions()).layer("a")
    for name in ("weight_s_rel", "weight_s_channel", "weight_correction"):
        for tensor in (torch.ones(3), torch.ones(2, 3), torch.ones(1, 1, 1)):
            with pytest.raises(CheckpointError, match="layer 'a'"):
                ImportedSource(MemorySource({**good, f"a.{name}": tensor}))


@pytest.mark.parametrize("order", [{}, [], 1, None, True, "middle"], ids=repr)
def test_a_nibble_order_that_is_none_counts_as_not_said(order):
    tensors, marker = dialects.native("bnb_nf4", WEIGHT)
    named = dialects.under("a", tensors, {**marker, "nibble_order": order})
    (made,) = ImportedSource(MemorySource(named)).translations.values()
    assert made.nibbles == "high"
