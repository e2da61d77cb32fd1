"""compressed-tensors, as llm-compressor, transformers and diffusers store it.

| stored | becomes |
|---|---|
| NVFP4: `weight_packed` U8 (N, K/2), low nibble first, `weight_scale` F8_E4M3 | nvfp4: nibbles |
| (N, K/16), `weight_global_scale` F32 (1,), a divisor | swapped, scales swizzled, 1 / that |
| `weight_packed` U8 (N, K/2), `weight_scale` U8 (N, K/32): exponents (MXFP4) | decoded |
| `weight_packed` I32, `weight_scale` (N, groups), `weight_shape`: 1 to 8 bits | decoded |
| `weight` I8 with `weight_zero_point` | zeros that are all 0 are dropped, others decoded |
| `input_scale`, `input_global_scale`, `input_zero_point` | dropped: activations are scaled anew |

Packed integers lie without gaps along the rows, lowest bits first, each with 2^(bits - 1) added;
zero points alike, down the columns. w = (code - zero) * scale. `weight_g_idx` names the group of
each column. Everything else that has `weight_packed` (sparse files) is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ....kernels.codebook4 import E2M1
from ....kernels.packing import swizzle_scales, unpack_nibbles
from ...errors import CheckpointError
from ...formats.nvfp4 import Nvfp4
from ...spec import FLOAT_DTYPES, LayerInput
from ..scales import E8M0_NAN
from .base import ImportOptions, StoredLayer, Tensors, Translation, floating, quantized
from .four_bit import swap_nibbles
from .scaled import translate_scaled

PACKED, ZERO = "weight_packed", "weight_zero_point"
GLOBAL = "weight_global_scale"
DIALECT = "compressed-tensors"
NVFP4_BLOCK, MXFP4_BLOCK = 16, 32
WORD = 32
E8M0_BIAS = 127
INPUTS = ("input_scale", "input_global_scale", "input_zero_point")


class CompressedTensors:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == PACKED or ZERO in layer.specs

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        if layer.marker is not None:
            raise CheckpointError(
                f"JSON of ComfyUI beside {DIALECT}' {layer.codes}: no format has both; start from "
                "the original model"
            )
        made = _translated(layer)
        static = [suffix for suffix in INPUTS if suffix in layer.specs]
        if not static:
            return made
        text = f"layer '{layer.name}': {', '.join(static)} dropped: activations are scaled anew"
        return replace(made, warnings=(*made.warnings, text))


def _translated(layer: StoredLayer) -> Translation:
    weight = {suffix: spec for suffix, spec in layer.specs.items() if suffix not in INPUTS}
    layer = replace(layer, specs=weight)
    if layer.codes != PACKED:
        return _with_zeros(layer)
    scale, dtype = layer.specs.get("weight_scale"), layer.weight.dtype
    if scale is None or len(layer.weight.shape) != 2 or len(scale.shape) != 2:
        raise _unread(layer)
    n, half = layer.weight.shape
    grids = {NVFP4_BLOCK: "F8_E4M3", MXFP4_BLOCK: "U8"}
    if dtype == "U8" and ZERO not in layer.specs:
        for block, stored in grids.items():
            if scale.dtype == stored and scale.shape == (n, 2 * half // block):
                if block == NVFP4_BLOCK:
                    return _nvfp4(layer)
                return _mxfp4(layer)
    if dtype == "I32" and scale.dtype in FLOAT_DTYPES and "weight_shape" in layer.specs:
        return _integers(layer)
    raise _unread(layer)


def _unread(layer: StoredLayer) -> CheckpointError:
    found = ", ".join(f"{key} {spec.dtype} {list(spec.shape)}" for key, spec in layer.specs.items())
    return CheckpointError(
        f"{DIALECT} of a kind that is not read ({found}); start from the original model"
    )


# ---- four bit floats ----


def _nvfp4(layer: StoredLayer) -> Translation:
    """
    Raises:
        CheckpointError: no global scale, or one that is no positive number.
    """
    n, k = layer.matrix[0], 2 * layer.matrix[1]
    if GLOBAL not in layer.specs:
        raise _unread(layer)
    divisor = layer.number(GLOBAL)
    if divisor is None or not 0 < divisor < float("inf"):
        raise CheckpointError(f"{GLOBAL} is {divisor}; one positive number is needed")
    if n % NVFP4_BLOCK:  # the format would pad it: the codes do not stay as they are

        def decode(tensors: Tensors) -> torch.Tensor:
            blocks = tensors["weight_scale"].float() / divisor
            return _e2m1(tensors[PACKED], blocks, NVFP4_BLOCK)

        return floating(DIALECT, layer, (n, k), decode, note="NVFP4: decoded, N needs padding")

    def convert(tensors: Tensors) -> Tensors:
        scales = tensors["weight_scale"].view(torch.uint8)
        return {
            "weight": swap_nibbles(tensors[PACKED]),
            "weight_scale": swizzle_scales(scales),
            "weight_scale_2": 1 / tensors[GLOBAL].float(),
        }

    source = LayerInput((n, k), None)
    return quantized(
        DIALECT,
        layer,
        Nvfp4.name,
        source,
        options=Nvfp4.Options(),
        convert=convert,
        note="NVFP4: nibbles swapped, scales in ComfyUI's order",
    )


def _mxfp4(layer: StoredLayer) -> Translation:
    n, k = layer.matrix[0], 2 * layer.matrix[1]

    def decode(tensors: Tensors) -> torch.Tensor:
        exponents = tensors["weight_scale"]
        if bool((exponents == E8M0_NAN).any()):
            raise CheckpointError("weight_scale has exponents that are no number")
        ones = torch.ones_like(exponents, dtype=torch.float32)
        blocks = torch.ldexp(ones, exponents.int() - E8M0_BIAS)
        return _e2m1(tensors[PACKED], blocks, MXFP4_BLOCK)

    return floating(DIALECT, layer, (n, k), decode, note="MXFP4: decoded")


def _e2m1(packed: torch.Tensor, blocks: torch.Tensor, size: int) -> torch.Tensor:
    """E2M1 codes, the low nibble first, times the scale of their block."""
    values = E2M1.widen(unpack_nibbles(packed, high_first=False))
    n, k = values.shape
    return (values.view(n, k // size, size) * blocks[:, :, None]).reshape(n, k)


# ---- packed integers ----


def _integers(layer: StoredLayer) -> Translation:
    """
    Raises:
        CheckpointError: sizes that do not fit each other.
    """
    said = layer.specs["weight_shape"]
    if said.dtype not in ("I64", "I32") or said.numel != 2:
        raise _unread(layer)
    n, k = (int(size) for size in layer.read("weight_shape").reshape(-1).tolist())
    rows, words = layer.weight.shape
    scale = layer.specs["weight_scale"]
    fitting = [bits for bits in range(1, 9) if k > 0 and words == -(-k * bits // WORD)]
    if n != rows or len(fitting) != 1 or scale.shape[0] != n or not scale.shape[1]:
        raise _unread(layer)
    bits, groups = fitting[0], scale.shape[1]
    if ZERO in layer.specs:
        zeros = layer.specs[ZERO]
        if zeros.dtype != "I32" or zeros.shape != (-(-n * bits // WORD), groups):
            raise _unread(layer)
    if "weight_g_idx" in layer.specs:
        if layer.specs["weight_g_idx"].shape != (k,):
            raise _unread(layer)
    elif k % groups:
        raise _unread(layer)

    def decode(tensors: Tensors) -> torch.Tensor:
        codes = _unpacked(tensors[PACKED], bits, k).float()
        group = torch.arange(k, device=codes.device) * groups // k
        if "weight_g_idx" in tensors:
            group = tensors["weight_g_idx"].long()
            if int(group.min()) < 0 or int(group.max()) >= groups:
                raise CheckpointError(f"weight_g_idx names a group beyond the {groups} there are")
        if ZERO in tensors:
            zeros = _unpacked(tensors[ZERO].t(), bits, n).t().float()
            codes -= zeros[:, group]
        return codes.mul_(tensors["weight_scale"].float()[:, group])

    note = f"{bits} bit integers: decoded"
    return floating(DIALECT, layer, (n, k), decode, note=note, dtype=scale.dtype)


def _unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """(rows, words) int32 without gaps -> (rows, count) of int64, -2^(bits - 1) up."""
    rows = words.shape[0]
    wide = words.long() & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    first = torch.arange(count, device=words.device) * bits
    word, bit = first // WORD, first % WORD
    both = wide[:, word] | (wide[:, word + 1] << WORD)
    return ((both >> bit) & ((1 << bits) - 1)).view(rows, count) - (1 << (bits - 1))


def _with_zeros(layer: StoredLayer) -> Translation:
    """INT8 with zero points: (code - zero) * scale.

    Raises:
        CheckpointError: tensors that do not fit each other.
    """
    zeros, scale = layer.specs[ZERO], layer.specs.get("weight_scale")
    if scale is None or layer.weight.dtype not in ("I8", "F8_E4M3"):
        raise _unread(layer)
    if not bool(layer.read(ZERO).float().any()):
        specs = {suffix: spec for suffix, spec in layer.specs.items() if suffix != ZERO}
        return translate_scaled(DIALECT, replace(layer, specs=specs), "codes kept")
    n, k = layer.matrix
    per_row = (n, 1) if n > 1 else ()
    fits = zeros.numel == scale.numel and scale.shape in ((), (1,), (1, 1), (n,), per_row)
    if not fits or layer.weight.dtype != "I8" or zeros.dtype not in ("I8", "I32"):
        raise _unread(layer)

    def decode(tensors: Tensors) -> torch.Tensor:
        zero, factor = (tensors[key].float().reshape(-1, 1) for key in (ZERO, "weight_scale"))
        return (tensors["weight"].float() - zero).mul_(factor)

    note = "INT8 with zero points: decoded"
    return floating(DIALECT, layer, (n, k), decode, note=note, dtype=scale.dtype)
