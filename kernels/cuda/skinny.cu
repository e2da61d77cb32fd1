// x @ W.T for few rows of x; skinny.py says how work is shared out and which macros a variant has.
//
// A warp takes 16 rows of W and a run of K, which it streams through a ring of its own in shared memory; warps of a block
// and blocks of a cluster share K and add their float32 sums at the end. x is not rounded. Each of the four lanes of a
// row holds LANE consecutive codes of a span of 4 * LANE along K; which element of a span meets which slot of the tensor
// core is free, as long as x is read in the same order.

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

#define SPAN (4 * LANE)              // codes along K that a warp multiplies at once
#define STEPS (LANE / 4)
#define TILES ((TOKENS + 7) / 8)
#define WARPS (ROWS * SPLIT)
#define SPANS (8 / WORDS)            // of a stage: 128 bytes of each of 16 rows
#define SUMS (WARPS * TILES * 128)
#define CODES (SPANS * SPAN)         // of a row in a stage
#define X_CHUNKS (TOKENS * CODES / 8)  // 16 bytes each, of x in a stage
#if GROUPED
#define SCALES (CODES > GROUPED ? CODES / GROUPED : 1)  // of a row in a stage
#else
#define SCALES 1
#endif

// 16 bytes to shared memory without passing registers, zeros unless `inside`; L2 is asked for the rest of the line.
DEVICE void fetch(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

DEVICE u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

// Where 16 bytes of a row lie among its eight: spread so that lanes reading several rows meet in no bank.
DEVICE u32 place(u32 row, u32 chunk) { return chunk ^ ((row & 1) << 2 | (row & 2) | (row >> 2 & 1)); }
DEVICE u32 place_x(u32 token, u32 chunk) { return chunk ^ (LANE == 16 ? token & 1 : (token & 1) << 2); }

// Warps that read the same K wait for each other.
DEVICE void together(u32 split) {
#if ROWS == 1
  __syncwarp();
#else
  asm volatile("bar.sync %0, %1;" ::"r"(1 + split), "n"(32 * ROWS) : "memory");
#endif
}

DEVICE void scales_of(float* to, const float* from, u32 stage, u32 groups) {
#if EVEN
  load<SCALES>((u32*)to, from + stage * SCALES);
#elif GROUPED
#pragma unroll
  for (u32 i = 0; i < SCALES; ++i) to[i] = from[min((stage * CODES + i * GROUPED) / GROUPED, groups - 1)];
#endif
}

DEVICE float shared_of(const float* at, u32 block) {  // what lies at the same place in another block of the cluster
#if CLUSTER > 1
  u32 there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(at)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
#else
  return *at;
#endif
}

#if CLUSTER > 1
#define MEET(order)                                                                                             \
  asm volatile("barrier.cluster.arrive." order ".aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory")
#else
#define MEET(order) __syncthreads()
#endif

#define RESIDENT ((TILES == 1 ? 24 : 16) / WARPS)
struct Arguments {
  const u16* x;
  const unsigned char* codes;
  const float* scale;
  const u16* bias;
  u16* out;
  u32 m, n, k, scale_shift, groups, has_bias;
};

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(32 * WARPS, RESIDENT ? RESIDENT : 1) multiply(const __grid_constant__ Arguments given) {
  const u16* __restrict__ x = given.x;
  const unsigned char* __restrict__ codes = given.codes;
  const float* __restrict__ scale = given.scale;
  const u16* __restrict__ bias = given.bias;
  u16* __restrict__ out = given.out;
  const u32 m = given.m, n = given.n, k = given.k, scale_shift = given.scale_shift, groups = given.groups;
  const u32 has_bias = given.has_bias;
  extern __shared__ __align__(128) u32 shared[];
  u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  u32 rank = blockIdx.x % CLUSTER, first_row = blockIdx.x / CLUSTER * (16 * ROWS), first = blockIdx.y * TOKENS;
  u32* ring = shared + warp * (STAGES * 512);
  u32* x_ring = shared + WARPS * (STAGES * 512) + warp / ROWS * (STAGES * X_CHUNKS * 4);
  float* sums = (float*)(shared + STAGES * (WARPS * 512 + SPLIT * X_CHUNKS * 4));
  u32* table = (u32*)sums + SUMS;
  u32 spans = k / SPAN, stages = (spans + SPANS - 1) / SPANS, slice = rank * SPLIT + warp / ROWS;
  u32 stage = slice * stages / (CLUSTER * SPLIT), stop = (slice + 1) * stages / (CLUSTER * SPLIT), asked = stage;
  // Rows past the end read the last row; their sums are never stored.
  u32 warp_row = first_row + warp % ROWS * 16, row_bytes = spans * (16 * WORDS), past = stage * 128 + (lane & 7) * 16;
  const unsigned char* from[4];
  u32 to[4];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    u32 r = 4 * i + (lane >> 3);
    from[i] = codes + (size_t)min(warp_row + r, n - 1) * row_bytes + past;
    to[i] = address(ring) + r * 128 + place(r & 7, lane & 7) * 16;
  }
  u32 x_to = address(x_ring);
#define ASK(slot)                                                                                              \
  {                                                                                                            \
    if (asked < stop) {                                                                                        \
      _Pragma("unroll") for (u32 q = 0; q < 4; ++q) {                                                          \
        fetch(to[q] + (slot) * 2048, from[q], past < row_bytes);                                               \
        from[q] += 128;                                                                                        \
      }                                                                                                        \
      _Pragma("unroll") for (u32 q = 0; q < (X_CHUNKS + 32 * ROWS - 1) / (32 * ROWS); ++q) {                   \
        u32 c = (q * ROWS + warp % ROWS) * 32 + lane, token = c / (CODES / 8), chunk = c % (CODES / 8);        \
        u32 at = asked * CODES + chunk * 8;                                                                    \
        if (c < X_CHUNKS)                                                                                      \
          fetch(x_to + ((slot) * X_CHUNKS + token * (CODES / 8) + place_x(token, chunk)) * 16,                 \
                x + min(first + token, m - 1) * k + at, at < k);                                               \
      }                                                                                                        \
      past += 128;                                                                                             \
      ++asked;                                                                                                 \
    }                                                                                                          \
    asm volatile("cp.async.commit_group;" ::: "memory");                                                       \
  }
#pragma unroll
  for (u32 i = 0; i < STAGES - 1; ++i) ASK(i)
#if GROUPED
  float s[2][SCALES], s_next[2][SCALES];
  const float* scale1 = scale + (size_t)(min(warp_row + g, n - 1) >> scale_shift) * groups;
  const float* scale2 = scale + (size_t)(min(warp_row + g + 8, n - 1) >> scale_shift) * groups;
  if (stage < stop) {
    scales_of(s_next[0], scale1, stage, groups);
    scales_of(s_next[1], scale2, stage, groups);
  }
#endif
  u32 lane4 = 4 * lane;
#if KIND == 4
  for (u32 byte = 32 * warp; byte < 256; byte += 32 * WARPS) {
    u32 pair = pair_of(byte + lane);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      u32 p = __shfl_sync(~0u, pair, 4 * i + (lane >> 3));
      ((uint4*)table)[8 * (byte + 4 * i) + lane] = make_uint4(p, p, p, p);
    }
  }
  __syncthreads();
