"""Which kernel multiplies, by shape: one measured table per class of GPU. It never answers a
failure, only speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from .scales import Geometry


@dataclass(frozen=True)
class Limits:
    """Rows of x up to which a path is the fastest; None without a limit.

    `hopper`: the kernel for sm_90 (kernels/cuda/wide.py), as (weights of at least so many million
    elements, from, to); only the largest weights that a weight reaches count.
    `skinny`: codes decoded in registers, x as it is (kernels/cuda/skinny.py); `few` is that for
    weights outside `between`, in million elements, where it is stated. `coded`: x quantized too,
    8-bit products; `small` is that for weights of less than `below` million elements, which decode
    in no time. Above both, the weight is decoded to memory and multiplied by the library.
    `library`: rows from which torch's 8-bit product beats ours, for weights of at least `WIDE` rows
    and for others; None never.
    """

    skinny: int | None
    coded: int | None
    small: int | None = None
    below: int = 2
    library: tuple[int | None, int | None] = (None, None)
    few: int | None = None
    between: tuple[float, float] = (2, 60)
    hopper: tuple[tuple[float, int, int | None], ...] = ()


# Measured on an H200 in captured graphs, quantizing x included:
# tests/benchmarks/results/linear.csv. Times in ms for 12288x3072 / 3072x12288; where times are
# close the path with fewer launches is taken: ComfyUI captures no graphs.
#   INT8 row  M=16 skinny .0141 / .0149, coded .0160 / .0186;  M=32 skinny .017 / .021;
#             M=64 skinny .026 / .029, coded .017 / .021, hopper .016 / .020;
#             M=256 coded .031 / .039, hopper .021 / .028;  M=4608 coded .300 / .322, hopper .268 /
# .299;
#             1280x1280 M=64 coded .0059, hopper .0072
#   FP8 row   M=16 skinny .0147 / .0166, coded .0163 / .0205;  M=256 hopper .0217 / .027, torch
# .0255 / .038;
#             M=1024 hopper .065 / .063, torch .067 / .081;  M=4608 hopper .280 / .325, torch .277 /
# .293
#   INT8 128  M=64 coded .020 / .022, hopper .022 / .024;  M=256 coded .035 / .039, hopper .032 /
# .034;
#             M=1024 coded .095 / .096, hopper about .090 / .100;  M=4608 coded .41 / .45, hopper
# .40 / .41
#   FP8 128   M=64 coded .020 / .0225, torch .0177 / .040;  M=256 hopper .0285 / .031, torch .0263 /
# .044;
#             M=1024 coded .093 / .089, torch .069 / .084, hopper .074 / .092
#   INT8 64   M=16 skinny .015 / .015, coded .0266 / .030;  M=1024 coded .134 / .137, decoded .128 /
# .128
#   FP8 64    M=64 coded .025 / .026, hopper .023 / .024;  M=1024 decoded .136 / .130, hopper .095 /
# .129;
#             M=1024 3072x15360 decoded .163, hopper .170; 5120x13824 .245, .216
#   INT8 1x128  M=64 coded .022 / .024, hopper .019 / .022;  M=256 coded .046 / .050, hopper .039 /
# .041;
#             M=512 coded .080 / .079, hopper .059 / .075;  M=1024 decoded .132 / .127, hopper .110
# / .144
#   4-bit     M=32 skinny .022 / .025, decoded .049 / .050;  M=64 skinny .041 / .043, decoded .049 /
# .053,
#             hopper .021 / .030;  M=256 decoded .055 / .062, hopper .039 / .043;
#             M=512 decoded .079 / .078, hopper .075 / .073;  M=1024 decoded .129 / .123, hopper
# .115 / .145;
#             3072x3072 M=128 decoded .0166, hopper .0133, M=256 .0174, .0179;
#             5120x13824 M=256 decoded .109, hopper .081, M=512 .144, .154
HOPPER = {
    "int8 row": Limits(32, None, 64, hopper=((4, 33, None),)),
    "int8 128": Limits(32, None, 16, hopper=((8, 65, 768), (8, 2049, None))),
    "int8 64": Limits(32, 512, 32, 10),
    "int8 group 128": Limits(32, 512, 32, 10, hopper=((8, 33, 512),)),
    "int8 group 64": Limits(32, 512, 32, 10),
    "fp8 row": Limits(32, None, 64, library=(2049, 2049), hopper=((4, 33, 2048),)),
    "fp8 128": Limits(32, None, 16, library=(33, 512), hopper=((8, 65, None),)),
    "fp8 64": Limits(32, 512, 32, 10, hopper=((8, 33, 1024), (45, 33, 768), (60, 33, 1024))),
    "fp8 group 128": Limits(32, 512, 32, 10, hopper=((8, 33, 512),)),
    "fp8 group 64": Limits(32, 512, 32, 10),
    "4-bit": Limits(64, 0, 0, few=32, hopper=((60, 33, 256), (20, 33, 512), (8, 33, 128))),
}
# Not measured. Block scales need a fast float32 path beside the tensor cores: only few rows are
# trusted to them. Without clusters of blocks the skinny kernel reads x more often.
OTHER = {
    name: replace(
        limit, skinny=limit.skinny // 2, few=limit.few and limit.few // 2,
        **({} if name.endswith(("row", "bit")) else {"coded": 256, "small": 32, "library": (None, None)}),
    )
    for name, limit in HOPPER.items()
}  # fmt: skip
WIDE = 8192  # rows of W from which `Limits.library[0]` counts


def family(codes: torch.dtype, geometry: Geometry) -> str:
    """The name under which a kind of codes and scales was measured."""
    kind = "int8" if codes == torch.int8 else "fp8"
    if geometry.cols is None:
        return f"{kind} row"
    return (
        f"{kind} {'group ' if geometry.rows == 1 else ''}{'64' if geometry.cols < 128 else '128'}"
    )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def limits(family: str, device: torch.device) -> Limits:
    """What was measured for this class of GPU."""
    return (HOPPER if _capability(device.index or 0)[0] == 9 else OTHER)[family]


def why_not_rows(m: int, most: int | None, instead: str) -> str | None:
    """Why a path is not taken for M rows, in words; None when it is."""
    return None if most is None or m <= most else f"M={m} > {most}: {instead} is faster"


def why_not_hopper(m: int, n: int, k: int, limit: Limits, instead: str) -> str | None:
    """Why Hopper's own kernel is not taken; None when it is."""
    reached = max((least for least, _, _ in limit.hopper if n * k >= least * 1e6), default=None)
    if any(
        least == reached and m >= first and (last is None or m <= last)
        for least, first, last in limit.hopper
    ):
        return None
    return f"M={m}, {n}x{k}: {instead} is faster"


def why_not_skinny(m: int, n: int, k: int, limit: Limits, instead: str) -> str | None:
    """Why codes are not decoded in registers; None when they are."""
    low, high = limit.between
    inside = limit.few is None or low <= n * k / 1e6 <= high
    return why_not_rows(m, limit.skinny if inside else limit.few, instead)


def why_not_coded(m: int, n: int, k: int, limit: Limits) -> str | None:
    """Why no 8-bit product is taken; None when one is."""
    return why_not_rows(
        m, limit.small if n * k < limit.below * 1e6 else limit.coded, "dequantize and matmul"
    )


def why_not_library(m: int, n: int, limit: Limits) -> str | None:
    """Why torch's 8-bit product is not taken; None when it is."""
    least = limit.library[0 if n >= WIDE else 1]
    if least is None:
        return "our 8-bit product is faster"
    return None if m >= least else f"M={m} < {least}: our 8-bit product is faster"
