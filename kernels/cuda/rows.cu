// A row at a time to INT8 or FP8: read or decoded, rotated 256 by 256 where ROTATE, q = round(v * (qmax / absmax)); rows.py says which
// macros a variant has.
//
// A block holds a row in registers, 256 elements of it per warp at a time, of which a lane has 8 neighbours. The rotation
// is H4 along each of the four base-4 digits d3 d2 d1 d0 of an element's index. A lane's 8 are d0 and the low bit of d1;
// lanes differ in d3, d2 and the high bit of d1. One product of 16 x 16 signs takes d2 and d0, the next d3 and d1: what the
// first leaves in a lane is what the second wants there, and its sums lie as the elements did.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
#define DEVICE static __device__ __forceinline__

#define X16 0    // STORED: floats of 16 bits
#define FLAT4 1  // two codes in a byte, the high nibble first, a float scale per group
#define NVFP4 2  // the same with swizzled e4m3 scales of 16 and one of all
#define W4A8 3   // the low nibble first, e4m3 scales of 16 in steps of the row's: INT8 already, and rotated
#define TILES8 4 // INT8 codes with a grid of float scales
#define TILES9 5 // e4m3 codes with one
#define MXFP8 6  // e4m3 codes with swizzled exponents of 32
#define NIBBLES (STORED == FLAT4 || STORED == NVFP4 || STORED == W4A8)
#define PER ((CHUNKS + WARPS - 1) / WARPS)  // chunks of a warp
#if FLOAT8
#define QMAX 448.0f
#else
#define QMAX 127.0f
#endif
#if STORED == X16
#define WORDS 4  // of 32 bits that hold the lane's 8 elements
#elif NIBBLES
#define WORDS 1
#else
#define WORDS 2
#endif

struct Arguments {
  const u8* stored;
  const void* scale;
  const float* whole;  // NVFP4: the scale of all; W4A8: of the rows
  const float* levels;
  u8* codes;
  float* scales;
  u64 pitch;  // bytes from row to row of `stored`
  u32 across, rows_shift;  // scales in a row of their grid; from a row to its row of the grid
};

#ifdef BF16
DEVICE float low_half(u32 w) { return __uint_as_float(w << 16); }
DEVICE float high_half(u32 w) { return __uint_as_float(w & 0xffff0000u); }
#else
DEVICE float low_half(u32 w) {
  float r;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(w));
  return r;
}
DEVICE float high_half(u32 w) { return low_half(w >> 16); }
#endif

DEVICE u32 pack_halves(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// e4m3fn to float32: its bits in place give 2^-120 times the value; NaN is 0x7f.
DEVICE float widen_e4m3(u32 byte) {
  float value = __uint_as_float((byte & 0x7f) << 20) * 0x1p120f;
  if ((byte & 0x7f) == 0x7f) value = __uint_as_float(0x7fc00000u);
  return __uint_as_float(__float_as_uint(value) | (byte & 0x80) << 24);
}

// Two e4m3fn codes, the low bytes of a word, as float16.
DEVICE u32 halves_of_e4m3(u32 word) {
#if __CUDA_ARCH__ >= 890
  u32 r;
  asm("{.reg .b16 l; cvt.u16.u32 l, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(r) : "r"(word));
  return r;
#else
  return pack_halves(widen_e4m3(word & 255), widen_e4m3(word >> 8 & 255));
#endif
}

// Two INT8 codes, bytes `first` and `first` + 1 of a word whose signs are flipped, as float16: 0x6400 is 1024.
DEVICE u32 halves_of_int8(u32 flipped, u32 first) {
  u32 r, biased = __byte_perm(flipped, 0x64646464u, 0x4040 | first | (first + 1) << 8);
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(biased), "r"(0x64806480u));
  return r;
}

DEVICE u32 times(u32 halves, u32 factor) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(halves), "r"(factor));
  return r;
}

DEVICE float larger(float a, float b) {  // of a and |b|; NaN stays
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(fabsf(b)));
  return r;
}

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %10, %10, %10};" : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