#endif
  // Columns of the product past the last token are never stored: what x they meet is free.
  u32 token = min(g, TOKENS - 1), chunk = place(g, t * WORDS >> 2), odd[2] = {};
  float total[TILES][4] = {};
  u32 slot = 0, ask_slot = STAGES - 1;
  for (; stage < stop; ++stage) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    together(warp / ROWS);
    ASK(ask_slot)  // the slot that was read in the round before
    ask_slot = ask_slot + 1 == STAGES ? 0 : ask_slot + 1;
#if GROUPED
#pragma unroll
    for (u32 i = 0; i < SCALES; ++i) s[0][i] = s_next[0][i], s[1][i] = s_next[1][i];
    if (stage + 1 < stop) {
      scales_of(s_next[0], scale1, stage + 1, groups);
      scales_of(s_next[1], scale2, stage + 1, groups);
    }
#endif
    const u32* line = ring + slot * 512 + g * 32 + (t * WORDS & 3);
    const uint4* x_line = (const uint4*)x_ring + slot * X_CHUNKS + token * (CODES / 8);
#pragma unroll
    for (u32 j = 0; j < SPANS; ++j) {
      u32 words[2][WORDS], a[STEPS][2], b[STEPS][2];
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32* at = line + r * 256 + (chunk ^ (j * WORDS)) * 4;
        if (WORDS == 4) *(uint4*)words[r] = *(const uint4*)at;
        else if (WORDS == 2) *(uint2*)words[r] = *(const uint2*)at;
        else words[r][0] = *at;
      }
      decode(words[0], a, table, lane4, odd[0]);
      decode(words[1], b, table, lane4, odd[1]);
