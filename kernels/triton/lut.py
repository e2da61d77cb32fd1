"""Look up 4-bit codes in registers: PTX that turns four packed bytes into eight table values, 4
instructions each.

`prmt` picks four bytes out of eight by four 3-bit selectors; two of them and a blend by bit 3 make
a 16-entry byte table, and one byte table per byte of the value makes the whole. A gather from
memory costs several times as much.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def table_asm(values: tuple[float, ...], dtype: torch.dtype) -> tuple[str, str]:
    """(PTX, constraints) for `tl.inline_asm_elementwise` with pack 4: uint8 -> (high nibbles, low
    nibbles) in `dtype`.

    Args:
        values: 16 numbers by code, rounded to `dtype` (float32, float16 or bfloat16).
    """
    width = torch.empty(0, dtype=dtype).element_size()
    table = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.uint8).view(16, width)
    # byte i of every value in row i, four to a register
    planes = table.T.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    count = 4 * width // 4  # 32-bit registers per output
    lines = ["{", f".reg .b32 x, s, t, u, m, p, q, {', '.join(f'b{i}' for i in range(width))};"]
    for output, shift in enumerate((4, 0)):
        lines += [
            f"shr.b32 x, ${2 * count}, {shift};",
            "and.b32 x, x, 0x0f0f0f0f;",
            "shl.b32 m, x, 4;",
            "prmt.b32 m, m, m, 0xba98;",  # 0xff where bit 3 of the code is set
            "and.b32 s, x, 0x07070707;",
            "shr.b32 t, s, 4;",
            "or.b32 s, s, t;",
            "prmt.b32 s, s, s, 0x4420;",  # selectors of the four codes, one nibble each
        ]
        for byte, (a, b, c, d) in enumerate(planes.tolist()):
            lines += [
                f"mov.b32 t, {a:#010x};", f"mov.b32 u, {b:#010x};", "prmt.b32 p, t, u, s;",
                f"mov.b32 t, {c:#010x};", f"mov.b32 u, {d:#010x};", "prmt.b32 q, t, u, s;",
                f"lop3.b32 b{byte}, m, q, p, 0xca;",  # m ? q : p
            ]  # fmt: skip
        first = output * count
        if width == 2:
            lines += [
                f"prmt.b32 ${first}, b0, b1, 0x5140;",
                f"prmt.b32 ${first + 1}, b0, b1, 0x7362;",
            ]
        else:
            for half, (low, high) in enumerate((("0x5140", "0x5140"), ("0x7362", "0x7362"))):
                lines += [f"prmt.b32 t, b0, b1, {low};", f"prmt.b32 u, b2, b3, {high};"]
                lines += [
                    f"prmt.b32 ${first + 2 * half}, t, u, 0x5410;",
                    f"prmt.b32 ${first + 2 * half + 1}, t, u, 0x7632;",
                ]
    lines.append("}")
    return "\n".join(lines), ",".join(["=r"] * (2 * count) + ["r"])
