// x @ W.T for many rows of x on Hopper's tensor cores; wide.py says how work is shared out and which macros a variant has.
//
// One thread fetches tiles of two factors into a ring of stages (TMA); groups of four warps multiply, each 64 rows of the
// left by RIGHT rows of the right. The `SPLIT` blocks of a cluster share K and add their float32 sums. W is on the left, so
// that 4-bit codes reach the tensor cores through registers, decoded on the way; x is (X_LEFT) where a tile of W has one
// scale: the lane's sums then have two scales of x, not one in every column.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define DEVICE static __device__ __forceinline__

struct alignas(64) Map { char bytes[128]; };  // how TMA reads a matrix

#define LEFT (64 * GROUPS)
#define THREADS (128 * (GROUPS + 1))
#define RIGHT_BYTES (RIGHT * 128)  // of a stage: 128 bytes of each row
#if KIND == 4
#define STEP 64  // elements of K in a stage
#define LEFT_BYTES (LEFT * 32)
#define TABLE_BYTES (256 * 128)  // the pair of each byte, once per 8 bytes of the banks
#else
#define STEP 128
#define LEFT_BYTES (LEFT * 128)
#define TABLE_BYTES 0
#endif
#if GROUPED && KIND != 4
#define PARTS (STEP / GROUPED)  // groups of K with scales of their own in a stage
#else
#define PARTS 0
#endif
#define S_BYTES (X_LEFT ? 0 : PARTS * RIGHT * 4)
#define CHUNK 32  // rows of the right factor whose sums are written at once
#define ORDER 8   // the first of the barriers by which groups take turns
#if X_LEFT
#define PITCH (2 * CHUNK + 16)  // bytes from row to row of the output on its way; 16 more, or rows meet in a bank
#define LEFT_ROWS o.m
#define RIGHT_ROWS o.n
#else
#define PITCH (2 * 64 + 16)
#define LEFT_ROWS o.n
#define RIGHT_ROWS o.m
#endif
#define OUT_BYTES 5120
#define LEFT_AT (STAGES * RIGHT_BYTES)
#define S_AT (LEFT_AT + STAGES * LEFT_BYTES)
#define SUM_BYTES (SPLIT > 1 ? RIGHT * GROUPS * 256 : 0)  // of a block, in the place of the ring
#define RING_BYTES (S_AT + STAGES * S_BYTES)
#define TABLE_AT (RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES)
#define OUT_AT (TABLE_AT + TABLE_BYTES)
#define BARRIERS_AT (OUT_AT + GROUPS * OUT_BYTES)
#if GROUPS == 2
#define PRODUCER_REGISTERS "40"
#define CONSUMER_REGISTERS "232"
#else
#define PRODUCER_REGISTERS "32"
#define CONSUMER_REGISTERS "160"
#endif

#if KIND == 8
typedef u32 Sum;
DEVICE float widen_sum(u32 sum) { return (float)(int)sum; }
#else
typedef float Sum;
#endif
DEVICE float widen_sum(float sum) { return sum; }

#ifdef BF16
DEVICE u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float widen(u16 h) { return __uint_as_float((u32)h << 16); }
#else
DEVICE u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float widen(u16 h) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h)); return r; }
#endif

DEVICE void wait_for(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\n"
               "bra AGAIN;\nDONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE u32 at_rank(u32 address, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
DEVICE void fetch(u32 to, const Map* map, u32 barrier, u32 column, u32 row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
               "r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE void group_barrier(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void group_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// The value is what it is here: nothing that makes or reads it moves past.
DEVICE void keep(float& value) { asm volatile("" : "+f"(value)::"memory"); }
DEVICE void keep(u32& value) { asm volatile("" : "+r"(value)::"memory"); }

// A tile in shared memory as the tensor cores want it described: rows of 128 bytes, eight of them a swizzled kilobyte.
DEVICE u64 described(u32 address) { return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

//@ void mma(sums, left factor, right factor, add to the sums): wide.py writes it, one operand per sum

#if KIND == 4
__constant__ u32 values[16] = {VALUES};
// 32 bytes of codes of a row -> the lane's half of a row for four products of 16 along K: byte `lane % 4` of every word.
DEVICE void decode(u32 (&a)[16], u32 row, u32 eight_on, u32 table, u32 pick, float scale, float scale_on) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 words[8];
    float s = half ? scale_on : scale;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(words[4 * i]), "=r"(words[4 * i + 1]),
                   "=r"(words[4 * i + 2]), "=r"(words[4 * i + 3]) : "r"((half ? eight_on : row) + 16 * i));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float low, high;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(low), "=f"(high)
                   : "r"(table + __byte_perm(words[i], 0, pick) * 128));
      a[4 * (i / 2) + 2 * (i % 2) + half] = pack(low * s, high * s);
    }
  }
}
#endif