DEVICE u32 sign_of(u32 i, u32 j, u32 k, u32 l) {  // of H4[i][j] * H4[k][l], as float16 +-1
  return 0x3c00u | ((i + j == 3) ^ (k + l == 3)) << 15;
}

// Rows and columns of the two sign matrices are counted as the lanes hold them: of 16, slot 2 q + e has d0 = e and slot
// 8 + 2 q + e has d0 = 2 + e, both d2 = q; and slot 8 j + g has d1 = 2 (g % 2) + j, d3 = g / 2.
DEVICE u32 first_sign(u32 row, u32 column) {
  return sign_of(row % 8 / 2, column % 8 / 2, row / 8 * 2 + row % 2, column / 8 * 2 + column % 2);
}
DEVICE u32 second_sign(u32 row, u32 column) {
  return sign_of(row % 8 / 2, column % 8 / 2, row % 2 * 2 + row / 8, column % 2 * 2 + column / 8);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) make_rows(const __grid_constant__ Arguments o) {
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  u64 row = blockIdx.x;
  u32 first = 64 * (g / 2) + 16 * q + 8 * (g % 2);  // of the lane's 8 in a chunk
  __shared__ u32 warps_largest[WARPS];
#if NIBBLES
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = o.levels[threadIdx.x];
#endif
  u32 words[PER][WORDS];
  float scale[PER];
  const u8* at = o.stored + row * o.pitch;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    u32 chunk = warp + i * WARPS, element = chunk * 256 + first;
    scale[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < WORDS; ++j) words[i][j] = 0;
    if (CHUNKS % WARPS == 0 || chunk < CHUNKS) {
#if STORED == X16
      uint4 w = *(const uint4*)(at + element * 2);
      words[i][0] = w.x, words[i][1] = w.y, words[i][2] = w.z, words[i][3] = w.w;
#elif NIBBLES
      words[i][0] = *(const u32*)(at + element / 2);
#else
      uint2 w = *(const uint2*)(at + element);
      words[i][0] = w.x, words[i][1] = w.y;
#endif
      u32 column = element >> SHIFT;
#if STORED == FLAT4 || STORED == TILES8 || STORED == TILES9
      scale[i] = ((const float*)o.scale)[(row >> o.rows_shift) * o.across + column];
#elif STORED == W4A8
      scale[i] = widen_e4m3(((const u8*)o.scale)[row * o.across + column]);
#elif STORED == NVFP4 || STORED == MXFP8
      u64 place = ((row / 128) * (o.across / 4) + column / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + column % 4;
      u32 byte = ((const u8*)o.scale)[place];
#if STORED == NVFP4
      scale[i] = o.whole[0] * widen_e4m3(byte);
#else
      scale[i] = __uint_as_float(byte << 23);  // a power of two by its exponent; byte 0 marks a block of zeros
#endif
#endif
    }
  }
#if NIBBLES
  __syncthreads();
#endif
#if ROTATE
  u32 a[4], b[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 r = g + i % 2 * 8, c = 2 * q + i / 2 * 8;
    a[i] = first_sign(r, c) | first_sign(r, c + 1) << 16;
    b[i] = second_sign(r, c) | second_sign(r, c + 1) << 16;
  }
#endif
  float v[PER][8], back[PER], most = 0.0f;  // elements are v times back
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    back[i] = 1.0f;
#if STORED == X16
#pragma unroll
    for (int e = 0; e < 8; ++e) v[i][e] = e % 2 ? high_half(words[i][e / 2]) : low_half(words[i][e / 2]);
#elif STORED == W4A8
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float steps = rintf(__fmul_rn(table[words[i][0] >> 4 * e & 15], scale[i]));
      v[i][e] = steps > 127.0f ? 127.0f : steps < -127.0f ? -127.0f : steps;
    }
    most = larger(most, scale[i]);
