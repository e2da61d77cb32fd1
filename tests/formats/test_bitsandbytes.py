"""bitsandbytes on the CPU as oracle for NF4 and FP4: codes, absmax and decoded values."""

import pytest
import torch

from support.codec import decode, encode
from support.vectors import B

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

SHAPE = (512, 1024)
each_group = pytest.mark.parametrize("group", [64, 128, 256, 2048])
each_seed = pytest.mark.parametrize("seed", [0, 1])


def weights(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.03
    return weight.to(dtype).float()


def theirs(weight: torch.Tensor, kind: str, group: int) -> tuple[torch.Tensor, object]:
    return functional.quantize_4bit(
        weight, blocksize=group, quant_type=kind, compress_statistics=False
    )


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)


@each_seed
@each_group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nf4_codes_and_absmax_equal_bitsandbytes(dtype, group, seed):
    weight = weights(seed, dtype)
    stored, _ = encode("bnb_nf4", weight, {"block_size": group})
    packed, state = theirs(weight, "nf4", group)
    assert torch.equal(stored["absmax"], state.absmax)
    assert torch.equal(stored["weight"].reshape(-1), packed.reshape(-1))


@each_seed
@each_group
def test_fp4_codes_equal_bitsandbytes_but_for_zeros_and_rare_last_bits(group, seed):
    weight = weights(seed)
    stored, _ = encode("bnb_fp4", weight, {"block_size": group})
    packed, state = theirs(weight, "fp4", group)
    assert torch.equal(stored["absmax"], state.absmax)
    ours, other = codes_of(stored["weight"]), codes_of(packed)
    ours, other = (
        ours.masked_fill(ours == 8, 0),
        other.masked_fill(other == 8, 0),
    )  # 8 and 0 are both zero
    assert int((ours != other).sum()) <= weight.numel() * 1e-5


@each_seed
def test_fp4_of_bf16_values_differs_only_at_ties(seed):
    weight = weights(seed, torch.bfloat16)
    stored, _ = encode("bnb_fp4", weight, {"block_size": 64})
    packed, _ = theirs(weight, "fp4", 64)
    ours, other = codes_of(stored["weight"]), codes_of(packed)
    ours, other = ours.masked_fill(ours == 8, 0), other.masked_fill(other == 8, 0)
    assert float((ours != other).float().mean()) <= 1e-3


@each_group
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_decodes_our_codes_to_the_same_values(kind, group):
    weight = weights(2, torch.bfloat16)
    stored, marker = encode(f"bnb_{kind}", weight, {"block_size": group})
    _, state = theirs(weight, kind, group)
    state.absmax = stored["absmax"]
    decoded = functional.dequantize_4bit(stored["weight"].reshape(-1, 1), state)
    assert decoded.dtype == torch.float32
    assert torch.equal(decode(f"bnb_{kind}", stored, marker), decoded.reshape(SHAPE))


def test_the_golden_nf4_vector_is_what_bitsandbytes_writes():
    packed, state = theirs(B, "nf4", 64)
    stored, _ = encode("bnb_nf4", B, {"block_size": 64})
    assert torch.equal(stored["weight"].reshape(-1), packed.reshape(-1))
    assert torch.equal(stored["absmax"], state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_partial_last_block_decodes_alike(kind):
    weight = weights(3)[:7, :90].contiguous()
    stored, marker = encode(f"bnb_{kind}", weight, {"block_size": 64})
    packed, state = theirs(weight, kind, 64)
    ours = decode(f"bnb_{kind}", stored, marker)
    other = functional.dequantize_4bit(packed, state).reshape(weight.shape)
    assert torch.equal(stored["absmax"], state.absmax)
    assert (
        int((ours != other).sum()) <= 1
    )  # they divide the last block, we multiply by the reciprocal