struct Arguments {
  Map left, right, scales;
  const float* x_scale;
  const float* w_scale;
  const u16* bias;
  u16* out;
  u32 m, n, k, has_bias, shift, groups, pitch;
};

// The sums of 16 rows of the right factor with the lane's two of the left -> the group's piece of shared memory.
template <typename T>
DEVICE void finish(const T* sums, u32 staged, u32 first, u32 right_row, u32 left_row, const Arguments& o) {
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, packed[4];
#if !X_LEFT
  float bias0 = o.has_bias && left_row < o.n ? widen(o.bias[left_row]) : 0.0f;
  float bias1 = o.has_bias && left_row + 8 < o.n ? widen(o.bias[left_row + 8]) : 0.0f;
#endif
#if KIND != 4 && !GROUPED
  float s0 = left_row < o.n ? __ldg(o.w_scale + (left_row >> o.shift)) : 0.0f;
  float s1 = left_row + 8 < o.n ? __ldg(o.w_scale + (left_row + 8 >> o.shift)) : 0.0f;
#endif
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = widen_sum(sums[4 * j + i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32 row = right_row + 8 * j + 2 * (lane % 4) + i;
#if KIND != 4 && !GROUPED
      float t = row < o.m ? __ldg(o.x_scale + row) : 0.0f;
      v[i] = v[i] * t * s0;
      v[2 + i] = v[2 + i] * t * s1;
#endif
#if X_LEFT
      float bias0 = o.has_bias && row < o.n ? widen(o.bias[row]) : 0.0f, bias1 = bias0;
#endif
      v[i] += bias0;
      v[2 + i] += bias1;
    }
    packed[2 * j] = pack(v[0], v[1]);
    packed[2 * j + 1] = pack(v[2], v[3]);
  }
#if X_LEFT
#define TURNED
  u32 to = staged + (warp * 16 + lane / 8 % 2 * 8 + lane % 8) * PITCH + (first % CHUNK + lane / 16 * 8) * 2;
#else
#define TURNED ".trans"
  u32 to = staged + (first % CHUNK + lane / 16 * 8 + lane % 8) * PITCH + warp * 32 + lane / 8 % 2 * 16;
#endif
  asm volatile("stmatrix.sync.aligned.m8n8.x4" TURNED ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(packed[0]),
               "r"(packed[1]), "r"(packed[2]), "r"(packed[3]) : "memory");
}

// CHUNK rows of the right factor by the group's 64 of the left, from shared memory to `out`.
DEVICE void write_out(u32 staged, u32 right_row, u32 left_row, const Arguments& o) {
#define PIECES (X_LEFT ? CHUNK / 8 : 8)  // 16 bytes each, of a row of `out`
#pragma unroll
  for (int turn = 0; turn < CHUNK * 8 / 128; ++turn) {
    u32 piece = turn * 128 + threadIdx.x % 128;
    u32 row = (X_LEFT ? left_row : right_row) + piece / PIECES;
    u32 column = (X_LEFT ? right_row : left_row) + piece % PIECES * 8;
    u32 v[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(staged + piece / PIECES * PITCH + piece % PIECES * 16));
    if (row < o.m && column < o.n) *(uint4*)(o.out + (u64)row * o.n + column) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(THREADS, 1) multiply_wide(const __grid_constant__ Arguments o) {
  extern __shared__ char dynamic[];
  u32 base = ((u32)__cvta_generic_to_shared(dynamic) + 1023) & ~1023u;
  u32 full = base + BARRIERS_AT, empty = full + 8 * STAGES;
  u32 share = blockIdx.x % SPLIT;
  u32 right_tiles = (RIGHT_ROWS + RIGHT - 1) / RIGHT, left_tiles = (LEFT_ROWS + LEFT - 1) / LEFT;
  u32 tiles = right_tiles * left_tiles;
// Tiles of x follow each other, so that blocks running together share those of W in L2.
#define RIGHT_TILE(tile) (X_LEFT ? (tile) / left_tiles : (tile) % right_tiles)
#define LEFT_TILE(tile) (X_LEFT ? (tile) % left_tiles : (tile) / right_tiles)
  u32 steps = (o.k + STEP - 1) / STEP, per = (steps + SPLIT - 1) / SPLIT;
  u32 begin = min(share * per, steps), end = min(begin + per, steps);
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < STAGES; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * i) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * i), "r"(GROUPS * 4) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#if KIND == 4
  for (u32 i = threadIdx.x; i < 256 * 16; i += THREADS)
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(base + TABLE_AT + 8 * i), "r"(values[i / 256]),
                 "r"(values[i / 16 % 16]) : "memory");
