"""nunchaku's files: packed here by the published index formulas, in numpy, and decoded by every door."""

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
from support.helpers import flux_shapes, random_tensors

HIDDEN, RANK = 128, 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SHIFT = 0.171875


@pytest.fixture
def dice():
    return np.random.default_rng(7)


def bf16(array):
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).bfloat16()


def rounded(array):
    return bf16(array).float().numpy().astype(np.float64)


# ---- the packer: where each element goes, one line per index ----


def pack_codes(codes):
    """(N, K) 0..15 -> qweight I8 (N, K/2)."""
    n, k = np.indices(codes.shape)
    tile = (n // 128) * (codes.shape[1] // 64) + k // 64
    at = tile * 8 + n % 128 // 16
    at = at * 8 + n % 8
    at = at * 4 + k % 32 // 8
    at = at * 2 + n % 16 // 8
    at = at * 2 + k % 64 // 32
    nibbles = np.zeros(codes.size, dtype=np.uint8)
    nibbles[(at * 8 + k % 8).reshape(-1)] = codes.reshape(-1)
    packed = nibbles[0::2] | nibbles[1::2] << 4
    return torch.from_numpy(packed.view(np.int8)).view(codes.shape[0], -1)


def pack_rows(values):
    """(N, groups) of scales, or (N,) of a bias -> the order of scales."""
    grid = values.reshape(len(values), -1)
    n, group = np.indices(grid.shape)
    at = ((n // 128) * grid.shape[1] + group) * 8 + n % 128 // 16
    at = ((at * 4 + n % 8 // 2) * 2 + n % 16 // 8) * 2 + n % 2
    out = np.zeros(grid.size)
    out[at.reshape(-1)] = grid.reshape(-1)
    return bf16(out if values.ndim == 1 else out.reshape(grid.shape[1], -1))


def pack_micro_scales(scales):
    """(N, K/16) -> F8_E4M3 (K/16, N)."""
    n, group = np.indices(scales.shape)
    at = ((n // 128) * (scales.shape[1] // 4) + group // 4) * 8 + n % 8
    at = ((at * 4 + n % 32 // 8) * 4 + n % 128 // 32) * 4 + group % 4
    out = np.zeros(scales.size, dtype=np.float32)
    out[at.reshape(-1)] = scales.reshape(-1)
    return torch.from_numpy(out).reshape(scales.shape[1], -1).to(torch.float8_e4m3fn)


def pack_low_rank(matrix, down):
    """lora_up (N, R), or lora_down (R, K) -> stored (N, R) or (K, R)."""
    a, b = np.indices(matrix.shape)
    wide, rank = (b, a) if down else (a, b)
    at = (wide // 16) * (matrix.shape[0 if down else 1] // 16) + rank // 16
    at = (at * 8 + a % 8) * 4 + b % 8 // 2
    at = ((at * 2 + a % 16 // 8) * 2 + b % 16 // 8) * 2 + b % 2
    out = np.zeros(matrix.size)
    out[at.reshape(-1)] = matrix.reshape(-1)
    return bf16(out.reshape(matrix.shape[::-1] if down else matrix.shape))


def pack_awq(codes):
    """(N, K) 0..15 -> qweight I32 (N/4, K/2)."""
    n, k = np.indices(codes.shape)
    at = (n // 4) * (codes.shape[1] // 64) + k // 64
    at = ((at * 4 + n % 4) * 2 + k % 64 // 32) * 8 + k % 8
    words = np.zeros(codes.size // 4, dtype=np.uint16)
    np.bitwise_or.at(
        words, at.reshape(-1), (codes << (4 * (k % 32 // 8))).reshape(-1).astype(np.uint16)
    )
    return torch.from_numpy(words.view(np.int32)).view(codes.shape[0] // 4, -1)


# ---- layers: what is stored, and what it means ----


def linear(dice, shape, fp4=False, gelu=False):
    """(tensors, weight, bias, forward): `forward` does what the kernels do, without rounding inputs."""
    n, k = shape
    codes = dice.integers(0, 16, shape)
    values = E2M1[codes] if fp4 else np.where(codes > 7, codes - 16.0, codes)
    group = 16 if fp4 else 64
    scales = dice.uniform(0.01, 0.02, (n, k // group))
    smooth = rounded(dice.uniform(0.5, 2, k))
    up, down = rounded(dice.normal(size=(n, RANK)) / 50), rounded(dice.normal(size=(RANK, k)) / 5)
    bias = rounded(dice.normal(size=n))
    stored = {"qweight": pack_codes(codes), "bias": pack_rows(bias), "smooth": pack_rows(smooth)}
    stored |= {"smooth_orig": pack_rows(np.ones(k)), "lora_up": pack_low_rank(up, down=False)}
    stored |= {"lora_down": pack_low_rank(down, down=True)}
    if fp4:
        rows, factor = rounded(dice.uniform(0.5, 2, n)), 0.0125
        scales = torch.from_numpy(scales * 1000).to(torch.float8_e4m3fn).double().numpy()
        stored |= {"wscales": pack_micro_scales(scales), "wcscales": pack_rows(rows)}
        stored |= {"wtscale": bf16([factor])}
        scales = scales * rows[:, None] * rounded([factor])
    else:
        scales = rounded(scales)
        stored["wscales"] = pack_rows(scales)
    codes = values * np.repeat(scales, group, 1)
    shift = SHIFT if gelu and not fp4 else 0

    def forward(x):
        return ((x + shift) / smooth) @ codes.T + (x @ down.T) @ up.T + bias

    weight = codes / smooth + up @ down
    return stored, weight, bias + shift * (codes / smooth).sum(1), forward


def modulation(dice, shape, parts):
    """(tensors, weight, bias) of a modulation, as AWQ of nunchaku."""
    n, k = shape
    codes = dice.integers(0, 16, shape)
    scale, zero = (rounded(dice.uniform(0.01, 0.02, (n, k // 64))) for _ in range(2))
    bias = rounded(dice.integers(-64, 64, n) / 64)
    stored = {
        "qweight": pack_awq(codes),
        "wscales": bf16(scale.T),
        "wzeros": bf16(-zero.T),
        "bias": bf16(bias),
    }
    weight = codes * np.repeat(scale, 64, 1) - np.repeat(zero, 64, 1)
    order = np.arange(n).reshape(n // parts, parts).T.reshape(-1)
    ones = np.zeros((parts, n // parts))
    ones[[1, -2]] = 1
    return stored, weight[order], bias[order] - ones.reshape(-1)


DOUBLE = {
    "qkv_proj": "img_attn.qkv", "qkv_proj_context": "txt_attn.qkv", "out_proj": "img_attn.proj",
    "out_proj_context": "txt_attn.proj", "mlp_fc1": "img_mlp.0", "mlp_fc2": "img_mlp.2",
    "mlp_context_fc1": "txt_mlp.0", "mlp_context_fc2": "txt_mlp.2",
}  # fmt: skip
OUTSIDE = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}  # fmt: skip
NORMS = {
    "transformer_blocks.0.norm_q": "double_blocks.0.img_attn.norm.query_norm",
    "transformer_blocks.0.norm_k": "double_blocks.0.img_attn.norm.key_norm",
    "transformer_blocks.0.norm_added_q": "double_blocks.0.txt_attn.norm.query_norm",
    "transformer_blocks.0.norm_added_k": "double_blocks.0.txt_attn.norm.key_norm",
    "single_transformer_blocks.0.norm_q": "single_blocks.0.norm.query_norm",
    "single_transformer_blocks.0.norm_k": "single_blocks.0.norm.key_norm",
}


def flux(dice, fp4):
    """(the file's tensors, ComfyUI's names and float64 values) of a small Flux."""
    shapes = flux_shapes(HIDDEN)
    plain = random_tensors(shapes)
    tensors, truth = {}, {}

    def add(name, made):
        stored, weight, bias = made[:3]
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
        return weight, bias

    for mine, theirs in DOUBLE.items():
        shape = shapes[f"double_blocks.0.{theirs}.weight"]
        made = linear(dice, shape, fp4, gelu=mine.endswith("fc2"))
        truth[f"double_blocks.0.{theirs}"] = add(f"transformer_blocks.0.{mine}", made)
    for mine, theirs in (("norm1.linear", "img_mod.lin"), ("norm1_context.linear", "txt_mod.lin")):
        made = modulation(dice, (6 * HIDDEN, HIDDEN), 6)
        truth[f"double_blocks.0.{theirs}"] = add(f"transformer_blocks.0.{mine}", made)
    single = "single_transformer_blocks.0"
    made = modulation(dice, (3 * HIDDEN, HIDDEN), 3)
    truth["single_blocks.0.modulation.lin"] = add(f"{single}.norm.linear", made)
    qkv = add(f"{single}.qkv_proj", linear(dice, (3 * HIDDEN, HIDDEN), fp4))
    fc1 = add(f"{single}.mlp_fc1", linear(dice, (4 * HIDDEN, HIDDEN), fp4))
    truth["single_blocks.0.linear1"] = tuple(map(np.concatenate, zip(qkv, fc1, strict=True)))
    out = add(f"{single}.out_proj", linear(dice, (HIDDEN, HIDDEN), fp4))
    fc2 = add(f"{single}.mlp_fc2", linear(dice, (HIDDEN, 4 * HIDDEN), fp4, gelu=True))
    truth["single_blocks.0.linear2"] = np.concatenate([out[0], fc2[0]], 1), out[1] + fc2[1]
    for mine, theirs in NORMS.items():
        tensors[f"{mine}.weight"] = plain[f"{theirs}.weight"]
    for mine, theirs in OUTSIDE.items():
        for suffix in ("weight", "bias"):
            tensors[f"{mine}.{suffix}"] = plain[f"{theirs}.{suffix}"]
    for suffix in ("weight", "bias"):
        first, second = plain[f"final_layer.adaLN_modulation.1.{suffix}"].chunk(2)
        tensors[f"norm_out.linear.{suffix}"] = torch.cat([second, first])
    values = {name: tensor.double().numpy() for name, tensor in plain.items()}
    for name, (weight, bias) in truth.items():
        values[f"{name}.weight"], values[f"{name}.bias"] = weight, bias
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, values


@pytest.fixture
def write(tmp_path):
    def run(tensors):
        path = tmp_path / "in.safetensors"
        save_file(tensors, path)
        return path

    return run


def rel_l2(got, wanted):
    return np.linalg.norm(got.double().numpy() - wanted) / max(np.linalg.norm(wanted), 1e-30)


@pytest.mark.parametrize("fp4", [False, True], ids=["int4", "nvfp4"])
def test_a_flux_of_nunchaku_becomes_comfyuis_weight_by_weight(fp4, dice, write, tmp_path):
    tensors, truth = flux(dice, fp4)
    path, out = write(tensors), tmp_path / "out.safetensors"
    inspection = inspect_file(path)
    assert inspection.findings == () and "nunchaku's names: ComfyUI" in inspection.loads_in
    assert any("SVDQuant" in text for text in inspection.dialects)
    assert verify_file(path).ok
    convert_file(path, out, to="bf16")
    stored = load_file(out)
    assert stored.keys() == truth.keys()
    for name, wanted in truth.items():
        assert stored[name].dtype == torch.bfloat16 and stored[name].shape == wanted.shape
        # rounded to bf16 once; the bias of linear2 is a sum of two that are
        assert rel_l2(stored[name], wanted) < 3e-3, name
    quantize_file(path, out, Recipe(parse_wish("int8_tensorwise")), overwrite=True)
    assert verify_file(out).ok and "loads in stock ComfyUI" in inspect_file(out).loads_in


@pytest.mark.parametrize("fp4", [False, True], ids=["int4", "nvfp4"])
def test_a_layer_behind_a_gelu_gives_what_the_kernels_give(fp4, dice, write, tmp_path):
    """INT4 activations are the GELU's plus a constant, which the low-rank branch does not see."""
    stored, _, _, forward = linear(dice, (128, 512), fp4, gelu=True)
    name = "transformer_blocks.0.mlp_fc2"
    path = write({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
    out = tmp_path / "out.safetensors"
    convert_file(path, out, to="bf16")
    made = load_file(out)
    weight, bias = (made[f"{name}.{suffix}"].double().numpy() for suffix in ("weight", "bias"))
    x = dice.normal(size=(64, 512))
    x = 0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * x**3)))
    wanted = forward(x)
    assert np.linalg.norm(x @ weight.T + bias - wanted) < 4e-3 * np.linalg.norm(wanted)


def test_a_qwen_image_of_nunchaku_gets_its_projections_apart(dice, write, tmp_path):
    qkv, weight, bias, _ = linear(dice, (384, 128))
    newer = {"smooth": "smooth_factor", "lora_up": "proj_up", "lora_down": "proj_down"}
    qkv = {newer.get(suffix, suffix): tensor for suffix, tensor in qkv.items()}
    mod, mod_weight, mod_bias = modulation(dice, (768, 128), 6)
    block = "transformer_blocks.0"
    tensors = {f"{block}.attn.to_qkv.{suffix}": tensor for suffix, tensor in qkv.items()}
    tensors |= {f"{block}.img_mod.1.{suffix}": tensor for suffix, tensor in mod.items()}
    tensors["txt_norm.weight"] = torch.ones(8)
    path, out = write(tensors), tmp_path / "out.safetensors"
    convert_file(path, out, to="bf16")
    made = load_file(out)
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(128 * index, 128 * index + 128)
        assert rel_l2(made.pop(f"{block}.attn.{name}.weight"), weight[rows]) < 3e-3
        assert rel_l2(made.pop(f"{block}.attn.{name}.bias"), bias[rows]) < 3e-3
    assert rel_l2(made.pop(f"{block}.img_mod.1.weight"), mod_weight) < 3e-3
    assert rel_l2(made.pop(f"{block}.img_mod.1.bias"), mod_bias) < 3e-3
    assert list(made) == ["txt_norm.weight"]


@pytest.mark.parametrize("width", [256, 1152])
def test_a_text_encoder_of_nunchaku_is_decoded(width, dice, write, tmp_path):
    n, groups = 64, -(-width // 128 // 8) * 8
    codes = dice.integers(0, 16, (n, width))
    scales, zeros = (np.zeros((groups, n)) for _ in range(2))
    scales[: width // 128] = rounded(dice.uniform(0.01, 0.02, (width // 128, n)))
    zeros[: width // 128] = -rounded(dice.uniform(0.05, 0.1, (width // 128, n)))
    name = "encoder.block.0.layer.0.SelfAttention.q"
    stored = {
        "qweight": pack_awq(codes).view(torch.int16),
        "scales": bf16(scales),
        "scaled_zeros": bf16(zeros),
    }
    path, out = (
        write({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}),
        tmp_path / "out.safetensors",
    )
    assert inspect_file(path).findings == () and verify_file(path).ok
    convert_file(path, out, to="bf16")
    spread = [np.repeat(rounded(part[: width // 128]).T, 128, 1) for part in (scales, zeros)]
    wanted = bf16((codes * spread[0]).astype(np.float32) + spread[1].astype(np.float32))
    assert torch.equal(load_file(out)[f"{name}.weight"], wanted)


WRONG = {
    "a layer of an unknown model": (lambda t: t, "layers.0.attention.to_qkv", "a model that is not known"),
    "a low-rank half": (lambda t: {k: v for k, v in t.items() if k != "lora_up"}, "transformer_blocks.0.qkv_proj", "does not store so"),
    "scales of another group": (lambda t: t | {"wscales": t["wscales"].repeat(2, 1)}, "transformer_blocks.0.qkv_proj", "does not store so"),
    "a width of no tile": (lambda t: t | {"qweight": t["qweight"][:64].contiguous()}, "transformer_blocks.0.qkv_proj", "does not store so"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_proved_right_is_refused_by_name(case, dice, write, tmp_path):
    change, name, why = WRONG[case]
    stored = change(linear(dice, (128, 128))[0])
    path = write({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
    out = tmp_path / "out.safetensors"
    assert why in inspect_file(path).findings[0] and not verify_file(path).ok
    recipe = Recipe(parse_wish("float8_e4m3fn"), preset="none")
    for door in (
        lambda: convert_file(path, out, to="bf16"),
        lambda: repair_file(path, out),
        lambda: quantize_file(path, out, recipe),
    ):
        with pytest.raises(CheckpointError, match=why):
            door()
    assert not out.exists()