#pragma unroll
      for (u32 tile = 0; tile < TILES; ++tile) {
        u32 xs[LANE / 2];
#pragma unroll
        for (u32 i = 0; i < LANE / 8; ++i)
          ((uint4*)xs)[i] = x_line[tile * CODES + place_x(token, (j * 4 + t) * (LANE / 8) + i)];
#if GROUPED
        float part[4] = {};
#else
        float* part = total[tile];
#endif
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i)
          asm(MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
              : "+f"(part[0]), "+f"(part[1]), "+f"(part[2]), "+f"(part[3])
              : "r"(a[i][0]), "r"(b[i][0]), "r"(a[i][1]), "r"(b[i][1]), "r"(xs[2 * i]), "r"(xs[2 * i + 1]));
#if GROUPED
        float s1 = s[0][j * SCALES / SPANS], s2 = s[1][j * SCALES / SPANS];
        total[tile][0] += part[0] * s1;
        total[tile][1] += part[1] * s1;
        total[tile][2] += part[2] * s2;
        total[tile][3] += part[3] * s2;
#endif
      }
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
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
    ((float4*)sums)[(warp * TILES + tile) * 32 + lane] =
        make_float4(total[tile][0], total[tile][1], total[tile][2], total[tile][3]);
  MEET("release");
  // Entry j of lane (g, t): row g + 8 * (j / 2) of W, token 2 * t + j % 2. Threads go through rows first.
  for (u32 e = rank * 32 * WARPS + threadIdx.x; e < ROWS * 16 * TOKENS; e += CLUSTER * 32 * WARPS) {
    u32 r = e % (16 * ROWS), c = e / (16 * ROWS), target = first_row + r;
    u32 from = (r & 7) * 4 + ((c & 7) >> 1), entry = (r >> 3 & 1) * 2 + (c & 1);
    const float* at = sums + (((r >> 4) * TILES + (c >> 3)) * 32 + from) * 4 + entry;
    float part[CLUSTER * SPLIT], sum = 0;
#pragma unroll
    for (u32 w = 0; w < CLUSTER * SPLIT; ++w) part[w] = shared_of(at + w % SPLIT * ROWS * TILES * 128, w / SPLIT);
#pragma unroll
    for (u32 w = 0; w < CLUSTER * SPLIT; ++w) sum += part[w];
    if (first + c >= m || target >= n) continue;
#if !GROUPED
    sum *= scale[target >> scale_shift];
#endif
    if (has_bias) sum += widen(bias[target]);
    out[(size_t)(first + c) * n + target] = narrow(sum);
  }
#if CLUSTER > 1
  MEET("relaxed");  // the others may still read this block's sums
#endif
}
