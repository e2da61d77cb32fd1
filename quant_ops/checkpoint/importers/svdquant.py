"""SVDQuant, as nunchaku and deepcompressor store it: 4-bit codes in the order of tensor cores.

| stored | meaning |
|---|---|
| `qweight` I8 (N, K/2) | INT4 -8..7, or E2M1 where `wscales` is F8_E4M3 |
| `wscales` 16 bit (K/64, N), or F8_E4M3 (K/16, N) | scale of 64 or 16 columns |
| `wcscales` (N,), `wtscale` (1,) | factors of a row, of all; E2M1 only |
| `smooth` (K,), also `smooth_factor` | divides the input, and so the columns |
| `lora_down` (K, R), `lora_up` (N, R), also `proj_down`, `proj_up` | a product that is added |
| `smooth_orig` | what was divided out elsewhere: of no use here |
| `bias` (N,) | in the order of scales |
| AWQ: `qweight` I32 (N/4, K/2), `wscales`, `wzeros` 16 bit (K/64, N) | code * scale + zero |

    W = codes * scale / smooth + lora_up @ lora_down

Orders, in tiles of 128 rows; the first index varies least:

    qweight        row tile, k//64, n//16 % 8, n % 8, k//8 % 4, n//8 % 2, k//32 % 2, k % 8: the
                   last are the nibbles of an I32, lowest first
    wscales, bias  row tile, group, n//16 % 8, n//2 % 4, n//8 % 2, n % 2; `wcscales`, `smooth` alike
    F8 wscales     row tile, k//64, n % 8, n//8 % 4, n//32 % 4, k//16 % 4
    lora           (n or k)//16, r//16, then below 16 of each: of `lora_up` n % 8, r//2 % 4,
                   n//8, r//8, r % 2; of `lora_down` r % 8, k//2 % 4, r//8, k//8, k % 2
    AWQ qweight    n//4, k//64, n % 4, k//32 % 2, k % 8: the nibbles of 16 bits are k//8 % 4

Two things stand in no tensor, only in the kernels, so that layers are known by name: INT4 layers
behind a GELU get it plus 0.171875, which their bias allows for; rows of a modulation are
interleaved, and 1 is added to the bias of its scales. Other layers are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....kernels.codebook4 import E2M1
from ...errors import CheckpointError
from ...sources import TORCH_DTYPES
from .base import ImportOptions, StoredLayer, Tensors, Translation, refuse_non_finite

HALF = ("BF16", "F16")
TILE, DEPTH = 128, 64  # rows and columns of a tile
INT4_GROUP, FP4_GROUP, AWQ_GROUP = 64, 16, 64
GELU_SHIFT = 0.171875  # added behind a GELU so that INT4 activations need no sign
NAMES = {
    "smooth": ("smooth", "smooth_factor"),
    "down": ("lora_down", "proj_down"),
    "up": ("lora_up", "proj_up"),
}


@dataclass(frozen=True)
class Role:
    """What a layer's place in its model says: parts of a modulation, and a GELU before it."""

    parts: int = 0
    behind_gelu: bool = False


LINEAR, BEHIND_GELU = Role(), Role(behind_gelu=True)
# Below a block of Flux and of Qwen-Image, as nunchaku names them.
ROLES = {
    "norm1.linear": Role(6), "norm1_context.linear": Role(6), "norm.linear": Role(3),
    "qkv_proj": LINEAR, "qkv_proj_context": LINEAR, "out_proj": LINEAR, "out_proj_context": LINEAR,
    "mlp_fc1": LINEAR, "mlp_fc2": BEHIND_GELU,
    "mlp_context_fc1": LINEAR, "mlp_context_fc2": BEHIND_GELU,
    "img_mod.1": Role(6), "txt_mod.1": Role(6),
    "attn.to_qkv": LINEAR, "attn.add_qkv_proj": LINEAR, "attn.to_out.0": LINEAR,
    "attn.to_add_out": LINEAR, "img_mlp.net.0.proj": LINEAR, "img_mlp.net.2": BEHIND_GELU,
    "txt_mlp.net.0.proj": LINEAR, "txt_mlp.net.2": BEHIND_GELU,
}  # fmt: skip
BLOCK = re.compile(r"(?:.*\.)?(?:single_)?transformer_blocks\.[0-9]+\.(.+)")


