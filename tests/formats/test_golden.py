"""The golden vectors of the file format, byte for byte, zeros included."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.formats.base import marker_bytes
from fewbits.quant_ops.spec import LayerInput
from support.codec import encode, options_of
from support.vectors import A, B, C, D, bits, floats, raw, sha

BLOCK4 = {"block_size": 4}
ROW, TENSOR = {"scaling": "row"}, {"scaling": "tensor"}
ROTATED = {"scaling": "row", "convrot": True, "convrot_groupsize": 64}
G64 = {"convrot_groupsize": 64}


def store(
    name: str, weight: torch.Tensor, options: dict[str, object] | None = None
) -> dict[str, torch.Tensor]:
    return encode(name, weight, options or {})[0]


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        (A, "e2d3eff026ce19e5"),
        (B, "5392bc48301f2fae"),
        (C, "17eb7fde387d1308"),
        (D, "e1ec43b02ad1ddd3"),
    ],
    ids=["A", "B", "C", "D"],
)
def test_the_inputs_are_those_of_the_format_page(vector, expected):
    assert vector.dtype == torch.float32
    assert sha(vector) == expected


FP8 = [
    ("float8_e4m3fn", TENSOR, (), "3e912492", "3ec6364eae43d6532bb338bb23a6282900000000000000005cdc544cc63e7ef6"),
    ("float8_e5m2", TENSOR, (), "3b112492", "5bdf5763d35de76552d658da4ecf505100000000000000006aea6662df5b7bf7"),
    (
        "float8_e4m3fn_rowwise", ROW, (4,), "3c124925 3a6a0ea1 3f800000 3e912492",
        "66ee5e76d66afe7a6ef67afe66e86a6b00000000000000005cdc544cc63e7ef6",
    ),
    (
        "float8_e4m3fn_blockwise", BLOCK4, (1, 2), "3c800000 3e912492",
        "60e85870ae43d6534dd55add23a6282900000000000000007efe766ec63e7ef6",
    ),
    (
        "float8_e4m3fn_block3d", BLOCK4, (4, 2, 1),
        "3b924925 3c124925 3a6a0ea1 393b3ee7 3f800000 3f800000 3c800000 3e912492",
        "6ef6667ed66afe7a6ef67afe79fa7c7e00000000000000007efe766ec63e7ef6",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "shape", "scale", "codes"), FP8, ids=[case[0] for case in FP8]
)
def test_fp8_of_a_is_the_golden_vector(name, options, shape, scale, codes):
    stored = store(name, A, options)
    assert tuple(stored["weight_scale"].shape) == shape
    assert bits(stored["weight_scale"]) == scale
    assert raw(stored["weight"]).hex() == codes


ZERO = " 0 0 0 0 0 0 0 0"
INT8 = [
    (
        "int8_tensorwise", TENSOR, (), "3f800000",
        "0 -1 0 2 0 1 -4 3" + ZERO + ZERO + " 7 -7 4 2 -1 0 127 -64",
    ),
    (
        "int8_tensorwise", ROW, (4, 1), "3d010204 3b4e69a0 3f800000 3f800000",
        "16 -32 8 64 -4 24 -127 95 32 -64 95 -127 16 -19 22 25" + ZERO + " 7 -7 4 2 -1 0 127 -64",
    ),
    (
        "int8_blockwise", BLOCK4, (1, 2), "3d61c387 3f800000",
        "9 -18 5 36 0 1 -4 3 2 -4 5 -7 0 0 0 0" + ZERO + " 127 -127 64 32 -1 0 127 -64",
    ),
    (
        "int8_lodewise", BLOCK4, (4, 2),
        "3c810204 3d010204 3b4e69a0 3a25214d 3f800000 3f800000 3d61c387 3f800000",
        "32 -64 16 127 -4 24 -127 95 32 -64 95 -127 79 -95 111 127" + ZERO + " 127 -127 64 32 -1 0 127 -64",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "shape", "scale", "codes"),
    INT8,
    ids=["tensor", "row", "blockwise", "lodewise"],
)
def test_int8_of_a_is_the_golden_vector(name, options, shape, scale, codes):
    stored = store(name, A, options)
    assert tuple(stored["weight_scale"].shape) == shape
    assert bits(stored["weight_scale"]) == scale
    assert stored["weight"].flatten().tolist() == [int(code) for code in codes.split()]


def test_int8_rows_below_tiny_are_zero_blocks_and_rows_above_are_not():
    stored = store("int8_tensorwise", torch.tensor([[2.0**-81, -(2.0**-90)], [2.0**-79, 0.0]]), ROW)
    assert stored["weight_scale"].flatten().tolist() == [
        1.0,
        float(torch.tensor(2.0**-79) / torch.tensor(127.0)),
    ]
    assert stored["weight"].tolist() == [[0, 0], [127, 0]]


class TestMxfp8:
    def test_b_is_the_golden_vector(self):
        stored = store("mxfp8", B)
        assert tuple(stored["weight"].shape) == (32, 64)
        assert sha(stored["weight"]) == "f5f03d196d417a1e"
        assert stored["weight_scale"].dtype == torch.uint8
        assert tuple(stored["weight_scale"].shape) == (128, 4)
        assert sha(stored["weight_scale"]) == "54ac0f7cf3a1a01b"
        flat = stored["weight_scale"].flatten()
        assert {int(i): int(flat[i]) for i in flat.nonzero()} == {
            0: 119, 1: 119, 16: 118, 17: 118, 32: 120, 33: 120, 48: 115, 49: 115,
        }  # fmt: skip
        assert [raw(row[:16]).hex() for row in stored["weight"][:4]] == [
            "f7e86ef5e071f30073f16075ee6877ea",
            "f16075ee6877ea6cf6e470f4d872f258",
            "e974f9dc77f75c79f4697af16ffbec72",
            "6476ec6af7e86ef5e071f30073f16075",
        ]

    def test_c_is_padded_with_zero_bytes(self):
        stored = store("mxfp8", C)
        assert tuple(stored["weight"].shape) == (32, 32)
        assert sha(stored["weight"]) == "1f4aaba7baef3268"
        assert sha(stored["weight_scale"]) == "05c97d84c7231319"
        assert [int(stored["weight_scale"].flatten()[16 * row]) for row in range(3)] == [
            121,
            119,
            121,
        ]
        assert (
            raw(stored["weight"][0]).hex() == "f7f6f6f6f5f4f4f4f3f2f2f2f1f0f0efeeedeceb" + 12 * "00"
        )


class TestNvfp4:
    def test_b_is_the_golden_vector(self):
        stored = store("nvfp4", B)
        assert stored["weight_scale_2"].shape == ()
        assert bits(stored["weight_scale_2"]) == "3a892492"
        assert stored["weight"].dtype == torch.uint8
        assert tuple(stored["weight"].shape) == (16, 32)
        assert sha(stored["weight"]) == "dd7c0d49acd59149"
        assert stored["weight_scale"].dtype == torch.float8_e4m3fn
        assert tuple(stored["weight_scale"].shape) == (128, 4)
        assert sha(stored["weight_scale"]) == "5d18d700474954ee"
        flat = raw(stored["weight_scale"])
        assert [flat[16 * r : 16 * r + 4].hex() for r in range(4)] == [
            "71717171",
            "69696969",
            "7e7e7e7e",
            "51515151",
        ]
        assert [raw(row).hex() for row in stored["weight"][:4]] == [
            "fb5fa6e06e27d37c4fa5e96e16d27c4fb5fa6e06e27d37c4fa5e96e16d27c4fb",
            "e27d37c4fa5e96e16d27c4fb5fa6e06e27d37c4fa5e96e16d27c4fb5fa6e06e2",
            "a5e96e16d27c4fb5fa6e06e27d37c4fa5e96e16d27c4fb5fa6e06e27d37c4fa5",
            "27c4fb5fa6e06e27d37c4fa5e96e16d27c4fb5fa6e06e27d37c4fa5e96e16d27",
        ]

    def test_c_is_padded_with_zero_bytes(self):
        stored = store("nvfp4", C)
        assert bits(stored["weight_scale_2"]) == "3ab6db6e"
        assert sha(stored["weight"]) == "33a3bbadc09208e6"
        assert sha(stored["weight_scale"]) == "efe6d4f1fffe145e"
        flat = raw(stored["weight_scale"])
        assert [flat[16 * r : 16 * r + 2].hex() for r in range(3)] == ["7e75", "7170", "7c7e"]
        assert [raw(row).hex() for row in stored["weight"][:3]] == [
            "fffffeeeeeeeedddfffe000000000000",
            "ffeeedcca90124456677000000000000",
            "45555666666677777777000000000000",
        ]

    def test_zeros_have_scale_one_and_only_zero_bytes(self):
        stored = store("nvfp4", torch.zeros(16, 16))
        assert stored["weight_scale_2"].item() == 1.0
        assert not any(raw(stored["weight"])) and not any(raw(stored["weight_scale"]))


class TestConvRot:
    def test_int8_of_b_is_the_golden_vector(self):
        stored = store("int8_tensorwise", B, ROTATED)
        assert tuple(stored["weight_scale"].shape) == (4, 1)
        assert bits(stored["weight_scale"]) == "3c62c58b 3bc68d1a 3d2d1a34 3a52a54b"
        assert sha(stored["weight"]) == "f0e253a63551376b"
        assert stored["weight"][0, :16].tolist() == [
            -50,
            -1,
            -21,
            -6,
            8,
            -12,
            38,
            -17,
            32,
            12,
            -8,
            6,
            56,
            -34,
            15,
            30,
        ]
        assert stored["weight"][3, :16].tolist() == [
            -4,
            -26,
            27,
            -32,
            21,
            -1,
            -22,
            -7,
            47,
            -50,
            3,
            19,
            -41,
            13,
            -9,
            7,
        ]

    def test_w4a4_of_b_is_the_golden_vector(self):
        stored = store("convrot_w4a4", B, G64)
        assert stored["weight"].dtype == torch.int8
        assert tuple(stored["weight_scale"].shape) == (4,)
        assert bits(stored["weight_scale"]) == "3e809249 3de12492 3f444925 3c6edb6e"
        assert sha(stored["weight"]) == "9796fbd56dcbf010"
        assert [raw(row).hex() for row in stored["weight"]] == [
            "0d0ff0f21200e3211f10920cefe531fef0f22f29c13e5e14ef212fd030fe010f",
            "41fe12100d0301fede143f2d93111e1ba42d41f3f03930e12fd1f0f23021efd1",
            "1012d00d0ff1101ef22f6defd01e2ee7211f1dd6100ea1231012d00e0f01111e",
            "f0e2010fd3101e0fc14b1e14703defe141fad2106fe5df10f0e2010fd3101e10",
        ]

    def test_w4a8_of_b_is_the_golden_vector(self):
        stored = store("asym_w4a8_int8", B, G64)
        assert stored["weight_s_rel"].dtype == torch.float8_e4m3fn
        assert [raw(row).hex() for row in stored["weight_s_rel"]] == [
            "66707065",
            "69706f65",
            "68706d67",
            "65706f66",
        ]
        assert bits(stored["weight_s_channel"]) == "3c60a5de 3bc03f4c 3d2a5614 3a4a9c24"
        assert stored["weight"].dtype == torch.int8
        assert sha(stored["weight"]) == "012bf5fb5e69d9eb"
        assert [raw(row).hex() for row in stored["weight"]] == [
            "7064695d9d962fca96980a82565dc865676aa7a028b5d58c26dbc409f8318c75",
            "f953ad97817e6a53358db7a30ca895920db3d96b68c0b74ad40a493ef6ec140a",
            "a89c06817569a8a36aa7e4464895b55fa9a5923f978409acb9ad0791857ab9a3",
            "372c7b630fb8a19629c1a59df7b45649c8603a87f64e4598483d8c741fc9b2a7",
        ]


NF4_B = [
    "04c06d17e29f2af4c05d16e18e29f3b04c06d17e29f2af4c05d16e18e29f3b04",
    "29f2af4c05d16e18e29f3b04c06d17e29f2af4c05d16e18e29f3b04c06d17e29",
    "5d16e18e29f3b04c06d17e29f2af4c05d16e18e29f3b04c06d17e29f2af4c05d",
    "9f3b04c06d17e29f2af4c05d16e18e29f3b04c06d17e29f2af4c05d16e18e29f",
]
FP4_B = [
    "bf5be2a02a63d73c4be5a92a12d63c4bf5be2a02a63d73c4be5a92a12d63c4bf",
    "a63d73c4be5a92a12d63c4bf5be2a02a63d73c4be5a92a12d63c4bf5be2a02a6",
    "e5a92a12d63c4bf5be2a02a63d73c4be5a92a12d63c4bf5be2a02a63d73c4be5",
    "63c4bf5be2a02a63d73c4be5a92a12d63c4bf5be2a02a63d73c4be5a92a12d63",
]
G = {"block_size": 64}


class TestBitsandbytes:
    @pytest.mark.parametrize(
        ("name", "rows", "digest"),
        [("bnb_nf4", NF4_B, "a94872caf446280e"), ("bnb_fp4", FP4_B, "30ad6122ed9f279d")],
        ids=["nf4", "fp4"],
    )
    def test_b_is_the_golden_vector(self, name, rows, digest):
        stored = store(name, B, G)
        assert bits(stored["absmax"]) == "3f700000 3ef00000 40340000 3d700000"
        assert [raw(row).hex() for row in stored["weight"]] == rows
        assert sha(stored["weight"]) == digest

    @pytest.mark.parametrize(
        ("name", "rows"),
        [
            (
                "bnb_nf4",
                [
                    "2d4f70a1d3e6091c3e5f81b2d4f70a1d3e6091c3",
                    "6796857857968a685796796805d17e2af4c06e18",
                ],
            ),
            (
                "bnb_fp4",
                [
                    "d2f30b7a5c2eb6a5d2e36a4d2f30b7a5c2eb6a5d",
                    "e16e1e96e06e1696e96e16e1bf5a02d73c5be2a6",
                ],
            ),
        ],
        ids=["nf4", "fp4"],
    )
    def test_blocks_of_d_straddle_rows_and_the_last_is_partial(self, name, rows):
        stored = store(name, D, G)
        assert bits(stored["absmax"]) == "3fb00000 3e900000"
        assert [raw(row).hex() for row in stored["weight"]] == rows

    @pytest.mark.parametrize(
        ("name", "byte"), [("bnb_nf4", "77"), ("bnb_fp4", "00")], ids=["nf4", "fp4"]
    )
    @pytest.mark.parametrize(
        "value", [0.0, -0.0, -(2.0**-81)], ids=["zeros", "negative zeros", "tiny"]
    )
    def test_a_zero_block_has_absmax_one_and_the_code_of_zero(self, name, byte, value):
        stored = store(name, torch.full((1, 64), value), G)
        assert bits(stored["absmax"]) == "3f800000"
        assert raw(stored["weight"]).hex() == 32 * byte

    def test_decoded_nf4_of_b_starts_as_the_format_page_says(self):
        decoded = get_format("bnb_nf4").dequantize(
            store("bnb_nf4", B, G), LayerInput((4, 64), None), options_of("bnb_nf4", G)
        )
        assert torch.equal(decoded[0, :4], floats("bf700000 be888828 3ed38a6c bf700000"))


RELATIVE_ERRORS = [
    ("convrot_w4a4", G64, 0.1324),
    ("asym_w4a8_int8", G64, 0.0779),
    ("bnb_nf4", G, 0.0891),
    ("bnb_fp4", G, 0.1054),
]


@pytest.mark.parametrize(
    ("name", "options", "error"), RELATIVE_ERRORS, ids=[case[0] for case in RELATIVE_ERRORS]
)
def test_relative_decode_error_of_b_is_the_golden_one(name, options, error):
    format, layer, stored = get_format(name), LayerInput((4, 64), None), store(name, B, options)
    options = options_of(name, options)
    decoded = format.dequantize(stored, layer, options)
    assert round(float((decoded - B).norm() / B.norm()), 4) == error
    prepared = format.prepare(B, options)
    grid = format.grid(layer, options)
    scale = grid.scale(prepared)
    squared, signal, *_ = grid.deviation(prepared, grid.encode(prepared, scale), scale)
    assert round((squared / signal) ** 0.5, 4) == error


MARKERS = [
    ("float8_e4m3fn", {}, 27, "dc6ecd1e9459beb7"),
    ("int8_blockwise", {}, 78, "afe328f8fa785db1"),
    ("int8_tensorwise", {"convrot": True}, 89, "7c7aca3fb3f26f7a"),
    ("bnb_nf4", {}, 132, "86161524d99d3e55"),
]


@pytest.mark.parametrize(
    ("name", "options", "length", "digest"), MARKERS, ids=[case[0] for case in MARKERS]
)
def test_marker_bytes_are_the_golden_ones(name, options, length, digest):
    format = get_format(name)
    text = marker_bytes(format.marker(LayerInput((4, 64), "BF16"), format.configure(options)))
    assert (len(text), hashlib.sha256(text).hexdigest()[:16]) == (length, digest)
