"""Which kernel multiplies: measured rows per class of GPU and kind of codes; the first that fits is
taken.

A row speaks of speed alone. What a kernel cannot do its `why_not` says, and the next row is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from .device import Gpu
from .kinds import Codes
from .scales import Geometry

MILLION = 10**6
ANY = range(sys.maxsize)


def since(first: int) -> range:
    """From this number on."""
    return range(first, sys.maxsize)


def up_to(last: int) -> range:
    """To this number, included."""
    return range(last + 1)


def millions(first: int, end: int | None = None) -> range:
    """Elements of a weight: from so many millions on, below so many."""
    return range(first * MILLION, sys.maxsize if end is None else end * MILLION)


class Row(NamedTuple):
    """A path, and the products it is fastest for.

    rows: of x. size: elements of the weight. height: rows of the weight. why: what was measured,
    milliseconds for weights of 12288x3072 / 3072x12288 where nothing else is said, in captured
    graphs on an H200, with x quantized where the path does (tests/benchmarks/results/linear.csv).
    """

    path: str
    rows: range = ANY
    size: range = ANY
    height: range = ANY
    why: str = ""

    def fits(self, m: int, n: int, k: int) -> bool:
        """Whether the row speaks of (M, K) times (N, K)."""
        return m in self.rows and n * k in self.size and n in self.height


# scratch: the weight decoded, rotated and rounded to INT8 rows, multiplied as those;
# kernels/rows.py. hopper: kernels/cuda/wide.py. cuda: kernels/cuda/skinny.py, codes decoded in
# registers and x as it is. triton: kernels/triton/w8a8.py. torch: its scaled product. dequantize:
# the weight decoded to memory, then the library's product. Where times are close the path with
# fewer launches comes first: ComfyUI captures no graphs.
DECODED = Row("dequantize", why="decoding the weight once costs less than any product of its codes")
SMALL = "weights of less than 2 million elements are decoded in no time"
SMALLER = "weights of less than 10 million elements are decoded in little time"
FINE_SKINNY = Row("cuda", up_to(32), why="M=16 .015 / .015, triton .0266 / .030")
BLOCKS_64 = Row(
    "scratch",
    since(512),
    millions(8),
    why="M=512 .069 / .074, triton .071 / .078; M=1024 .101 / .099, hopper .118 / .154; "
    "M=4608 .301 / .335, dequantize .482 / .465",
)
FINE = (
    FINE_SKINNY,
    Row("triton", up_to(512), millions(10), why="M=1024 .134 / .137, dequantize .128 / .128"),
    Row("triton", up_to(32), why=SMALLER),
    DECODED,
)
SCRATCH_FP8 = Row(
    "scratch",
    since(1024),
    millions(8),
    why="M=1024 .111 / .113, hopper .094 / .128; M=1536 .138 / .150, hopper .138 / .197; "
    "M=4608 .310 / .349, hopper .401 / .486",
)
GROUPS_128 = (
    Row("scratch", since(385), millions(8),
        why="M=1024 .100 / .099, hopper .104 / .138; M=4608 .298 / .333, hopper .441 / .535; "
            "M=512 .069 / .074, hopper .059 / .075, but a call takes 27 us of Python, hopper 103"),
    Row("hopper", range(33, 385), millions(8),
        why="M=64 .019 / .022, triton .022 / .024; M=256 .039 / .041, triton .046 / .050"),
    *FINE,
)  # fmt: skip
HOPPER = {
    "int8 row": (
        Row("hopper", since(33), millions(4),
            why="M=64 .016 / .020, triton .017 / .021, cuda .026 / .029; M=256 .021 / .028, "
                "triton .031 / .039; M=4608 .268 / .299, triton .300 / .322"),
        Row("cuda", up_to(32),
            why="M=16 .0141 / .0149, triton .0160 / .0186; M=32 .017 / .021"),
        Row("triton", ANY, millions(2), why="1280x1280 M=64 .0059, hopper .0072"),
        Row("triton", up_to(64), why=SMALL),
        DECODED,
    ),
    "int8 128": (
        Row("hopper", range(65, 385), millions(8),
            why="M=64 .022 / .024, triton .020 / .022; M=256 .032 / .034, triton .035 / .039"),
        Row("scratch", since(385), millions(8),
            why="12288x3072 M=1024 .090, hopper .088, triton .095; M=1536 .128 / .135, "
                "hopper .128 / .186, triton .143 / .151; M=4608 .286, hopper .366, triton .405; "
                "a call takes 27 us of Python, hopper 103"),
        Row("hopper", since(2049), millions(8), why="M=4608 .40 / .41, triton .41 / .45"),
        Row("cuda", up_to(32), why="M=16 as rows of INT8: .0141 / .0149"),
        Row("triton", ANY, millions(2), why="M=1024 .095 / .096, hopper about .090 / .100"),
        Row("triton", up_to(16), why=SMALL),
        DECODED,
    ),
    "int8 64": (BLOCKS_64, *FINE),
    "int8 group 128": GROUPS_128,
    "int8 group 64": (BLOCKS_64, *FINE),
    "fp8 row": (
        Row("torch", since(2049), millions(2), why="M=4608 .277 / .293, hopper .280 / .325"),
        Row("hopper", range(33, 2049), millions(4),
            why="M=256 .0217 / .027, torch .0255 / .038; M=1024 .065 / .063, torch .067 / .081"),
        Row("cuda", up_to(32), why="M=16 .0147 / .0166, triton .0163 / .0205"),
        Row("triton", ANY, millions(2), why="within 5 % of INT8 rows"),
        Row("triton", up_to(64), why=SMALL),
        DECODED,
    ),
    "fp8 128": (
        Row("torch", since(33), millions(2), since(8192),
            why="M=64 .0177, triton .020; M=256 .0263, hopper .0285; M=1024 .069, hopper .074"),
        Row("torch", since(512), millions(2),
            why="3072x12288: M=256 .044, hopper .031; M=1024 .084, triton .089, hopper .092"),
        Row("hopper", since(65), millions(8), why="M=256 .0285 / .031, torch .0263 / .044"),
        Row("cuda", up_to(32), why="M=16 as rows of FP8: .0147 / .0166"),
        Row("triton", ANY, millions(2), why="3072x12288 M=64 .0225, torch .040"),
        Row("triton", up_to(16), why=SMALL),
        DECODED,
    ),
    "fp8 64": (
        SCRATCH_FP8,
        Row("hopper", range(33, 1025), millions(60),
            why="5120x13824 M=1024 .216, dequantize .245"),
        Row("hopper", range(33, 769), millions(45, 60),
            why="3072x15360 M=1024 .170, dequantize .163"),
        Row("hopper", range(33, 1025), millions(8, 45),
            why="M=64 .023 / .024, triton .025 / .026; M=1024 .095 / .129, dequantize .136 / .130"),
        *FINE,
    ),
    "fp8 group 128": GROUPS_128,
    "fp8 group 64": (SCRATCH_FP8, *FINE),
    "4-bit": (
        Row("scratch", since(512), millions(8),
            why="M=512 .062 / .068, hopper .078 / .077, dequantize .078 / .077; "
                "M=1024 .093 / .093, dequantize .126 / .123; "
                "M=4608 .288 / .320, dequantize .464 / .448"),
        Row("hopper", range(33, 257), millions(60),
            why="5120x13824 M=256 .081, dequantize .109; M=512 .154, dequantize .144"),
        Row("hopper", range(33, 513), millions(20, 60),
            why="M=64 .021 / .030, cuda .041 / .043, dequantize .049 / .053; M=256 .039 / .043, "
                "dequantize .055 / .062; M=512 .075 / .073, dequantize .079 / .078; "
                "M=1024 .115 / .145, dequantize .129 / .123"),
        Row("hopper", range(33, 129), millions(8, 20),
            why="3072x3072 M=128 .0133, dequantize .0166; M=256 .0179, dequantize .0174"),
        Row("cuda", up_to(64), range(2 * MILLION, 60 * MILLION + 1),
            why="M=32 .022 / .025, M=64 .041 / .043, dequantize .049 / .050 and .049 / .053"),
        Row("cuda", up_to(32), why="decoding the whole weight takes longer for so few rows"),
        DECODED,
    ),
    "int8 rotated": (
        Row("hopper", ANY, millions(4),
            why="M=256 .0217 / .0271, triton .0336 / .0389; M=1024 .066 / .064, triton "
                ".070 / .095; M=4608 .263 / .299, triton .313 / .326; "
                "M=1 takes 26 us of Python, cuda 66"),
        Row("cuda", up_to(32), why="as INT8 rows that are not rotated"),
        Row("triton", ANY, millions(2), why="as INT8 rows that are not rotated"),
        Row("triton", up_to(64), why=SMALL),
        DECODED,
    ),
    "e2m1": (
        Row("scratch", ANY, millions(20),
            why="M=1 .047 / .051, dequantize .051 / .055; M=64 .045 / .050, dequantize "
                ".052 / .056; M=256 .052 / .063, dequantize .059 / .068; M=1024 .097 / .097, "
                "dequantize .130 / .127; M=4608 .290 / .322, dequantize .476 / .453"),
        Row("scratch", since(512), millions(8),
            why="3072x3072 M=256 .0221, dequantize .0191; M=512 .0223, dequantize .0237"),
        DECODED,
    ),
    "e4m3_mx": (
        Row("scratch", ANY, millions(20),
            why="M=1 .044 / .045, dequantize .054 / .057; M=64 .042 / .044, dequantize "
                ".055 / .059"),
        Row("scratch", since(256), millions(8),
            why="M=256 .048 / .055, dequantize .062 / .072; M=1024 .093 / .090, "
                "dequantize .131 / .128; M=4608 .290 / .315, dequantize .448 / .433"),
        DECODED,
    ),
    "w4a8": (
        Row("scratch",
            why="M=256 .046 / .055, dequantize .085 / .093; M=4608 .297 / .320, "
                "dequantize .492 / .495"),
        DECODED,
    ),
}  # fmt: skip
# Not measured. Block scales need a fast float32 path beside the tensor cores: only few rows are
# trusted to them. Without clusters of blocks the kernel of few rows reads x more often.
NOT_MEASURED = "not measured on this class of GPU"
_SKINNY = Row("cuda", up_to(16), why=f"{NOT_MEASURED}: half the rows of an H200")
_ROWS = (
    _SKINNY,
    Row("triton", ANY, millions(2), why=NOT_MEASURED),
    Row("triton", up_to(64), why=SMALL),
    DECODED,
)


def _blocks(large: int) -> tuple[Row, ...]:
    return (
        _SKINNY,
        Row("triton", up_to(256), millions(large), why=f"{NOT_MEASURED}: few rows"),
        Row("triton", up_to(32), why=f"{NOT_MEASURED}: few rows"),
        DECODED,
    )


OTHER = {
    "int8 row": _ROWS,
    "fp8 row": _ROWS,
    "int8 rotated": _ROWS,
    "e2m1": (DECODED,),
    "e4m3_mx": (DECODED,),
    "w4a8": (DECODED,),
    "int8 128": _blocks(2),
    "fp8 128": _blocks(2),
    **dict.fromkeys(("int8 64", "int8 group 128", "int8 group 64"), _blocks(10)),
    **dict.fromkeys(("fp8 64", "fp8 group 128", "fp8 group 64"), _blocks(10)),
    "4-bit": (
        Row("cuda", up_to(32), range(2 * MILLION, 60 * MILLION + 1), why=_SKINNY.why),
        _SKINNY,
        DECODED,
    ),
}


def family(codes: Codes, geometry: Geometry | None = None) -> str:
    """The name in the tables of a kind of codes and scales."""
    if codes == Codes.FOUR_BIT:
        return "4-bit"
    kind = codes.name.lower()
    if geometry.cols is None:
        return f"{kind} row"
    size = "64" if geometry.cols < 128 else "128"
    if geometry.rows == 1:
        return f"{kind} group {size}"
    return f"{kind} {size}"


def rows_for(name: str, m: int, n: int, k: int, gpu: Gpu) -> Iterator[Row]:
    """The rows of a family that fit (M, K) times (N, K), the one to take first."""
    table = HOPPER if gpu.capability[0] == 9 else OTHER
    return (row for row in table[name] if row.fits(m, n, k))


# Kinds of weights of comfy-kitchen's that our products multiply, by major compute capability; on
# others its kernels were not measured against ours.
BEATS_KITCHEN = {9: ("int8", "fp8", "e2m1", "e4m3_mx")}


def beats_kitchen(kind: str, gpu: Gpu) -> bool:
    """Whether our product of a kind of comfy-kitchen's weights was measured to be faster."""
    return not gpu.amd and kind in BEATS_KITCHEN.get(gpu.capability[0], ())