class SvdQuant:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == "qweight" and "wscales" in layer.specs

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        found = BLOCK.fullmatch(layer.name)
        role = ROLES.get(found[1]) if found else None
        if role is None:
            raise CheckpointError(
                "nunchaku's codes in a layer of a model that is not known (Flux.1 and Qwen-Image "
                "are): what its kernels do besides is not said; start from the original model"
            )
        modulation = "wzeros" in layer.specs
        if modulation != bool(role.parts):
            raise _misfit(layer)
        if modulation:
            return _modulation(layer, role)
        return _linear(layer, role)


def _misfit(layer: StoredLayer) -> CheckpointError:
    found = ", ".join(f"{key} {spec.dtype} {list(spec.shape)}" for key, spec in layer.specs.items())
    return CheckpointError(f"tensors that nunchaku does not store so ({found}); get a good copy")


def _translation(
    layer: StoredLayer,
    shape: tuple[int, int],
    dtype: str,
    decode: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor | None]],
    note: str,
) -> Translation:
    """A float layer, its bias too; `decode` gives both in float32, rounded here once."""
    outputs = {"weight": (dtype, shape)}
    if "bias" in layer.specs:
        outputs["bias"] = (layer.specs["bias"].dtype, (shape[0],))

    def convert(tensors: Tensors) -> Tensors:
        made = dict(zip(("weight", "bias"), decode(tensors), strict=True))
        refuse_non_finite(layer.name, made["weight"])
        return {key: made[key].to(TORCH_DTYPES[outputs[key][0]]) for key in outputs}

    return Translation("svdquant", outputs, convert, note)


# ---- linear layers ----


