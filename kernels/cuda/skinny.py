"""x @ W.T for few rows of x: W's codes go from memory through registers into tensor cores, decoded on the way.

One block takes 16 rows of W; its warps share K and add their float32 sums at the end. x is not rounded. Each of the
four lanes of a row holds LANE consecutive codes of a span of 4 * LANE along K; which element of a span meets which
slot of the tensor core is free, as long as x is read in the same order.
"""

from __future__ import annotations

from functools import cache

import torch

from .compiler import Kernel, kernel

SOURCE = r"""
typedef unsigned int u32;
typedef unsigned short u16;
#define DEVICE static __device__ __forceinline__

DEVICE u32 blend(u32 m, u32 a, u32 b) { return (m & a) | (~m & b); }
DEVICE u32 prmt(u32 a, u32 b, u32 s) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
  return r;
}

#ifdef BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
DEVICE float widen(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u16 narrow(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
DEVICE float widen(u16 h) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h)); return r; }
DEVICE u16 narrow(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#endif

// Codes of a lane -> pairs of 16-bit floats in the order of the elements.
#if KIND == 4
#define WORDS (LANE / 8)
// One byte is two codes, the first in its high nibble: 256 pairs in shared memory, once per bank, so that no two lanes
// ever meet in one. Integer units, half as many as the others, set the pace: two operations per byte.
// prmt picks 4 bytes of 8 by 3-bit selectors: two of them and a blend by bit 3 look up 16 bytes, low and high apart.
DEVICE u32 pair_of(u32 byte) {
  u32 code = (byte >> 4) | (byte & 15) << 4, s = code & 0x77u, upper = (code >> 3) & 0x11u;
  u32 m = prmt(0x0000ff00u, 0u, upper);
  u32 low = blend(m, prmt(L2, L3, s), prmt(L0, L1, s)), high = blend(m, prmt(H2, H3, s), prmt(H0, H1, s));
  return prmt(low, high, 0x5140u);
}
DEVICE void decode(const u32* words, u32 (*pair)[2], const u32* table, u32 lane4, u32&) {
#pragma unroll
  for (int q = 0; q < WORDS; ++q) {
    u32 w = words[q];
#define LOOK(shifted) (*(const u32*)((const char*)table + (((shifted) & 0x7f80u) | lane4)))
    pair[2 * q][0] = LOOK(w << 7);
    pair[2 * q][1] = LOOK(w >> 1);
    pair[2 * q + 1][0] = LOOK(w >> 9);
    pair[2 * q + 1][1] = LOOK(w >> 17);
  }
}
#else
#define WORDS (LANE / 4)
DEVICE void decode(const u32* words, u32 (*pair)[2], const u32*, u32, u32& odd) {
#pragma unroll
  for (int q = 0; q < WORDS; ++q) {
#if KIND == 8  // INT8
    u32 u = words[q] ^ 0x80808080u;
#ifdef BF16  // 2^23 + u as float32, minus 2^23 + 128: exact, and the upper half is the bfloat16
    u32 f[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) f[j] = __float_as_uint(__uint_as_float(prmt(u, 0x4b000000u, 0x7540u + j)) - 8388736.0f);
    pair[q][0] = prmt(f[0], f[1], 0x7632u);
    pair[q][1] = prmt(f[2], f[3], 0x7632u);
#else  // 1024 + u as float16, minus 1152
    asm("sub.f16x2 %0, %1, %2;" : "=r"(pair[q][0]) : "r"(prmt(u, 0x64646464u, 0x4140u)), "r"(0x64806480u));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(pair[q][1]) : "r"(prmt(u, 0x64646464u, 0x4342u)), "r"(0x64806480u));
#endif
#else  // e4m3fn: sign, exponent and mantissa moved into place, then times a power of two; NaN sets a bit of `odd`
    odd |= (words[q] & 0x7f7f7f7fu) + 0x01010101u;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      u32 t = prmt(words[q], 0u, j ? 0x3424u : 0x1404u), moved;
#ifdef BF16
      moved = (t & 0x80008000u) | ((t & 0x7f007f00u) >> 4);
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair[q][j]) : "r"(moved), "r"(0x7b807b80u), "r"(0x80008000u));
#else
      moved = (t & 0x80008000u) | ((t & 0x7f007f00u) >> 1);
      asm("mul.f16x2 %0, %1, %2;" : "=r"(pair[q][j]) : "r"(moved), "r"(0x5c005c00u));
#endif
    }
#endif
  }
}
#endif

template <int N> DEVICE void load(u32* to, const void* from) {
  if (N == 1) to[0] = __ldg((const u32*)from);
  if (N == 2) { uint2 v = __ldg((const uint2*)from); to[0] = v.x; to[1] = v.y; }
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    uint4 v = __ldg((const uint4*)from + i);
    to[4 * i] = v.x; to[4 * i + 1] = v.y; to[4 * i + 2] = v.z; to[4 * i + 3] = v.w;
  }
}

// Codes: a warp reads 8 rows at once, little of each, so the cache is asked to fetch what its neighbours read next.
template <int N> DEVICE void stream(u32* to, const void* from) {
#define HINT "ld.global.nc.L1::no_allocate.L2::128B"  // 3 to 7 % on an H200; 256B is the same
  if (N == 1) asm(HINT ".b32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  if (N == 2) asm(HINT ".v2.b32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  if (N == 4)
    asm(HINT ".v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

#define SPAN (4 * LANE)
#define STEPS (LANE / 4)

extern "C" __global__ void __launch_bounds__(32 * WARPS, (TILES <= 2 ? 32 : 16) / WARPS) multiply(
    const u16* __restrict__ x, const unsigned char* __restrict__ codes, const float* __restrict__ scale,
    const u16* __restrict__ bias, u16* __restrict__ out, int m, int n, int k, int per_scale, int groups, int has_bias) {
  __shared__ float sums[WARPS][TILES][32][4];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  u32 lane4 = 4 * lane, *pairs = 0;
#if KIND == 4
  __shared__ u32 table[256 * 32];
  pairs = table;
  for (int byte = 4 * warp + (lane >> 3); byte < 256; byte += 4 * WARPS) {
    u32 pair = pair_of(byte);
    ((uint4*)table)[8 * byte + (lane & 7)] = make_uint4(pair, pair, pair, pair);
  }
  __syncthreads();
#endif
  int spans = k / SPAN, first = blockIdx.y * 8 * TILES;
  for (int block = blockIdx.x; block * 16 < n; block += gridDim.x) {
  int row = block * 16 + g, other = row + 8;
  // Rows past the end read the last row; their sums are never stored.
  const unsigned char* at = codes + (size_t)min(row, n - 1) * spans * (16 * WORDS) + 4 * WORDS * t;
  const unsigned char* at2 = codes + (size_t)min(other, n - 1) * spans * (16 * WORDS) + 4 * WORDS * t;
  const float* scale1 = scale + (size_t)(min(row, n - 1) / per_scale) * groups;
  const float* scale2 = scale + (size_t)(min(other, n - 1) / per_scale) * groups;
  u32 odd[2] = {};
  float total[TILES][4] = {};
  for (int span = warp * AHEAD; span < spans; span += WARPS * AHEAD) {
    u32 words[AHEAD][2][WORDS];
    float s[AHEAD][2];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      bool inside = span + i < spans;
      int safe = inside ? span + i : span;
      stream<WORDS>(words[i][0], at + (size_t)safe * (16 * WORDS));
      stream<WORDS>(words[i][1], at2 + (size_t)safe * (16 * WORDS));
#if GROUPED
      s[i][0] = scale1[safe * SPAN / GROUPED];
      s[i][1] = scale2[safe * SPAN / GROUPED];
#endif
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (span + i >= spans) break;
      u32 a[STEPS][2], b[STEPS][2];
      decode(words[i][0], a, pairs, lane4, odd[0]);
      decode(words[i][1], b, pairs, lane4, odd[1]);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        int token = first + 8 * tile + g;
        u32 xs[LANE / 2] = {};
        if (token < m) load<LANE / 2>(xs, x + (size_t)token * k + (size_t)(span + i) * SPAN + LANE * t);
#if GROUPED
        float part[4] = {};
#else
        float* part = total[tile];
#endif
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
          asm(MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
              : "+f"(part[0]), "+f"(part[1]), "+f"(part[2]), "+f"(part[3])
              : "r"(a[j][0]), "r"(b[j][0]), "r"(a[j][1]), "r"(b[j][1]), "r"(xs[2 * j]), "r"(xs[2 * j + 1]));
#if GROUPED
        total[tile][0] += part[0] * s[i][0];
        total[tile][1] += part[1] * s[i][0];
        total[tile][2] += part[2] * s[i][1];
        total[tile][3] += part[3] * s[i][1];
#endif
      }
    }
  }
#if KIND == 9  // a NaN weight makes its row NaN: tell the other three lanes of the row
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    odd[r] |= __shfl_xor_sync(~0u, odd[r], 1);
    odd[r] |= __shfl_xor_sync(~0u, odd[r], 2);
    if (odd[r] & 0x80808080u)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) total[tile][2 * r] = total[tile][2 * r + 1] = __int_as_float(0x7fffffff);
  }
#endif
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][tile][lane][j] = total[tile][j];
  __syncthreads();
  // Entry j of lane (g, t): row g + 8 * (j / 2) of W, token 2 * t + j % 2. Threads go through rows first.
  for (int e = threadIdx.x; e < TILES * 128; e += 32 * WARPS) {
    int r = e & 15, c = e >> 4, tile = c >> 3, token = first + c, target = block * 16 + r;
    int from = (r & 7) * 4 + ((c & 7) >> 1), entry = (r >> 3) * 2 + (c & 1);
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[w][tile][from][entry];
    if (token >= m || target >= n) continue;
#if !GROUPED
    sum *= scale[target / per_scale];
#endif
    if (has_bias) sum += widen(bias[target]);
    out[(size_t)token * n + target] = narrow(sum);
  }
  __syncthreads();
  }
}
"""