#endif
#if ROTATE
    // The power of two that brings the chunk's largest element, or scale, into [1, 2): float16 then keeps 11 bits.
    float here = 0.0f;
#if STORED == X16
#pragma unroll
    for (int e = 0; e < 8; ++e) here = larger(here, v[i][e]);
#else
    here = larger(here, scale[i]);
#endif
    u32 exponent = __reduce_max_sync(0xffffffffu, __float_as_uint(here)) & 0x7f800000u;
    float power = __int_as_float(max(0x7f000000 - (int)exponent, 0x00400000));
    back[i] = __uint_as_float(exponent) * 0.0625f;  // 1 / sqrt(256) with it; subnormal ones are 0
    u32 half[4];
#if STORED == X16
#pragma unroll
    for (int e = 0; e < 4; ++e) half[e] = pack_halves(v[i][2 * e] * power, v[i][2 * e + 1] * power);
#elif NIBBLES
    float s = scale[i] * power;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      half[e] = pack_halves(table[words[i][0] >> (8 * e + 4) & 15] * s, table[words[i][0] >> 8 * e & 15] * s);
#else
    u32 s = pack_halves(scale[i] * power, scale[i] * power);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#if STORED == TILES8
      half[e] = times(halves_of_int8(words[i][e / 2] ^ 0x80808080u, 2 * (e % 2)), s);
#else
      half[e] = times(halves_of_e4m3(words[i][e / 2] >> 16 * (e % 2)), s);
#endif
    }
#endif
    float low[4], high[4], left[4], right[4];
    multiply(low, a, half[0], half[1]);
    multiply(high, a, half[2], half[3]);
    multiply(left, b, pack_halves(low[0], low[1]), pack_halves(high[0], high[1]));
    multiply(right, b, pack_halves(low[2], low[3]), pack_halves(high[2], high[3]));
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      v[i][e] = left[e], v[i][2 + e] = right[e], v[i][4 + e] = left[2 + e], v[i][6 + e] = right[2 + e];
    }
#endif
#if STORED != W4A8
    float chunk_most = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) chunk_most = larger(chunk_most, v[i][e]);
    most = larger(most, chunk_most * back[i]);
#endif
  }
  u32 largest = __float_as_uint(most);  // ordered as the numbers are, NaN above all
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (lane == 0) warps_largest[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i) largest = max(largest, warps_largest[i]);
  float absmax = __uint_as_float(largest), inverse = 1.0f;
#if STORED == W4A8
  if (threadIdx.x == 0) o.scales[row] = largest > 0x7f800000u ? absmax : o.whole[row];
#else
  bool zero = absmax < 0x1p-80f;  // of NaN false
  inverse = zero ? 0.0f : __fdiv_rn(QMAX, absmax);
  if (threadIdx.x == 0) o.scales[row] = zero ? 1.0f : __fdiv_rn(absmax, QMAX);
#endif
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    u32 chunk = warp + i * WARPS, out[2];
    float factor = back[i] * inverse;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#if FLOAT8
      u32 r[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        asm("{.reg .b16 l; cvt.rn.satfinite.e4m3x2.f32 l, %1, %2; cvt.u32.u16 %0, l;}" : "=r"(r[e])
            : "f"(v[i][4 * j + 2 * e + 1] * factor), "f"(v[i][4 * j + 2 * e] * factor));
      out[j] = r[0] | r[1] << 16;
#else
      // 1.5 * 2^23: float32 has no fraction bits there, and the low byte of its bits is the nearest integer.
      u32 r[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) r[e] = __float_as_uint(fmaf(v[i][4 * j + e], factor, 12582912.0f));
      out[j] = __byte_perm(__byte_perm(r[0], r[1], 0x0040), __byte_perm(r[2], r[3], 0x0040), 0x5410);
#endif
    }
    if (CHUNKS % WARPS == 0 || chunk < CHUNKS) *(uint2*)(o.codes + row * (CHUNKS * 256) + chunk * 256 + first) = make_uint2(out[0], out[1]);
  }
}