#endif
  __syncthreads();
#if SPLIT > 1
  cluster_barrier();
#endif
  u32 slot = 0, parity = 0;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 " PRODUCER_REGISTERS ";");
    if (threadIdx.x == 0) {
      for (u32 tile = blockIdx.x / SPLIT; tile < tiles; tile += gridDim.x / SPLIT) {
        u32 right_row = RIGHT_TILE(tile) * RIGHT, left_row = LEFT_TILE(tile) * LEFT;
        for (u32 step = begin; step < end; ++step) {
          wait_for(empty + 8 * slot, parity ^ 1);
          u32 ready = full + 8 * slot;
          expect(ready, RIGHT_BYTES + LEFT_BYTES + S_BYTES);
          fetch(base + slot * RIGHT_BYTES, &o.right, ready, step * STEP, right_row);
          fetch(base + LEFT_AT + slot * LEFT_BYTES, &o.left, ready, KIND == 4 ? step * 32 : step * STEP, left_row);
#if PARTS && !X_LEFT
          fetch(base + S_AT + slot * S_BYTES, &o.scales, ready, right_row, step * PARTS);
#endif
          if (++slot == STAGES) { slot = 0; parity ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 " CONSUMER_REGISTERS ";");
    u32 group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    u32 staged = base + OUT_AT + group * OUT_BYTES, row_in_tile = group * 64 + warp * 16 + lane / 4;
#if KIND == 4
    if (group == GROUPS - 1) group_arrive(ORDER, 256);
#endif
    for (u32 tile = blockIdx.x / SPLIT; tile < tiles; tile += gridDim.x / SPLIT) {
      u32 right_row = RIGHT_TILE(tile) * RIGHT, left_tile = LEFT_TILE(tile) * LEFT, left_row = left_tile + row_in_tile;
#define RELEASE(at) \
  __syncwarp();     \
  if (lane == 0) arrive(empty + 8 * (at));
#if PARTS
      float total[RIGHT / 2];
#pragma unroll
      for (int i = 0; i < RIGHT / 2; ++i) total[i] = 0.0f;
#if X_LEFT
      const float* s_at = o.x_scale + min(left_row, o.m - 1);
      const float* t_at = o.x_scale + min(left_row + 8, o.m - 1);
      const float* u_at = o.w_scale + (u64)(min(right_row, o.n - 1) >> o.shift) * o.groups;
      const float* v_at = o.w_scale + (u64)(min(right_row + RIGHT / 2, o.n - 1) >> o.shift) * o.groups;
#else
      const float* s_at = o.w_scale + (u64)(min(left_row, o.n - 1) >> o.shift) * o.groups;
      const float* t_at = o.w_scale + (u64)(min(left_row + 8, o.n - 1) >> o.shift) * o.groups;
#endif
      // While the tensor cores work on one group of K, the sums of the one before are scaled into the total.
      Sum here[RIGHT / 2], next[RIGHT / 2];
      float here_s, here_t, here_u, here_v, next_s, next_t, next_u, next_v;
      u32 ahead = slot, ahead_parity = parity;
#if X_LEFT
#define SCALES(sums, g)                                                                                  \
  sums##_s = __ldg(s_at + (g) * o.pitch), sums##_t = __ldg(t_at + (g) * o.pitch);                        \
  sums##_u = __ldg(u_at + (g)), sums##_v = SAME_SCALE ? sums##_u : __ldg(v_at + (g));
#define SCALED(sums, p)                                                                                  \
  {                                                                                                      \
    float su = sums##_s * sums##_u, tu = sums##_t * sums##_u;                                            \
    float sv = SAME_SCALE ? su : sums##_s * sums##_v, tv = SAME_SCALE ? tu : sums##_t * sums##_v;        \
    _Pragma("unroll") for (int j = 0; j < RIGHT / 8; ++j) {                                              \
      float s = j < RIGHT / 16 ? su : sv, t = j < RIGHT / 16 ? tu : tv;                                  \
      total[4 * j] = fmaf(widen_sum(sums[4 * j]), s, total[4 * j]);                                      \
      total[4 * j + 1] = fmaf(widen_sum(sums[4 * j + 1]), s, total[4 * j + 1]);                          \
      total[4 * j + 2] = fmaf(widen_sum(sums[4 * j + 2]), t, total[4 * j + 2]);                          \
      total[4 * j + 3] = fmaf(widen_sum(sums[4 * j + 3]), t, total[4 * j + 3]);                          \
    }                                                                                                    \
  }
#else
#define SCALES(sums, g) sums##_s = __ldg(s_at + (g)), sums##_t = __ldg(t_at + (g));
#define SCALED(sums, p)                                                                                  \
  {                                                                                                      \
    u32 at = base + S_AT + slot * S_BYTES + (p) * RIGHT * 4 + lane % 4 * 8;                              \
    _Pragma("unroll") for (int j = 0; j < RIGHT / 8; ++j) {                                              \
      float u0, u1;                                                                                      \
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(u0), "=f"(u1) : "r"(at + 32 * j));          \
      total[4 * j] = fmaf(widen_sum(sums[4 * j]), u0 * sums##_s, total[4 * j]);                          \
      total[4 * j + 1] = fmaf(widen_sum(sums[4 * j + 1]), u1 * sums##_s, total[4 * j + 1]);              \
      total[4 * j + 2] = fmaf(widen_sum(sums[4 * j + 2]), u0 * sums##_t, total[4 * j + 2]);              \
      total[4 * j + 3] = fmaf(widen_sum(sums[4 * j + 3]), u1 * sums##_t, total[4 * j + 3]);              \
    }                                                                                                    \
  }
#endif
#define START(sums, step, p)                                                                             \
  {                                                                                                      \
    u32 g = min((step) * PARTS + (p), o.groups - 1); /* past K codes are zero, scales must not be NaN */ \
    SCALES(sums, g)                                                                                      \
    if ((p) == 0) wait_for(full + 8 * ahead, ahead_parity);                                              \
    u64 a = described(base + LEFT_AT + ahead * LEFT_BYTES + group * 64 * 128);                           \
    u64 b = described(base + ahead * RIGHT_BYTES);                                                       \
    mma_fence();                                                                                         \
    _Pragma("unroll") for (int i = (p) * GROUPED / 32; i < ((p) + 1) * GROUPED / 32; ++i)                \
        mma(sums, a + 2 * i, b + 2 * i, i > (p) * GROUPED / 32);                                         \
    mma_commit();                                                                                        \
    if ((p) == PARTS - 1 && ++ahead == STAGES) { ahead = 0; ahead_parity ^= 1; }                         \
  }
#define FINISH(sums, p)                                                                                  \
  {                                                                                                      \
    SCALED(sums, p)                                                                                      \
    if ((p) == PARTS - 1) {                                                                              \
      RELEASE(slot)                                                                                      \
      if (++slot == STAGES) { slot = 0; parity ^= 1; }                                                   \
    }                                                                                                    \
  }
#define SETTLED(sums) \
  _Pragma("unroll") for (int i = 0; i < RIGHT / 2; ++i) keep(sums[i]);
#define BEHIND(now, p, then, q, step) \
  START(then, step, q) mma_wait<1>(); SETTLED(now) FINISH(now, p) SETTLED(total)
#define LAST(now, p) mma_wait<0>(); SETTLED(now) FINISH(now, p)
      if (begin < end) {
        START(here, begin, 0)
        u32 step = begin;
        for (; step + 3 - PARTS < end; step += 3 - PARTS) {
          BEHIND(here, 0, next, PARTS - 1, step + 2 - PARTS)
          BEHIND(next, PARTS - 1, here, 0, step + 3 - PARTS)
        }
        if (step + 2 - PARTS < end) {
          BEHIND(here, 0, next, PARTS - 1, step + 2 - PARTS)
          LAST(next, PARTS - 1)
        } else {
          LAST(here, 0)
        }
      }
#elif KIND == 4
      float total[RIGHT / 2];
#pragma unroll
      for (int i = 0; i < RIGHT / 2; ++i) total[i] = 0.0f;
      const float* s_at = o.w_scale + (u64)min(left_row, o.n - 1) * o.groups;
      const float* t_at = o.w_scale + (u64)min(left_row + 8, o.n - 1) * o.groups;
      u32 table = base + TABLE_AT + lane % 16 * 8, pick = 0x4440 | lane % 4;
      u32 row_at = base + LEFT_AT + row_in_tile * 32;
      u32 here[16], next[16];
      // The scales of a stage are asked for one stage before its codes are decoded.
#define SCALE(at, step) __ldg(at + min((step) * STEP >> o.shift, o.groups - 1))
      float s = SCALE(s_at, begin), t = SCALE(t_at, begin);
#define MULTIPLY(codes, step)                                                              \
  {                                                                                        \
    float s_now = s, t_now = t;                                                            \
    s = SCALE(s_at, (step) + 1), t = SCALE(t_at, (step) + 1);                              \
    wait_for(full + 8 * ahead, ahead_parity);                                              \
    u32 at = row_at + ahead * LEFT_BYTES;                                                  \
    decode(codes, at, at + 8 * 32, table, pick, s_now, t_now);                             \
    u64 b = described(base + ahead * RIGHT_BYTES);                                         \
    group_barrier(ORDER + group, 256);                                                     \
    mma_fence();                                                                           \
    _Pragma("unroll") for (int i = 0; i < 4; ++i) mma(total, codes + 4 * i, b + 2 * i, 1); \
    mma_commit();                                                                          \
    group_arrive(ORDER + (group + 1) % GROUPS, 256);                                       \
    if (++ahead == STAGES) { ahead = 0; ahead_parity ^= 1; }                               \
  }
#define DONE                                         \
  {                                                  \
    RELEASE(slot)                                    \
    if (++slot == STAGES) { slot = 0; parity ^= 1; } \
  }
      // While the tensor cores work on one stage, the codes of the next are decoded. The groups multiply in turn, or they
      // fall in step and all decode at once.
      u32 ahead = slot, ahead_parity = parity;
      if (begin < end) {
        MULTIPLY(here, begin)
        u32 step = begin + 1;
        for (; step + 1 < end; step += 2) {
          MULTIPLY(next, step)
          mma_wait<1>();
          DONE
          MULTIPLY(here, step + 1)
          mma_wait<1>();
          DONE
        }
        if (step < end) {
          MULTIPLY(next, step)
          mma_wait<1>();
          DONE
        }
        mma_wait<0>();
        DONE
      }
#else
      Sum total[RIGHT / 2];
#pragma unroll
      for (int i = 0; i < RIGHT / 2; ++i) total[i] = 0;
      u32 last = slot;
      for (u32 step = begin; step < end; ++step) {
        wait_for(full + 8 * slot, parity);
        u64 a = described(base + LEFT_AT + slot * LEFT_BYTES + group * 64 * 128), b = described(base + slot * RIGHT_BYTES);
        mma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) mma(total, a + 2 * i, b + 2 * i, 1);
        mma_commit();
        mma_wait<1>();
        if (step > begin) { RELEASE(last) }
        last = slot;
        if (++slot == STAGES) { slot = 0; parity ^= 1; }
      }
      mma_wait<0>();
      if (begin < end) { RELEASE(last) }
#endif
#if SPLIT == 1
#pragma unroll
      for (int first = 0; first < RIGHT; first += CHUNK) {
#pragma unroll
        for (int i = 0; i < CHUNK; i += 16)
          finish(total + (first + i) / 2, staged, first + i, right_row + first + i, left_row, o);
        group_barrier(1 + group, 128);
        write_out(staged, right_row + first, left_tile + group * 64, o);
        group_barrier(1 + group, 128);
      }
    }
#else
      // Sums as float32 into the ring, which is free now; every block adds and writes its share of the rows of x.
      group_barrier(1, 128 * GROUPS);
      u32 mine = base + (threadIdx.x - 128) * 16;
#pragma unroll
      for (int i = 0; i < RIGHT / 8; ++i)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(mine + i * (GROUPS * 128 * 16)),
                     "f"(widen_sum(total[4 * i])), "f"(widen_sum(total[4 * i + 1])),
                     "f"(widen_sum(total[4 * i + 2])), "f"(widen_sum(total[4 * i + 3])) : "memory");
      cluster_barrier();
      for (u32 first = share * CHUNK; first < RIGHT; first += SPLIT * CHUNK) {
#pragma unroll
        for (int i = 0; i < CHUNK; i += 16) {
          float v[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int from = 0; from < SPLIT; ++from) {
            u32 there = at_rank(mine + (first + i) / 8 * (GROUPS * 128 * 16), from);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float p[4];
              asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(p[0]), "=f"(p[1]), "=f"(p[2]),
                           "=f"(p[3]) : "r"(there + j * (GROUPS * 128 * 16)));
#pragma unroll
              for (int e = 0; e < 4; ++e) v[4 * j + e] += p[e];
            }
          }
          finish((const float*)v, staged, first + i, right_row + first + i, left_row, o);
        }
        group_barrier(1 + group, 128);
        write_out(staged, right_row + first, left_tile + group * 64, o);
        group_barrier(1 + group, 128);
      }
    }
#endif
  }
#if SPLIT > 1
  if (threadIdx.x < 128) cluster_barrier();
#endif
#if SPLIT > 1
  cluster_barrier();  // what others read here or signal to here must find it
#endif
}