KINDS = {torch.uint8: 4, torch.int8: 8, torch.float8_e4m3fn: 9}
MANY = 1 << 10  # blocks per multiprocessor: every block takes 16 rows; a table is better filled for several


@cache
def _table(values: tuple[float, ...], dtype: torch.dtype) -> tuple[str, ...]:
    """The 16 values as two tables of bytes, four per register: L0..L3 the low bytes, H0..H3 the high ones."""
    bits = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.uint8).view(16, 2)
    return tuple(
        f"-D{plane}{i}={int.from_bytes(bytes(bits[4 * i : 4 * i + 4, byte].tolist()), 'little'):#x}u"
        for byte, plane in enumerate("LH")
        for i in range(4)
    )


def options(
    codes: torch.dtype,
    dtype: torch.dtype,
    group: int | None,
    tiles: int,
    warps: int,
    ahead: int,
    values: tuple[float, ...] | None = None,
) -> tuple[str, ...]:
    """Compiler options of one variant; `values` are the 16 of a 4-bit code."""
    return (
        f"-DKIND={KINDS[codes]}", f"-DLANE={8 if group == 32 else 16}", f"-DGROUPED={group or 0}", f"-DTILES={tiles}",
        f"-DWARPS={warps}", f"-DAHEAD={ahead}", *(("-DBF16",) if dtype == torch.bfloat16 else ()),
        *(_table(values, dtype) if values else ()),
    )  # fmt: skip


