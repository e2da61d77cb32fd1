"""GPTQ, compressed-tensors and FP8 in blocks: packed here in numpy, bit by bit, and decoded by every door."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import (
    convert_file,
    inspect_file,
    quantize_file,
    repair_file,
    verify_file,
)
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

N, K = 64, 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture
def write(tmp_path):
    def run(tensors):
        path = tmp_path / "in.safetensors"
        save_file({f"a.{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)
        return path

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture
def dice():
    return np.random.default_rng(3)


def words_of(rows, bits):
    """Each row of numbers as one string of bits, lowest first, cut into I32."""
    strings = ((rows[:, :, None] >> np.arange(bits)) & 1).reshape(len(rows), -1)
    strings = np.pad(strings, ((0, 0), (0, -strings.shape[1] % 32)))
    packed = np.packbits(strings.astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def same_through_every_door(path, out, truth, dialect):
    """Decoded by convert and repair, and what quantize starts from."""
    inspection = inspect_file(path)
    assert inspection.findings == () and verify_file(path).ok
    assert next(iter(inspection.dialects)).startswith(dialect)
    assert "FewBits" in inspection.loads_in
    for door in (
        lambda: convert_file(path, out, to="bf16", overwrite=True),
        lambda: repair_file(path, out, overwrite=True),
    ):
        door()
        stored = load_file(out)
        assert list(stored) == ["a.weight"]
        wanted = torch.from_numpy(truth.astype(np.float32)).to(stored["a.weight"].dtype)
        assert torch.equal(stored["a.weight"], wanted)
    recipe = Recipe(parse_wish("int8_tensorwise"), preset="none")
    plan = quantize_file(path, out, recipe, overwrite=True).plan
    assert any("decoded from codes of other tools" in text for text in plan.warnings)
    made = load_file(out)
    decoded = made["a.weight"].float() * made["a.weight_scale"]
    assert np.linalg.norm(decoded.numpy() - truth) < 0.02 * np.linalg.norm(truth)


def gptq(dice, bits, stored_zero, ordered=True):
    codes = dice.integers(0, 1 << bits, (K, N))
    group = np.arange(K) // 64 if ordered else dice.permutation(np.arange(K) // 64)
    scales = dice.uniform(0.01, 0.02, (K // 64, N)).astype(np.float16)
    zeros = np.full((K // 64, N), stored_zero)
    tensors = {
        "qweight": words_of(codes.T, bits).T,
        "qzeros": words_of(zeros, bits),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    truth = (codes - (1 << (bits - 1))) * scales.astype(np.float32)[group]
    return tensors, truth.T


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_gptq_of_either_version_is_decoded(bits, version, dice, write, out):
    """The first stores zero points less one; 2^(bits - 1) everywhere shows which it is."""
    tensors, truth = gptq(dice, bits, (1 << (bits - 1)) - (version == 1), ordered=version == 1)
    same_through_every_door(write(tensors), out, truth, "gptq")


def test_gptq_without_g_idx_has_its_groups_in_order(dice, write, out):
    tensors, truth = gptq(dice, 4, 7)
    del tensors["g_idx"]
    same_through_every_door(write(tensors), out, truth, "gptq")


def test_gptq_with_other_zero_points_is_refused(dice, write, out):
    tensors, _ = gptq(dice, 4, 7)
    tensors["qzeros"] = words_of(dice.integers(0, 16, (K // 64, N)), 4)
    path = write(tensors)
    why = "whether they are stored less one is not said"
    assert why in inspect_file(path).findings[0] and not verify_file(path).ok
    for door in (convert_file, repair_file):
        with pytest.raises(CheckpointError, match=why):
            door(path, out)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_integers_of_compressed_tensors_are_decoded(bits, zeros, dice, write, out):
    half = 1 << (bits - 1)
    codes = dice.integers(-half, half, (N, K))
    scales = torch.from_numpy(dice.uniform(0.01, 0.02, (N, K // 64)).astype(np.float32)).bfloat16()
    tensors = {
        "weight_packed": words_of(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
    }
    zero = np.zeros((N, K // 64), dtype=int)
    if zeros:
        zero = dice.integers(-half, half, (N, K // 64))
        tensors["weight_zero_point"] = words_of((zero + half).T, bits).T
    spread = [np.repeat(part, 64, 1) for part in (zero, scales.float().numpy())]
    same_through_every_door(write(tensors), out, (codes - spread[0]) * spread[1], "compressed-t")


def test_columns_in_groups_of_their_own_are_decoded(dice, write, out):
    codes, group = dice.integers(-8, 8, (N, K)), dice.permutation(np.arange(K) // 64)
    scales = torch.from_numpy(dice.uniform(0.01, 0.02, (N, K // 64)).astype(np.float32))
    tensors = {
        "weight_packed": words_of(codes + 8, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
        "weight_g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    same_through_every_door(write(tensors), out, codes * scales.numpy()[:, group], "compressed-t")


@pytest.mark.parametrize("kind", ["row", "tensor"])
def test_int8_with_zero_points_is_decoded(kind, dice, write, out):
    codes = dice.integers(-128, 128, (N, K))
    shape = (N, 1) if kind == "row" else (1,)
    scale = torch.from_numpy(dice.uniform(0.01, 0.02, shape).astype(np.float32))
    zero = dice.integers(1, 20, shape)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "weight_scale": scale,
        "weight_zero_point": torch.from_numpy(zero.astype(np.int8)),
    }
    truth = (codes - zero).astype(np.float32) * scale.numpy()
    same_through_every_door(write(tensors), out, truth, "compressed-t")


def test_int8_whose_zero_points_are_zero_keeps_its_codes(dice, write, out):
    codes = torch.from_numpy(dice.integers(-127, 128, (N, K)).astype(np.int8))
    tensors = {
        "weight": codes,
        "weight_scale": torch.rand(N, 1) + 0.1,
        "weight_zero_point": torch.zeros(N, 1, dtype=torch.int8),
    }
    path = write(tensors)
    assert inspect_file(path).formats == {"int8_tensorwise": 1}
    convert_file(path, out)
    stored = load_file(out)
    assert torch.equal(stored["a.weight"], codes) and set(stored) == {
        "a.weight",
        "a.weight_scale",
        "a.comfy_quant",
    }


def test_nvfp4_of_compressed_tensors_becomes_comfyuis(dice, write, out):
    codes = dice.integers(0, 16, (N, K))
    scales = torch.from_numpy(dice.uniform(1, 400, (N, K // 16))).to(torch.float8_e4m3fn)
    divisor = torch.tensor([4000.0])
    tensors = {
        "weight_packed": torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": scales,
        "weight_global_scale": divisor,
        "input_global_scale": torch.tensor([100.0]),
    }
    path = write(tensors)
    assert inspect_file(path).formats == {"nvfp4": 1} and verify_file(path).ok
    truth = E2M1[codes] * np.repeat(scales.float().numpy(), 16, 1) / 4000
    convert_file(path, out)
    assert inspect_file(out).loads_in.startswith("loads in stock ComfyUI >= 0.8.0")
    convert_file(path, out, to="bf16", overwrite=True)
    wanted = torch.from_numpy(truth.astype(np.float32)).bfloat16()
    assert torch.equal(load_file(out)["a.weight"], wanted)


def test_mxfp4_of_compressed_tensors_is_decoded(dice, write, out):
    codes, exponents = dice.integers(0, 16, (N, K)), dice.integers(110, 125, (N, K // 32))
    tensors = {
        "weight_packed": torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": torch.from_numpy(exponents.astype(np.uint8)),
    }
    truth = E2M1[codes] * np.repeat(2.0 ** (exponents - 127), 32, 1)
    same_through_every_door(write(tensors), out, truth, "compressed-t")


UNREAD = {
    "no shape": lambda t: {k: v for k, v in t.items() if k != "weight_shape"},
    "another shape": lambda t: t | {"weight_shape": torch.tensor([N, 8 * K + 1])},
    "scales of other rows": lambda t: t | {"weight_scale": torch.ones(N + 1, 4)},
    "transposed scales": lambda t: t | {"weight_scale": torch.ones(4, N)},
    "a bitmask": lambda t: {"weight_packed": t["weight_packed"], "bitmask": torch.ones(N, 8, dtype=torch.uint8)},
    "ComfyUI's JSON": lambda t: t | {"comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_has_not_all_its_parts_is_refused_by_name(case, dice, write, out):
    tensors = {
        "weight_packed": words_of(dice.integers(0, 16, (N, K)), 4),
        "weight_scale": torch.ones(N, 4),
        "weight_shape": torch.tensor([N, K]),
    }
    path = write(UNREAD[case](tensors))
    assert inspect_file(path).findings and not verify_file(path).ok
    for door in (convert_file, repair_file):
        with pytest.raises(CheckpointError, match=r"compressed-tensors|hold codes"):
            door(path, out)
    assert not out.exists()


BROKEN = {
    "NaN": lambda scale: scale.fill_(float("nan")),
    "infinite": lambda scale: scale.fill_(float("inf")),
    "negative": lambda scale: scale.neg_(),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("tool", ["gptq", "integers", "blocks"])
def test_scales_that_are_none_are_refused_and_found(tool, case, dice, write, out):
    if tool == "gptq":
        tensors, name = gptq(dice, 4, 7)[0], "scales"
    elif tool == "integers":
        name = "weight_scale"
        tensors = {
            "weight_packed": words_of(dice.integers(0, 16, (N, K)), 4),
            name: torch.ones(N, 4),
            "weight_shape": torch.tensor([N, K]),
        }
    else:
        tensors, name = {"weight": torch.ones(200, 300).to(torch.float8_e4m3fn)}, "weight_scale_inv"
        tensors[name] = torch.ones(2, 3)
    BROKEN[case](tensors[name][0, :1])
    path = write(tensors)
    assert "scale-not-finite" in {finding.name for finding in verify_file(path).findings}
    for door in (convert_file, repair_file):
        with pytest.raises(CheckpointError, match=f"{name} has .* values; the file is damaged"):
            door(path, out)


def test_a_group_that_there_is_not_is_refused(dice, write, out):
    tensors = {
        "weight_packed": words_of(dice.integers(0, 16, (N, K)), 4),
        "weight_scale": torch.ones(N, 4),
        "weight_shape": torch.tensor([N, K]),
        "weight_g_idx": torch.full((K,), 4, dtype=torch.int32),
    }
    path = write(tensors)
    assert not verify_file(path).ok
    with pytest.raises(CheckpointError, match="names a group beyond the 4"):
        convert_file(path, out)


# ---- quanto ----


@pytest.mark.parametrize("floats", [False, True], ids=["whole shifts", "float shifts"])
@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_of_quanto_are_decoded_where_the_bias_says_their_shape(
    bits, floats, dice, write, out
):
    groups, per_byte = N * K // 128, 8 // bits
    codes = dice.integers(0, 1 << bits, (groups, 128))
    scale = torch.from_numpy(dice.uniform(0.01, 0.02, (groups, 1)).astype(np.float32)).bfloat16()
    shift = torch.from_numpy(dice.integers(0, 1 << bits, (groups, 1)).astype(np.int8))
    packed = sum(part << (bits * at) for at, part in enumerate(np.split(codes, per_byte)))
    steps = scale.double().numpy()
    grouped = (codes - shift.numpy()) * steps
    if floats:
        shift = (shift.float() * scale.float()).bfloat16()
        grouped = (codes * steps).astype(np.float32) - shift.float().numpy()
    tensors = {
        "weight._data._data": torch.from_numpy(packed.astype(np.uint8)),
        "weight._scale": scale,
        "weight._shift": shift,
    }
    path = write(tensors)
    assert "do not say their shape" in str(inspect_file(path).findings)
    with pytest.raises(CheckpointError, match="give the original file for the shapes"):
        convert_file(path, out)
    path = write(tensors | {"bias": torch.zeros(N)})
    assert inspect_file(path).findings == () and verify_file(path).ok
    convert_file(path, out, to="bf16")
    wanted = torch.from_numpy(grouped.reshape(N, K).astype(np.float32)).bfloat16()
    assert torch.equal(load_file(out)["a.weight"], wanted)


# ---- FP8 in blocks ----


def in_blocks(weight, size=128):
    """(codes, scales) of blocks that may end within the matrix."""
    n, k = weight.shape
    scales = np.zeros((-(-n // size), -(-k // size)), dtype=np.float32)
    codes = torch.zeros(n, k).to(torch.float8_e4m3fn)
    for row in range(0, n, size):
        for column in range(0, k, size):
            block = weight[row : row + size, column : column + size]
            scale = scales[row // size, column // size] = np.abs(block).max() / 448
            codes[row : row + size, column : column + size] = torch.from_numpy(block / scale).to(
                codes.dtype
            )
    return codes, scales


@pytest.mark.parametrize("shape", [(200, 300), (129, 128)])
def test_blocks_that_end_within_the_matrix_are_decoded(shape, dice, write, out):
    codes, scales = in_blocks(dice.normal(size=shape).astype(np.float32))
    spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    truth = codes.float().numpy() * spread
    tensors = {"weight": codes, "weight_scale_inv": torch.from_numpy(scales)}
    same_through_every_door(write(tensors), out, truth, "fp8-scale-inv")


def test_blocks_that_fit_keep_their_codes(dice, write, out):
    codes, scales = in_blocks(dice.normal(size=(256, 384)).astype(np.float32))
    path = write({"weight": codes, "weight_scale_inv": torch.from_numpy(scales)})
    assert inspect_file(path).formats == {"float8_e4m3fn_blockwise": 1} and verify_file(path).ok
    convert_file(path, out)
    stored = load_file(out)
    assert torch.equal(stored["a.weight_scale"], torch.from_numpy(scales)) and verify_file(out).ok
    assert torch.equal(stored["a.weight"].view(torch.uint8), codes.view(torch.uint8))