def _linear(layer: StoredLayer, role: Role) -> Translation:
    shape, fp4 = _shape(layer)
    names = {key: layer.first(*known) for key, known in NAMES.items()}
    shift = GELU_SHIFT if role.behind_gelu and not fp4 else 0.0

    def decode(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = _codes(tensors["qweight"], shape, fp4)
        weight *= _group_scales(tensors["wscales"], shape, fp4)
        if "wcscales" in tensors:
            weight *= in_order(tensors["wcscales"])[:, None]
        if "wtscale" in tensors:
            weight *= tensors["wtscale"].float().reshape(())
        if names["smooth"]:
            weight /= in_order(tensors[names["smooth"]])
        bias = in_order(tensors["bias"]) if "bias" in tensors else None
        if shift:
            bias = bias + shift * weight.sum(1)
        if names["up"]:
            up, down = _up(tensors[names["up"]]), _down(tensors[names["down"]])
            weight += up @ down
        return weight, bias

    kind = "NVFP4" if fp4 else "INT4"
    note = f"SVDQuant, {kind}: decoded"
    return _translation(layer, shape, _dtype(layer, names["smooth"]), decode, note)


def _dtype(layer: StoredLayer, smooth: str | None) -> str:
    if smooth:
        return layer.specs[smooth].dtype
    return "BF16"


def _shape(layer: StoredLayer) -> tuple[tuple[int, int], bool]:
    """((N, K), whether codes are E2M1).

    Raises:
        CheckpointError: types or sizes that do not fit each other.
    """
    specs, (n, half) = layer.specs, layer.matrix
    k = 2 * half
    fp4 = specs["wscales"].dtype == "F8_E4M3"
    group = FP4_GROUP if fp4 else INT4_GROUP
    wanted = {"wscales": (k // group, n), "wcscales": (n,), "smooth_orig": (k,), "bias": (n,)}
    wanted |= {"smooth_factor_orig": (k,)} | dict.fromkeys(NAMES["smooth"], (k,))
    rank = next((specs[name].shape[-1:] for name in NAMES["up"] if name in specs), (0,))[0]
    wanted |= dict.fromkeys(NAMES["down"], (k, rank)) | dict.fromkeys(NAMES["up"], (n, rank))
    pairs = [layer.first(*NAMES[key]) is None for key in ("up", "down")]
    right = (
        specs["qweight"].dtype == "I8"
        and not (n % TILE or k % TILE or rank % 16)
        and all(specs[name].shape == shape for name, shape in wanted.items() if name in specs)
        and all(specs[name].dtype in HALF for name in wanted if name in specs and name != "wscales")
        and (fp4 or specs["wscales"].dtype in HALF)
        and pairs[0] == pairs[1]
        and ("wtscale" not in specs or specs["wtscale"].numel == 1)
        and (fp4 or not {"wtscale", "wcscales"} & set(specs))
        and "bias" in specs
    )
    if not right:
        raise _misfit(layer)
    return (n, k), fp4


def _codes(qweight: torch.Tensor, shape: tuple[int, int], fp4: bool) -> torch.Tensor:
    """(N, K) float32 values of the codes."""
    n, k = shape
    words = qweight.contiguous().view(torch.int32).view(n // TILE, k // DEPTH, 8, 8, 4, 2, 2)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words[..., None] >> shifts) & 15
    codes = codes.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)
    if fp4:
        return E2M1.widen(codes.to(torch.uint8))
    return (codes - 16 * (codes > 7)).float()


def _group_scales(wscales: torch.Tensor, shape: tuple[int, int], fp4: bool) -> torch.Tensor:
    """(N, K) float32: the scale of each code."""
    n, k = shape
    if fp4:
        stored = wscales.float().reshape(n // TILE, k // DEPTH, 8, 4, 4, 4)
        grid = stored.permute(0, 4, 3, 2, 1, 5).reshape(n, k // FP4_GROUP)
        return grid.repeat_interleave(FP4_GROUP, 1)
    grid = in_order(wscales, k // INT4_GROUP)
    return grid.repeat_interleave(INT4_GROUP, 1)


def in_order(stored: torch.Tensor, groups: int | None = None) -> torch.Tensor:
    """Numbers in the order of scales -> (N,), or (N, groups), float32."""
    tiles = stored.float().reshape(-1, groups or 1, 8, 4, 2, 2)
    rows = tiles.permute(0, 2, 4, 3, 5, 1).reshape(-1, groups or 1)
    if groups:
        return rows.contiguous()
    return rows.reshape(-1)


def _up(stored: torch.Tensor) -> torch.Tensor:
    """`lora_up` -> (N, R) float32."""
    n, rank = stored.shape
    tiles = stored.float().reshape(n // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)


def _down(stored: torch.Tensor) -> torch.Tensor:
    """`lora_down` -> (R, K) float32."""
    k, rank = stored.shape
    tiles = stored.float().reshape(k // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, k)


# ---- modulations ----


def _modulation(layer: StoredLayer, role: Role) -> Translation:
    """AWQ codes whose rows are interleaved: one of each part, then the next of each.

    Raises:
        CheckpointError: types or sizes that do not fit each other.
    """
    specs = layer.specs
    n, k = 4 * specs["qweight"].shape[0], 2 * specs["qweight"].shape[-1]
    scale = specs["wscales"]
    right = (
        specs["qweight"].dtype == "I32"
        and len(specs["qweight"].shape) == len(scale.shape) == 2
        and not (n % role.parts or k % DEPTH)
        and scale.shape == specs["wzeros"].shape
        and scale.shape[0] >= k // AWQ_GROUP
        and scale.shape[1] == n
        and scale.dtype in HALF
        and specs["wzeros"].dtype == scale.dtype
        and "bias" in specs
        and specs["bias"].shape == (n,)
    )
    if not right:
        raise _misfit(layer)

    def decode(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        codes = awq_codes(tensors["qweight"], (n, k))
        spread = (
            tensors[key].float()[: k // AWQ_GROUP].t().repeat_interleave(AWQ_GROUP, 1)
            for key in ("wscales", "wzeros")
        )
        scales, zeros = spread
        weight = codes.mul_(scales).add_(zeros)
        bias = _apart(tensors["bias"].float(), role.parts)
        bias[1] -= 1
        bias[-2] -= 1 if role.parts > 3 else 0
        return _apart(weight, role.parts).reshape(n, k), bias.reshape(n)

    note = f"AWQ of nunchaku, {role.parts} parts: decoded"
    return _translation(layer, (n, k), scale.dtype, decode, note)


def _apart(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """(N, ...) with its parts interleaved -> (parts, N / parts, ...)."""
    apart = rows.reshape(len(rows) // parts, parts, *rows.shape[1:]).transpose(0, 1)
    return apart.contiguous().clone()


def awq_codes(qweight: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(N, K) float32 codes 0..15."""
    n, k = shape
    words = qweight.contiguous().view(torch.int16).view(n // 4, k // DEPTH, 4, 2, 1, 8).int()
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device).view(4, 1)
    codes = (words >> shifts) & 15  # n//4, k//64, n % 4, k//32 % 2, k//8 % 4, k % 8
    return codes.permute(0, 2, 1, 3, 4, 5).reshape(n, k).float()