def shape_of_work(m: int, n: int, four_bit: bool) -> tuple[int, int, int, int]:
    """(tiles of 8 tokens, warps, spans in flight, blocks per multiprocessor); tests/benchmarks/linear_sweep.py."""
    tiles = 1 if m <= 8 else 2 if m <= 16 else 4 if m <= 32 else 8
    wide = n >= 8192
    warps = min((8 if tiles == 1 or four_bit else 4) if wide else 16, 32 // tiles)  # 48 KB hold no more sums
    return tiles, warps, 2 if four_bit and wide and tiles == 1 else 1, 3 if four_bit else MANY


def why_not_shape(m: int, k: int, group: int | None, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot multiply this shape; None when it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} input: the tensor cores would round it"
    span = 32 if group == 32 else 64
    if group is not None and group % span:
        return f"groups of {group} are narrower than {span}"
    if k % (group or span):
        return f"K={k} is not a multiple of {group or span}"
    return None


@cache
def _entry(device: int, *variant: object) -> Kernel:
    return kernel(SOURCE, "multiply", options(*variant), device)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, at an address that 16-byte loads can take."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group: int | None,
    rows_per_scale: int,
    values: tuple[float, ...] | None = None,
    work: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """(M, K) bf16 or fp16 @ W.T + bias -> (M, N) of x's dtype, summed in float32.

    Args:
        codes: (N, K) int8 or float8_e4m3fn, or (N, K/2) uint8 with the high nibble first.
        scale: float32, row-major (N / rows_per_scale, K / group); N = rows_per_scale for one scale.
        group: elements along K sharing a scale: 32 or a multiple of 64; None for all.
        values: of the 16 codes of 4 bits.
    """
    m, k = x.shape
    n = codes.shape[0]
    x, codes = _aligned(x), _aligned(codes)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tiles, warps, ahead, resident = work or shape_of_work(m, n, values is not None)
    entry = _entry(x.device.index or 0, codes.dtype, x.dtype, group, tiles, warps, ahead, values)
    has_bias = bias is not None
    blocks, sms = -(-n // 16), _multiprocessors(x.device.index or 0)
    rounds = -(-blocks // (sms * resident))
    entry.launch(
        (-(-blocks // rounds), -(-m // (8 * tiles)), 1),
        32 * warps,
        (
            x,
            codes,
            scale,
            bias if has_bias else scale,
            out,
            m,
            n,
            k,
            rows_per_scale,
            k // group if group else 1,
            has_bias,
        ),
        x.device,
    )
    return out
