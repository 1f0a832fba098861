// The selective scan of Mamba-1 forward and backward, for NVIDIA GPUs. The equations, and the names of their
// quantities, are in selective_scan.py; scan_cuda.py compiles this file at run time and launches its kernels. Inputs
// and outputs are float32, bfloat16 or float16; all arithmetic is float32.
//
// Macros, which scan_cuda.py gives to the compiler:
//   D_INNER, N_STATE     channels, and states per channel
//   IO                   dtype of u, delta, z, B, C, y and their gradients: 0 float32, 1 bfloat16, 2 float16
//   ALIGNED              1 where a lane's two neighbouring channels (four, with BACKWARD_PAIRS 2), and eight numbers of
//                        B and C, can be loaded at once
//   U_STEP, ...          for each of these tensors, how many numbers one step lies behind the other
//   BACKWARD             0: the kernels of the forward pass; 1: those of the backward pass
//   CHUNK                steps between two states that the forward pass saves for the backward pass
//   BACKWARD_STEPS       steps of which the backward pass holds states and decays in registers
//   BACKWARD_PAIRS       pairs of channels per lane of the backward pass, 1 or, with bfloat16, 2
//   BACKWARD_WARPS       warps per block of the backward pass; BACKWARD_BLOCKS: its blocks per multiprocessor
//
// Who holds what, and words for it:
//   block   one sequence, one split of it, and neighbouring channels. Its warps share B and C of a chunk of steps, in
//           shared memory. The backward pass also adds up dB and dC over its channels.
//   split   a part of the sequence's time, whole chunks. There is only one unless the batch is small.
//   warp    8 or 16 of the block's channels.
//   lane    4 p + q, with p from 0 to 7 and q from 0 to 3. Forward it holds channel p, or p and p + 8, and of each the
//           F_STATES states from F_STATES q on; backward the OWN channels (2 or 4) from OWN q on, and of each the
//           STATES states from STATES p on. States never leave the registers of their lane, but at the ends of chunks.
//   octet   8 steps. What depends on step and channel only (dt, v, silu(z), y, ...) is computed for 8 steps at a time,
//           so that each lane has two of the 8 x 8 or 8 x 16 pairs, or four: `own` is what belongs to this lane.
//   piece   BACKWARD_STEPS steps.
//   A2      A log2(e), so that the decay a is 2^(dt A2)
//   Ch, dv, eA2   the sums over states C . h, dh . B and de . A2; do_ is do, which C++ doesn't allow as a name
//   dBC     terms of dB and dC side by side
//
// Time goes into one exponential and a dozen multiply-adds per state and step, so what counts is how few other
// instructions there are beside these: above all for the sums over states (Ch, dv, eA2) and over channels (dB, dC).
// With bfloat16 inputs (FAST) all these are taken by the tensor cores, which need compute capability 8.0 and whose
// operands happen to lie in registers exactly as a scan needs them: lane 4 p + q holds row p and column q of a tile.
// The products are then of numbers with 11 bits (tf32), or 8 bits where partial sums are exchanged as bfloat16, and the
// sums are float32. With other inputs the sums are exact float32, by shuffles.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define FAST (IO == 1)
#if IO == 0
typedef float io_t;
#else
typedef u16 io_t;
#endif
#if IO == 1
typedef u16 state_t;  // saved states, and the partial sums of dB and dC, see chunk_states_dtype in scan_cuda.py
#else
typedef float state_t;
#endif

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#endif
DEVICE constexpr int power_of_2(int n, int p) { return p >= n ? p : power_of_2(n, 2 * p); }
constexpr int N = power_of_2(N_STATE, 16);  // states per channel, padded
constexpr u32 ALL = 0xffffffffu;  // lanes of a warp
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// ---- conversions, elementary functions and tensor cores --------------------------------------------------------

#ifndef EMULATED
DEVICE float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 pack_bf16(float low, float high) {
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DEVICE float from_f16(u16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
DEVICE u16 to_f16(float x) { u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
// A pointer to global memory, that the compiler then keeps, and doesn't put together again wherever it is used.
template <typename T> DEVICE T *settled(T *p) {
    size_t x = __cvta_generic_to_global(p);
    asm("" : "+l"(x));
    return (T *)__cvta_global_to_generic(x);
}
DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// d (16 x 8) += a (16 x 8) b (8 x 8). Lane 4 p + q holds a[p][q], a[p+8][q], a[p][q+4], a[p+8][q+4]; b[q][p],
// b[q+4][p]; d[p][2q], d[p][2q+1], d[p+8][2q], d[p+8][2q+1]. The lower 13 bits of a and b are ignored.
DEVICE void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// The same for bfloat16, a (16 x 16) and b (16 x 8): lane 4 p + q holds a[p][2q, 2q+1], a[p+8][2q, 2q+1],
// a[p][2q+8, 2q+9], a[p+8][2q+8, 2q+9]; b[2q, 2q+1][p], b[2q+8, 2q+9][p]; d as above.
DEVICE void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The transpose of an 8 x 8 matrix of 16-bit numbers, of which lane 4 p + q holds [p][2q, 2q+1].
DEVICE u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
#endif

DEVICE float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE float load(const float *p) { return *p; }
DEVICE void store(float *p, float x) { *p = x; }
DEVICE float load(const u16 *p) { return IO == 2 ? from_f16(*p) : from_bf16(*p); }
DEVICE void store(u16 *p, float x) { *p = IO == 2 ? to_f16(x) : (u16)pack_bf16(x, 0.0f); }
DEVICE float load_if(bool inside, const io_t *p) {
    io_t x = 0;
    if (inside) x = *p;
    return load(&x);
}

// z as both passes take it. With bfloat16 the backward pass gets C . h + D u out of y = (C . h + D u) silu(z), which
// must not be 0 because z is. The number that is added is too small for any z to which it isn't, and lies between two
// bfloat16 numbers, so that no sum is 0: the smallest is 2^-69, and y is then still far from underflow.
DEVICE float gate_input(float z) { return FAST ? z + 0x1.008p-60f : z; }

// Two neighbouring channels as they lie in memory, and as numbers.
#if IO == 0
typedef float2 pair_t;
#else
typedef u32 pair_t;
#endif
DEVICE pair_t load_pair(bool first, bool second, const io_t *p) {
#if IO == 0
    return make_float2(first ? p[0] : 0.0f, second ? p[1] : 0.0f);
#else
    u32 x = 0;
    if (ALIGNED) {
        if (first) x = *(const u32 *)p;
    } else {
        if (first) x = p[0];
        if (second) x |= (u32)p[1] << 16;
    }
    return x;
#endif
}
DEVICE float2 numbers(pair_t x) {
#if IO == 0
    return x;
#elif IO == 1
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
#else
    return make_float2(from_f16(x & 0xffffu), from_f16(x >> 16));
#endif
}
DEVICE void store_pair(bool first, bool second, io_t *p, float x, float y) {
    if (ALIGNED && IO > 0) {
        if (first) *(u32 *)p = IO == 1 ? pack_bf16(x, y) : (u32)to_f16(x) | (u32)to_f16(y) << 16;
    } else {
        if (first) store(p, x);
        if (second) store(p + 1, y);
    }
}
DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_(-x * LOG2E)); }

// softplus(x), and its derivative in `slope`. exp(-|x|), from which both are made, cannot overflow.
DEVICE float softplus(float x, float &slope) {
    float e = exp2_(-fabsf(x) * LOG2E), r = reciprocal(1.0f + e);
    // p is log1p(e) / e on [0, 1], interpolated at Chebyshev points: relative error 2e-7. log(1 + e) would lose the
    // digits of the small dt that Mamba starts from.
    float p = -0.029074065387f + e * 0.0051261018962f;
    p = 0.077516086400f + e * p;
    p = -0.13602247834f + e * p;
    p = 0.19076880813f + e * p;
    p = -0.24835398793f + e * p;
    p = 0.33318120241f + e * p;
    p = -0.49999445677f + e * p;
    p = 0.99999994040f + e * p;
    slope = x >= 0.0f ? r : e * r;
    return fmaxf(x, 0.0f) + e * p;
}

template <int COUNT> DEVICE void load_row(float (&x)[COUNT], const float *p) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int j = 0; j < COUNT; j += 4) {
            float4 v = *(const float4 *)(p + j);
            x[j] = v.x, x[j + 1] = v.y, x[j + 2] = v.z, x[j + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; j += 2) {
            float2 v = *(const float2 *)(p + j);
            x[j] = v.x, x[j + 1] = v.y;
        }
    }
}

template <int COUNT> DEVICE void store_row(float *p, const float (&x)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int j = 0; j < COUNT; j += 4) *(float4 *)(p + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; j += 2) *(float2 *)(p + j) = make_float2(x[j], x[j + 1]);
    }
}

// COUNT states of one channel from n on, to or from the saved states or the starts; zero beyond N_STATE.
template <int COUNT, typename T> DEVICE void load_states(float (&h)[COUNT], const T *p, int n, bool inside) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) h[j] = 0.0f;
    if (!inside) return;
    if constexpr (sizeof(T) == 2 && N == N_STATE) {
#pragma unroll
        for (int j = 0; j < COUNT; j += 2) {
            u32 x = *(const u32 *)(p + n + j);
            h[j] = __uint_as_float(x << 16), h[j + 1] = __uint_as_float(x & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            if (N > N_STATE && n + j >= N_STATE) continue;
            h[j] = sizeof(T) == 2 ? from_bf16(*(const u16 *)(p + n + j)) : *(const float *)(p + n + j);
        }
    }
}
template <int COUNT, typename T> DEVICE void store_states(T *p, int n, const float (&h)[COUNT]) {
    if constexpr (sizeof(T) == 2 && N == N_STATE) {
        u32 x[COUNT / 2];
#pragma unroll
        for (int j = 0; j < COUNT; j += 2) x[j / 2] = pack_bf16(h[j], h[j + 1]);
        if constexpr (COUNT % 8 == 0) {
#pragma unroll
            for (int j = 0; j < COUNT; j += 8)
                *(uint4 *)(p + n + j) = make_uint4(x[j / 2], x[j / 2 + 1], x[j / 2 + 2], x[j / 2 + 3]);
        } else {
#pragma unroll
            for (int j = 0; j < COUNT; j += 2) *(u32 *)(p + n + j) = x[j / 2];
        }
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            if (N == N_STATE || n + j < N_STATE) {
                if constexpr (sizeof(T) == 2) p[n + j] = (u16)pack_bf16(h[j], 0.0f);
                else p[n + j] = h[j];
            }
    }
}

// Rows first ... first + ROWS - 1 of B or C into shared memory as float32, zero from `end` on and beyond N_STATE.
template <int THREADS, int STEP, int ROWS> DEVICE void stage_rows(float *to, const io_t *from, int first, int end) {
#if ALIGNED && IO > 0
    constexpr int VECTORS = N / 8, TAKEN = THREADS / VECTORS;  // 16 bytes each; rows that the block takes at once
    const int row = threadIdx.x / VECTORS, column = threadIdx.x % VECTORS * 8;
    if (THREADS % VECTORS == 0 || row < TAKEN) {
#pragma unroll
        for (int k = 0; k < ROWS; k += TAKEN) {
            const int r = row + k;
            if (ROWS % TAKEN && r >= ROWS) break;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (first + r < end) x = *(const uint4 *)(from + (u32)((first + r) * STEP + column));
            const float2 a = numbers(x.x), b = numbers(x.y), c = numbers(x.z), d = numbers(x.w);
            *(float4 *)(to + r * N + column) = make_float4(a.x, a.y, b.x, b.y);
            *(float4 *)(to + r * N + column + 4) = make_float4(c.x, c.y, d.x, d.y);
        }
    }
    return;
#endif
    constexpr int WIDTH = THREADS < N ? THREADS : N;  // columns that the block takes at once
    const int own = threadIdx.x / WIDTH, n = threadIdx.x % WIDTH;
    from += (u32)((first + own) * STEP + n);
    to += own * N + n;
#pragma unroll
    for (int k = 0; k < ROWS; k += THREADS / WIDTH)
#pragma unroll
        for (int column = 0; column < N; column += WIDTH)
            to[k * N + column] = load_if(first + own + k < end && n + column < N_STATE, from + k * STEP + column);
}

// A block's group of channels, split, its first step and its end, and sequence.
struct Place { int group, split, start, end; i64 batch; };

// Neighbouring blocks have neighbouring groups, because these share rows of B and C, and cache lines of u, delta and z.
DEVICE Place place(int groups, int splits, int split_len, int time) {
    Place x;
    int b = blockIdx.x;
    x.group = b % groups, x.split = b / groups % splits, x.batch = b / (groups * splits);
    x.start = x.split * split_len;
    x.end = min(x.start + split_len, time);
    return x;
}

// ---- forward ---------------------------------------------------------------------------------------------------

struct ForwardArgs {
    const io_t *u, *delta, *z, *B, *C;
    const float *A, *D, *delta_bias, *starts;
    io_t *y;
    state_t *states;
    float *h_last, *dt_sums;
    i64 u_batch, delta_batch, z_batch, B_batch, C_batch;
    int time, groups, splits, split_len;
};

// What a pass in the order of the forward pass is for. FORWARD: the outputs y and the states before each chunk.
// SPLIT_ENDS: the state at the end of each split as if it had started from zero, in h_last, and the sum of its dt,
// which gives its decay. SPLIT_ENDS_REVERSED: the same for the carry, from the split's last step to its first; u is dy
// and B is C then.
enum { FORWARD, SPLIT_ENDS, SPLIT_ENDS_REVERSED };

constexpr int F_ROWS = N <= 32 ? 2 : 1, F_STATES = N / 4, F_WARPS = 4, F_CHANNELS = F_WARPS * 8 * F_ROWS;
constexpr int F_STAGED = N <= 64 ? CHUNK : 8;  // steps of which B and C lie in shared memory

// What a lane holds all the time: of its F_ROWS channels and F_STATES states of each.
struct ForwardLane {
    float A2[F_ROWS][F_STATES], h[F_ROWS][F_STATES], skip[F_ROWS], bias[F_ROWS], dt_sum[F_ROWS];
    int channel[F_ROWS];
    bool inside[F_ROWS];  // whether the channel exists
};
// What it holds for 8 steps: of its channels and its own two of these steps.
struct ForwardSteps { float u[F_ROWS][2], silu_z[F_ROWS][2], Ch[F_ROWS][2]; };

// What a lane starts from.
template <int MODE> DEVICE void begin(ForwardLane &own, const ForwardArgs &a, int first_channel, i64 split_row, int q) {
#pragma unroll
    for (int i = 0; i < F_ROWS; i++) {
        own.channel[i] = first_channel + 8 * i;
        own.inside[i] = own.channel[i] < D_INNER;
        load_states(own.A2[i], a.A + own.channel[i] * N_STATE, q * F_STATES, own.inside[i]);
        load_states(own.h[i], a.starts + (split_row + own.channel[i]) * N_STATE, q * F_STATES,
                    own.inside[i] && a.starts != 0);
#pragma unroll
        for (int j = 0; j < F_STATES; j++) own.A2[i][j] *= LOG2E;
        own.skip[i] = own.inside[i] && MODE == FORWARD ? a.D[own.channel[i]] : 0.0f;
        own.bias[i] = own.inside[i] ? a.delta_bias[own.channel[i]] : 0.0f;
        own.dt_sum[i] = 0.0f;
    }
}

// dt and v of 8 steps, into the warp's shared memory, and what this lane needs of them again.
template <int MODE> DEVICE void step_sizes(ForwardLane &own, ForwardSteps &steps, float2 (&dt_v)[8][8 * F_ROWS],
                                           const io_t *u, const io_t *delta, const io_t *z, u32 first, int end, int p,
                                           int q) {
    constexpr int X_STEP = MODE == SPLIT_ENDS_REVERSED ? DY_STEP : U_STEP;
#pragma unroll
    for (int i = 0; i < F_ROWS; i++)
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const bool valid = own.inside[i] && first + s < end;
            float slope;
            steps.u[i][s] = load_if(valid, u + s * X_STEP + 8 * i);
            float dt = load_if(valid, delta + s * DELTA_STEP + 8 * i);
            dt = valid ? softplus(dt + own.bias[i], slope) : 0.0f;
            if (MODE != SPLIT_ENDS) {
                const float z_own = gate_input(load_if(valid, z + s * Z_STEP + 8 * i));
                steps.silu_z[i][s] = z_own * sigmoid(z_own);
            }
            const float v = steps.u[i][s] * (MODE == SPLIT_ENDS_REVERSED ? steps.silu_z[i][s] : dt);
            own.dt_sum[i] += dt;
            dt_v[2 * q + s][p + 8 * i] = make_float2(dt, v);
        }
}

// C . h of this lane's channels, over the states of the four lanes that share them.
DEVICE void output_sums(float (&Ch)[F_ROWS], const float (&h)[F_ROWS][F_STATES], const float *C) {
    float C_k[F_STATES];
    load_row(C_k, C);
    if (FAST) {
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < F_STATES; j += 2)
            mma_tf32(d, h[0][j], F_ROWS == 2 ? h[F_ROWS - 1][j] : 0.0f, h[0][j + 1],
                     F_ROWS == 2 ? h[F_ROWS - 1][j + 1] : 0.0f, C_k[j], C_k[j + 1]);
#pragma unroll
        for (int i = 0; i < F_ROWS; i++) Ch[i] = d[2 * i];
    } else {
#pragma unroll
        for (int i = 0; i < F_ROWS; i++) {
            Ch[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < F_STATES; j++) Ch[i] += h[i][j] * C_k[j];
            Ch[i] += __shfl_xor_sync(ALL, Ch[i], 1);
            Ch[i] += __shfl_xor_sync(ALL, Ch[i], 2);
        }
    }
}

// Eight steps of the recurrence h = a h + v B; with FORWARD, C . h is kept by the lane whose steps these are.
template <int MODE> DEVICE void eight_steps(ForwardLane &own, ForwardSteps &steps,
                                            const float2 (&dt_v)[8][8 * F_ROWS], const float *B, const float *C,
                                            int p, int q) {
#pragma unroll
    for (int k8 = 0; k8 < 8; k8++) {
        const int k = MODE == SPLIT_ENDS_REVERSED ? 7 - k8 : k8;
        float dt[F_ROWS], v[F_ROWS], B_k[F_STATES];
#pragma unroll
        for (int i = 0; i < F_ROWS; i++) {
            float2 x = dt_v[k][p + 8 * i];
            dt[i] = x.x, v[i] = x.y;
        }
        load_row(B_k, B + k * N);
#pragma unroll
        for (int i = 0; i < F_ROWS; i++)
#pragma unroll
            for (int j = 0; j < F_STATES; j++) {
                float decay = exp2_(dt[i] * own.A2[i][j]);
                if (MODE == SPLIT_ENDS_REVERSED) own.h[i][j] = (own.h[i][j] + v[i] * B_k[j]) * decay;
                else own.h[i][j] = decay * own.h[i][j] + v[i] * B_k[j];
            }
        if (MODE == FORWARD) {
            float Ch[F_ROWS];
            output_sums(Ch, own.h, C + k * N);
#pragma unroll
            for (int i = 0; i < F_ROWS; i++)
                if (k8 < 2 || q == k8 / 2) steps.Ch[i][k8 % 2] = Ch[i];
        }
    }
}

// The states at the end, and the sums of dt over the split.
template <int MODE> DEVICE void finish(ForwardLane &own, const ForwardArgs &a, const Place &at, i64 split_row, int q) {
    const bool has_end = MODE != FORWARD || at.split == a.splits - 1;
    const i64 row = MODE == FORWARD ? at.batch * D_INNER : split_row;
#pragma unroll
    for (int i = 0; i < F_ROWS; i++) {
        if (has_end && own.inside[i])
            store_states(a.h_last + (row + own.channel[i]) * N_STATE, q * F_STATES, own.h[i]);
        if (MODE != FORWARD) {
            own.dt_sum[i] += __shfl_xor_sync(ALL, own.dt_sum[i], 1);
            own.dt_sum[i] += __shfl_xor_sync(ALL, own.dt_sum[i], 2);
            if (q == 0 && own.inside[i]) a.dt_sums[split_row + own.channel[i]] = own.dt_sum[i];
        }
    }
}

// The states before a chunk, for the backward pass.
DEVICE void keep_states(const ForwardLane &own, const ForwardArgs &a, const Place &at, int chunk_start, int q) {
#pragma unroll
    for (int i = 0; i < F_ROWS; i++)
        if (own.inside[i]) {
            const i64 saved = at.batch * ((a.time + CHUNK - 1) / CHUNK) + chunk_start / CHUNK;
            store_states(a.states + (saved * D_INNER + own.channel[i]) * N_STATE, q * F_STATES, own.h[i]);
        }
}

// y = (C . h + D u) silu(z) of this lane's channels and steps, t and t + 1.
DEVICE void outputs(io_t *y, const ForwardLane &own, const ForwardSteps &steps, int t, int end) {
#pragma unroll
    for (int i = 0; i < F_ROWS; i++)
#pragma unroll
        for (int s = 0; s < 2; s++)
            if (own.inside[i] && t + s < end)
                store(y + s * D_INNER + 8 * i,
                      (steps.Ch[i][s] + own.skip[i] * steps.u[i][s]) * steps.silu_z[i][s]);
}

template <int MODE> DEVICE void forward_pass(const ForwardArgs &a) {
    constexpr int X_STEP = MODE == SPLIT_ENDS_REVERSED ? DY_STEP : U_STEP;
    constexpr int ROW_STEP = MODE == SPLIT_ENDS_REVERSED ? C_STEP : B_STEP;
    __shared__ __align__(16) float sB[F_STAGED * N], sC[MODE == FORWARD ? F_STAGED * N : 4];
    __shared__ __align__(16) float2 dt_v[F_WARPS][8][8 * F_ROWS];
    const Place at = place(a.groups, a.splits, a.split_len, a.time);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, p = lane / 4, q = lane % 4;
    const int first_channel = at.group * F_CHANNELS + warp * 8 * F_ROWS + p;  // this lane's
    const io_t *u = a.u + at.batch * a.u_batch, *delta = a.delta + at.batch * a.delta_batch;
    const io_t *z = a.z + at.batch * a.z_batch, *B = a.B + at.batch * a.B_batch;
    const io_t *C = MODE == FORWARD ? a.C + at.batch * a.C_batch : 0;
    io_t *y = MODE == FORWARD ? a.y + at.batch * a.time * D_INNER : 0;
    const i64 split_row = (at.batch * a.splits + at.split) * D_INNER;

    ForwardLane own;
    begin<MODE>(own, a, first_channel, split_row, q);
    const int chunks = (at.end - at.start + CHUNK - 1) / CHUNK;
    for (int m = 0; m < chunks; m++) {
        const int chunk_start = at.start + (MODE == SPLIT_ENDS_REVERSED ? chunks - 1 - m : m) * CHUNK;
        if (MODE == FORWARD) {
            // ---- the states for the backward pass; the inputs of the next chunk on their way into the L2 cache
            keep_states(own, a, at, chunk_start, q);
            for (i64 t = chunk_start + CHUNK + lane; t < min(chunk_start + 2 * CHUNK, at.end); t += 32) {
                const int c = at.group * F_CHANNELS;
                if (warp == 0) prefetch(u + t * U_STEP + c);
                if (warp == 1) prefetch(delta + t * DELTA_STEP + c);
                if (warp == 2) prefetch(z + t * Z_STEP + c);
                if (warp == 3) prefetch(B + t * B_STEP), prefetch(C + t * C_STEP);
            }
        }
        const int octets = (min(CHUNK, at.end - chunk_start) + 7) / 8;
        for (int m8 = 0; m8 < octets; m8++) {
            const int octet = MODE == SPLIT_ENDS_REVERSED ? octets - 1 - m8 : m8, first = chunk_start + 8 * octet;
            const int staged = F_STAGED == CHUNK ? 8 * octet : 0;  // where these steps lie in sB and sC
            // ---- B and C
            if (m8 == 0 || F_STAGED < CHUNK) {
                __syncthreads();
                stage_rows<32 * F_WARPS, ROW_STEP, F_STAGED>(sB, B, first - staged, at.end);
                if (MODE == FORWARD) stage_rows<32 * F_WARPS, C_STEP, F_STAGED>(sC, C, first - staged, at.end);
                __syncthreads();
            }
            // ---- dt, v and silu(z); the recurrence; y
            const u32 t = first + 2 * q;  // this lane's first step
            ForwardSteps steps;
            step_sizes<MODE>(own, steps, dt_v[warp], u + (t * X_STEP + first_channel),
                             delta + (t * DELTA_STEP + first_channel), z + (t * Z_STEP + first_channel),
                             t, at.end, p, q);
            __syncwarp();
            const float *B_own = sB + staged * N + q * F_STATES, *C_own = sC + staged * N + q * F_STATES;
            eight_steps<MODE>(own, steps, dt_v[warp], B_own, C_own, p, q);
            __syncwarp();
            if (MODE == FORWARD) outputs(y + (t * D_INNER + first_channel), own, steps, t, at.end);
        }
    }
    finish<MODE>(own, a, at, split_row, q);
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(32 * F_WARPS, 4) scan_forward(const ForwardArgs a) {
    forward_pass<FORWARD>(a);
}
extern "C" __global__ void __launch_bounds__(32 * F_WARPS) split_ends(const ForwardArgs a) {
    forward_pass<SPLIT_ENDS>(a);
}
#else
extern "C" __global__ void __launch_bounds__(32 * F_WARPS) split_ends_reversed(const ForwardArgs a) {
    forward_pass<SPLIT_ENDS_REVERSED>(a);
}
#endif

struct CarryArgs {
    const float *ends, *dt_sums, *A, *h0;
    float *starts;
    int n_batch, splits, reversed;
};

// What each split starts from, given all ends and decays: one thread per sequence, channel and state.
extern "C" __global__ void carry_over_splits(const CarryArgs a) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, elements = D_INNER * N_STATE;
    if (i >= a.n_batch * elements) return;
    const i64 batch = i / elements, e = i % elements;
    const float A2 = a.A[e] * LOG2E;
    float h = a.h0 != 0 ? a.h0[i] : 0.0f;
    for (int m = 0; m < a.splits; m++) {
        const i64 split = batch * a.splits + (a.reversed ? a.splits - 1 - m : m);
        a.starts[split * elements + e] = h;
        h = exp2_(a.dt_sums[split * D_INNER + e / N_STATE] * A2) * h + a.ends[split * elements + e];
    }
}

#if BACKWARD

// ---- backward --------------------------------------------------------------------------------------------------
//
// Chunks are worked through from the last to the first, in three levels: from the state that the forward pass saved
// before the chunk, the states before every STEPS-th step are computed again and kept in shared memory; from these,
// backwards, the states and decays within STEPS steps, in registers; and through these the gradient runs back. In an
// octet lane 4 p + q has step p, which is also where the tensor cores leave their sums over the states.

struct BackwardArgs {
    const io_t *dy, *u, *z, *B, *C, *y;
    io_t *delta;  // its gradient takes its place
    const float *A, *D, *delta_bias;
    const state_t *states;
    const float *starts;
    io_t *du, *dz;
    state_t *dBC;
    float *sums;
    i64 dy_batch, u_batch, delta_batch, z_batch, B_batch, C_batch, dz_batch;
    int n_batch, time, groups, splits, split_len;
};

constexpr int STATES = N / 8, STEPS = BACKWARD_STEPS, WARPS = BACKWARD_WARPS;
constexpr int PAIRS = BACKWARD_PAIRS, OWN = 2 * PAIRS, CHANNELS = 4 * OWN * WARPS;

// What a warp has in shared memory.
struct WarpShared {
    float dt_v[CHUNK][4][2 * OWN];  // of each step, dt of a lane's channels, then v
    float slope[CHUNK][4][OWN];     // of the softplus
    float do_[8][4][OWN], u[8][4][OWN];  // of 8 steps
#if FAST
    u32 before[CHUNK / STEPS][PAIRS][32][STATES];  // the states before every STEPS-th step, as bfloat16
#else
    float before[CHUNK / STEPS][PAIRS][32][2 * STATES];
    float dz[8][4][OWN];       // dy silu'(z) of 8 steps
    float sums[3][8][4][OWN];  // C . h, dh . B, de . A2
#endif
};

struct BlockShared {
    float B[CHUNK * N], C[CHUNK * N];
#if FAST
    // Each warp's terms of dB and dC of 8 steps, pairs of bfloat16: of each lane p first dB, then dC. Twice, so that
    // the next can be written while other warps add these up.
    u32 dBC[2][WARPS][8][8][STATES];
#else
    float dBC[WARPS][8 * 2 * N];
#endif
    WarpShared warps[WARPS];
};

// A lane's channels of one step, from and to a tensor.
DEVICE void load_own(pair_t (&x)[PAIRS], bool valid, const bool (&inside)[OWN], const io_t *from) {
#if ALIGNED && FAST && BACKWARD_PAIRS == 2
    uint2 both = make_uint2(0, 0);
    if (valid && inside[0]) both = *(const uint2 *)from;
    x[0] = both.x, x[1] = both.y;
#else
#pragma unroll
    for (int r = 0; r < PAIRS; r++) x[r] = load_pair(valid && inside[2 * r], valid && inside[2 * r + 1], from + 2 * r);
#endif
}
DEVICE void numbers(float (&x)[OWN], const pair_t (&pairs)[PAIRS]) {
#pragma unroll
    for (int r = 0; r < PAIRS; r++) {
        const float2 pair = numbers(pairs[r]);
        x[2 * r] = pair.x, x[2 * r + 1] = pair.y;
    }
}
DEVICE void store_own(io_t *to, bool valid, const bool (&inside)[OWN], const float (&x)[OWN]) {
#if ALIGNED && FAST && BACKWARD_PAIRS == 2
    if (valid && inside[0]) *(uint2 *)to = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
#else
#pragma unroll
    for (int r = 0; r < PAIRS; r++)
        store_pair(valid && inside[2 * r], valid && inside[2 * r + 1], to + 2 * r, x[2 * r], x[2 * r + 1]);
#endif
}

// The terms of dB and dC of one lane and step.
DEVICE void store_words(u32 *to, const u32 (&x)[STATES]) {
    if constexpr (STATES % 4 == 0) {
#pragma unroll
        for (int j = 0; j < STATES; j += 4) *(uint4 *)(to + j) = make_uint4(x[j], x[j + 1], x[j + 2], x[j + 3]);
    } else {
#pragma unroll
        for (int j = 0; j < STATES; j += 2) *(uint2 *)(to + j) = make_uint2(x[j], x[j + 1]);
    }
}
// A lane's states to and from shared memory.
DEVICE void keep(u32 (&to)[PAIRS][32][STATES], int lane, const float (&h)[OWN][STATES]) {
#pragma unroll
    for (int r = 0; r < PAIRS; r++) {
        u32 x[STATES];
#pragma unroll
        for (int j = 0; j < STATES; j++) x[j] = pack_bf16(h[2 * r][j], h[2 * r + 1][j]);
        store_words(to[r][lane], x);
    }
}
DEVICE void keep(float (&to)[PAIRS][32][2 * STATES], int lane, const float (&h)[OWN][STATES]) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < STATES; j++) to[i / 2][lane][i % 2 * STATES + j] = h[i][j];
}
DEVICE void fetch(float (&h)[OWN][STATES], const u32 (&from)[PAIRS][32][STATES], int lane) {
#pragma unroll
    for (int r = 0; r < PAIRS; r++)
#pragma unroll
        for (int j = 0; j < STATES; j++) {
            const u32 x = from[r][lane][j];
            h[2 * r][j] = __uint_as_float(x << 16), h[2 * r + 1][j] = __uint_as_float(x & 0xffff0000u);
        }
}
DEVICE void fetch(float (&h)[OWN][STATES], const float (&from)[PAIRS][32][2 * STATES], int lane) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < STATES; j++) h[i][j] = from[i / 2][lane][i % 2 * STATES + j];
}

// One step of the recurrence: h, the state after it, from h_before, and a, its decay.
DEVICE void step(float (&h)[OWN][STATES], const float (&h_before)[OWN][STATES], float (&a)[OWN][STATES],
                 const float (&A2)[OWN][STATES], const float (&from)[2 * OWN], const float *B) {
    float dt_v[2 * OWN], B_k[STATES];
    load_row(dt_v, from);
    load_row(B_k, B);
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < STATES; j++) {
            a[i][j] = exp2_(dt_v[i] * A2[i][j]);
            h[i][j] = a[i][j] * h_before[i][j] + dt_v[OWN + i] * B_k[j];
        }
}

// dB and dC of 8 steps, of which `left` exist, as sums over the warps' terms; dBC: from the first of these steps on.
DEVICE void add_dBC(state_t *dBC, const BlockShared &shared, int buffer, int left) {
#if FAST
    constexpr int WORDS = STATES >= 4 ? 2 : 1;  // pairs that a thread takes at once
#pragma unroll
    for (int start = 0; start < 8 * N; start += 32 * WARPS * WORDS) {
        const int i = start + threadIdx.x * WORDS, k = i / N, lane_p = i % N / STATES, j = i % STATES;
        if (8 * N % (32 * WARPS * WORDS) && k >= 8) break;
        float x[2 * WORDS] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++)
#pragma unroll
            for (int word = 0; word < WORDS; word++) {
                const float2 term = numbers(shared.dBC[buffer][w][k][lane_p][j + word]);
                x[2 * word] += term.x, x[2 * word + 1] += term.y;
            }
        if (k >= left) continue;
        const int n = STATES * lane_p + j % (STATES / 2) * 2;
        state_t *to = dBC + k * (u32)(2 * N_STATE) + (j < STATES / 2 ? 0 : N_STATE);
        store_states(to, n, x);
    }
#else
#pragma unroll
    for (int start = 0; start < 8 * N; start += 32 * WARPS) {
        const int i = start + threadIdx.x, k = i / N, n = i % N * 2;  // n: of dB, then of dC
        if (8 * N % (32 * WARPS) && k >= 8) break;
        float x = 0.0f, y = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 term = *(const float2 *)&shared.dBC[w][k * 2 * N + n];
            x += term.x, y += term.y;
        }
        if (k >= left) continue;
        const int n_own = n % N;
        state_t *to = dBC + k * (u32)(2 * N_STATE) + n / N * N_STATE + n_own;
        if (n_own < N_STATE) store(to, x);
        if (n_own + 1 < N_STATE) store(to + 1, y);
    }
#endif
}

// The sums over the time of one sequence and split: dA, then dD, then the gradient of delta_bias.
DEVICE void sums_over_time(float *sums, int own_channel, int p, const bool (&inside)[OWN],
                           const float (&dA)[OWN][STATES], float (&dD)[OWN], float (&dbias)[OWN]) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (inside[i]) store_states(sums + (own_channel + i) * N_STATE, STATES * p, dA[i]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            dD[i] += __shfl_xor_sync(ALL, dD[i], lanes);
            dbias[i] += __shfl_xor_sync(ALL, dbias[i], lanes);
        }
        if (p == 0 && inside[i]) {
            sums[D_INNER * N_STATE + own_channel + i] = dD[i];
            sums[D_INNER * (N_STATE + 1) + own_channel + i] = dbias[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BACKWARD_BLOCKS) scan_backward(const BackwardArgs a) {
#ifndef EMULATED
    extern __shared__ __align__(16) unsigned char shared_bytes[];
#endif
    BlockShared &block_shared = *(BlockShared *)shared_bytes;
    const Place at = place(a.groups, a.splits, a.split_len, a.time);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, p = lane / 4, q = lane % 4;
    WarpShared &shared = block_shared.warps[warp];
    const int first_channel = at.group * CHANNELS + warp * 4 * OWN, own_channel = first_channel + OWN * q;
    const i64 split_row = (at.batch * a.splits + at.split) * D_INNER;
    const float *B_own = block_shared.B + STATES * p, *C_own = block_shared.C + STATES * p;

    float A2[OWN][STATES], carry[OWN][STATES], dA[OWN][STATES], skip[OWN], bias[OWN], dD[OWN] = {}, dbias[OWN] = {};
    bool inside[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int c = own_channel + i;
        inside[i] = D_INNER % CHANNELS == 0 || c < D_INNER;
        load_states(A2[i], a.A + c * N_STATE, STATES * p, inside[i]);
        load_states(carry[i], a.starts + (split_row + c) * N_STATE, STATES * p, inside[i] && a.starts != 0);
#pragma unroll
        for (int j = 0; j < STATES; j++) A2[i][j] *= LOG2E, dA[i][j] = 0.0f;
        skip[i] = inside[i] ? a.D[c] : 0.0f, bias[i] = inside[i] ? a.delta_bias[c] : 0.0f;
    }
    // Tensors are addressed from the start of this sequence by numbers of 32 bits.
    const i64 gapless = at.batch * a.time * D_INNER;  // in tensors without gaps
    const io_t *u = settled(a.u + at.batch * a.u_batch);
    const io_t *z = settled(a.z + at.batch * a.z_batch), *dy = settled(a.dy + at.batch * a.dy_batch);
    const io_t *B = a.B + at.batch * a.B_batch, *C = a.C + at.batch * a.C_batch, *y = settled(a.y + gapless);
    io_t *delta = settled(a.delta + at.batch * a.delta_batch), *dz = settled(a.dz + at.batch * a.dz_batch);
    io_t *du = settled(a.du + gapless);
    state_t *dBC = a.dBC + ((i64)at.group * a.n_batch + at.batch) * a.time * (2 * N_STATE);
    const int saved_chunks = (a.time + CHUNK - 1) / CHUNK;

    // The inputs of this lane's step, loaded 8 steps ahead.
    pair_t u_next[PAIRS], z_next[PAIRS], dy_next[PAIRS], y_next[PAIRS];
    auto load_inputs = [&](int t) {
        const bool valid = t >= at.start && t < at.end;
        load_own(u_next, valid, inside, u + (u32)(t * U_STEP + own_channel));
        load_own(z_next, valid, inside, z + (u32)(t * Z_STEP + own_channel));
        load_own(dy_next, valid, inside, dy + (u32)(t * DY_STEP + own_channel));
        if (FAST) load_own(y_next, valid, inside, y + (u32)(t * D_INNER + own_channel));
    };
    load_inputs(at.start + (at.end - at.start - 1) / 8 * 8 + p);
    int buffer = 0;  // of block_shared.dBC

    const int chunks = (at.end - at.start + CHUNK - 1) / CHUNK;
    for (int m = chunks - 1; m >= 0; m--) {
        const int chunk_start = at.start + m * CHUNK, length = min(CHUNK, at.end - chunk_start);
        // ---- B and C; dt and v = dt u; the inputs of the next chunk on their way into the L2 cache
        stage_rows<32 * WARPS, B_STEP, CHUNK>(block_shared.B, B, chunk_start, at.end);
        stage_rows<32 * WARPS, C_STEP, CHUNK>(block_shared.C, C, chunk_start, at.end);
#pragma unroll (4 / PAIRS)
        for (int k8 = 0; k8 < CHUNK; k8 += 8) {
            const int k = k8 + p;
            const bool valid = k < length;
            const u32 t = chunk_start + k;
            pair_t delta_pairs[PAIRS], u_pairs[PAIRS];
            load_own(delta_pairs, valid, inside, delta + (t * DELTA_STEP + own_channel));
            load_own(u_pairs, valid, inside, u + (t * U_STEP + own_channel));
            float delta_k[OWN], u_k[OWN], dt_v[2 * OWN], slope[OWN];
            numbers(delta_k, delta_pairs), numbers(u_k, u_pairs);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const float dt = softplus(delta_k[i] + bias[i], slope[i]);
                dt_v[i] = valid && inside[i] ? dt : 0.0f, dt_v[OWN + i] = dt_v[i] * u_k[i];
            }
            store_row(shared.dt_v[k][q], dt_v);
            store_row(shared.slope[k][q], slope);
        }
        if (m > 0 && warp < 4) {
            const i64 row = at.batch * saved_chunks + chunk_start / CHUNK - 1;
            const u32 c = at.group * CHANNELS;
            for (u32 t = chunk_start - CHUNK + lane; t < chunk_start; t += 32) {
                if (warp == 0) prefetch(u + (t * U_STEP + c)), prefetch(B + t * B_STEP), prefetch(C + t * C_STEP);
                if (warp == 1 % WARPS) prefetch(delta + (t * DELTA_STEP + c));
                if (warp == 2 % WARPS) prefetch(z + (t * Z_STEP + c));
                if (warp == 3 % WARPS) prefetch(dy + (t * DY_STEP + c));
                if (FAST && warp == 1 % WARPS) prefetch(y + (t * D_INNER + c));
            }
            if (lane < 2 * OWN)
                prefetch(a.states + (row * D_INNER + min(first_channel + 2 * lane, D_INNER - 1)) * N_STATE);
        }
        float h[OWN][STATES], decay[STEPS][OWN][STATES];
        const i64 saved = (at.batch * saved_chunks + chunk_start / CHUNK) * D_INNER + own_channel;
#pragma unroll
        for (int i = 0; i < OWN; i++)
            load_states(h[i], a.states + (saved + i) * N_STATE, STATES * p, inside[i]);
        __syncthreads();
        // ---- forward once more: the states before every STEPS-th step
        const int pieces = (length + STEPS - 1) / STEPS;
        keep(shared.before[0], lane, h);
        for (int piece = 1; piece < pieces; piece++) {
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                const int t = (piece - 1) * STEPS + k;
                step(h, h, decay[0], A2, shared.dt_v[t][q], B_own + t * N);
            }
            keep(shared.before[piece], lane, h);
        }
        for (int octet = (length + 7) / 8 - 1; octet >= 0; octet--) {
            // ---- of 8 steps: do and u; dz or, but for bfloat16, dy silu'(z), which C . h + D u is still to multiply
            const u32 first_step = chunk_start + 8 * octet, own = first_step + p;  // own: of this lane
            const bool valid = 8 * octet + p < length;
            {
                float u_t[OWN], z_t[OWN], dy_t[OWN], y_t[OWN], do_t[OWN], dz_t[OWN];
                numbers(u_t, u_next), numbers(z_t, z_next), numbers(dy_t, dy_next);
                if (FAST) numbers(y_t, y_next);
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    const float z_i = gate_input(z_t[i]), gate = sigmoid(z_i);
                    do_t[i] = dy_t[i] * z_i * gate;
                    // silu'(z) = silu(z) (1 / z + 1 - gate), and silu(z) (C . h + D u) is y.
                    if (FAST) dz_t[i] = dy_t[i] * y_t[i] * (reciprocal(z_i) + (1.0f - gate));
                    else dz_t[i] = dy_t[i] * gate * (1.0f + z_i * (1.0f - gate));
                    dD[i] += do_t[i] * u_t[i];
                }
                store_row(shared.do_[p][q], do_t);
                store_row(shared.u[p][q], u_t);
#if FAST
                store_own(dz + (own * DZ_STEP + own_channel), valid, inside, dz_t);
#else
                store_row(shared.dz[p][q], dz_t);
#endif
            }
            load_inputs((int)own - 8);
#if FAST
            float sums[PAIRS][4] = {};  // of step p and channels 2 r and 2 r + 1: dh . B of both, de . A2 of both
#else
            __syncthreads();  // until here other warps may have been adding up the last dBC
            float *terms = block_shared.dBC[warp];
#endif
            __syncwarp();
            for (int half = 8 / STEPS - 1; half >= 0; half--) {
                const int piece = octet * (8 / STEPS) + half;
#if FAST
                if (piece >= pieces) {  // no step of these exists
#pragma unroll
                    for (int k = 0; k < STEPS; k++)
                        if (q == 0)
#pragma unroll
                            for (int j = 0; j < STATES; j++) block_shared.dBC[buffer][warp][half * STEPS + k][p][j] = 0;
                    continue;
                }
#else
                if (piece >= pieces) continue;
#endif
                // ---- forward through STEPS steps, keeping a and h of each
                float h_after[STEPS][OWN][STATES];
                fetch(h, shared.before[piece], lane);
#pragma unroll
                for (int k = 0; k < STEPS; k++) {
                    const int t = piece * STEPS + k;
                    step(h_after[k], k > 0 ? h_after[k - 1] : h, decay[k], A2, shared.dt_v[t][q], B_own + t * N);
                }
                // ---- backward: dh, what it gives dB, dC, dv, dA and ddt, and the next carry
#pragma unroll
                for (int k = STEPS - 1; k >= 0; k--) {
                    const int t = piece * STEPS + k, k8 = half * STEPS + k;
                    float dt_v[2 * OWN], d_o[OWN], B_k[STATES], C_k[STATES];
                    load_row(dt_v, shared.dt_v[t][q]);
                    load_row(d_o, shared.do_[k8][q]);
                    load_row(B_k, B_own + t * N);
                    load_row(C_k, C_own + t * N);
                    if (k == 0) fetch(h, shared.before[piece], lane);  // again, rather than holding it since
                    const float(&h_t)[OWN][STATES] = h_after[k], (&h_before)[OWN][STATES] = k > 0 ? h_after[k - 1] : h;
                    const float *v = dt_v + OWN;
                    float dh[OWN][STATES], dv[OWN] = {}, eA2[OWN] = {};
#pragma unroll
                    for (int i = 0; i < OWN; i++)
#pragma unroll
                        for (int j = 0; j < STATES; j++) {
                            dh[i][j] = carry[i][j] + d_o[i] * C_k[j];
                            dv[i] += dh[i][j] * B_k[j];
                            carry[i][j] = dh[i][j] * decay[k][i][j];
                            const float de = carry[i][j] * h_before[i][j];
                            dA[i][j] += de * dt_v[i];
                            eA2[i] += de * A2[i][j];
                        }
#if FAST
                    // All columns of these products are alike, so every lane of a row has the sum over the channels.
                    u32 dBC_k[STATES];
#pragma unroll
                    for (int j = 0; j < STATES; j += 2) {
                        float d[4] = {}, e[4] = {};
#pragma unroll
                        for (int i = 0; i < OWN; i += 2) {
                            mma_tf32(d, dh[i][j], dh[i][j + 1], dh[i + 1][j], dh[i + 1][j + 1], v[i], v[i + 1]);
                            mma_tf32(e, h_t[i][j], h_t[i][j + 1], h_t[i + 1][j], h_t[i + 1][j + 1], d_o[i], d_o[i + 1]);
                        }
                        dBC_k[j / 2] = pack_bf16(d[0], d[2]), dBC_k[(STATES + j) / 2] = pack_bf16(e[0], e[2]);
                    }
                    if (q == 0) store_words(block_shared.dBC[buffer][warp][k8][p], dBC_k);
                    // The lanes' partial sums, rows p and columns 2 q + i, transposed so that channels are columns, dv
                    // above eA2, times a matrix of ones for dv in row k8 and for eA2 in row k8 + 8.
                    const u32 row = p == k8 ? 0x3f803f80u : 0u;
#pragma unroll
                    for (int r = 0; r < PAIRS; r++)
                        mma_bf16(sums[r], row, 0, 0, row, transposed(pack_bf16(dv[2 * r], dv[2 * r + 1])),
                                 transposed(pack_bf16(eA2[2 * r], eA2[2 * r + 1])));
#else
                    float Ch[OWN] = {}, dB_k[STATES], dC_k[STATES];
#pragma unroll
                    for (int j = 0; j < STATES; j++) {
                        dB_k[j] = dh[0][j] * v[0] + dh[1][j] * v[1];
                        dC_k[j] = h_t[0][j] * d_o[0] + h_t[1][j] * d_o[1];
#pragma unroll
                        for (int lanes = 1; lanes < 4; lanes *= 2) {
                            dB_k[j] += __shfl_xor_sync(ALL, dB_k[j], lanes);
                            dC_k[j] += __shfl_xor_sync(ALL, dC_k[j], lanes);
                        }
                    }
                    if (q == 0) {
                        store_row(terms + k8 * 2 * N + STATES * p, dB_k);
                        store_row(terms + k8 * 2 * N + N + STATES * p, dC_k);
                    }
#pragma unroll
                    for (int i = 0; i < OWN; i++) {
#pragma unroll
                        for (int j = 0; j < STATES; j++) Ch[i] += h_t[i][j] * C_k[j];
#pragma unroll
                        for (int lanes = 4; lanes < 32; lanes *= 2) {
                            Ch[i] += __shfl_xor_sync(ALL, Ch[i], lanes);
                            dv[i] += __shfl_xor_sync(ALL, dv[i], lanes);
                            eA2[i] += __shfl_xor_sync(ALL, eA2[i], lanes);
                        }
                    }
                    if (p == k8) {
                        store_row(shared.sums[0][k8][q], Ch);
                        store_row(shared.sums[1][k8][q], dv);
                        store_row(shared.sums[2][k8][q], eA2);
                    }
#endif
                }
            }
            // ---- of 8 steps: du and ddelta
            __syncwarp();
            {
                float u_t[OWN], do_t[OWN], slope[OWN], dt[OWN], dv[OWN], eA2[OWN], du_t[OWN], ddelta_t[OWN];
                load_row(u_t, shared.u[p][q]);
                load_row(do_t, shared.do_[p][q]);
                load_row(slope, shared.slope[8 * octet + p][q]);
                load_row(dt, shared.dt_v[8 * octet + p][q]);
#if FAST
#pragma unroll
                for (int i = 0; i < OWN; i++) dv[i] = sums[i / 2][i % 2], eA2[i] = sums[i / 2][2 + i % 2];
#else
                float dz_t[OWN], Ch[OWN];
                load_row(dz_t, shared.dz[p][q]);
                load_row(Ch, shared.sums[0][p][q]);
                load_row(dv, shared.sums[1][p][q]);
                load_row(eA2, shared.sums[2][p][q]);
#pragma unroll
                for (int i = 0; i < OWN; i++) dz_t[i] *= Ch[i] + skip[i] * u_t[i];
                store_own(dz + (own * DZ_STEP + own_channel), valid, inside, dz_t);
#endif
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    du_t[i] = dt[i] * dv[i] + skip[i] * do_t[i];
                    ddelta_t[i] = (u_t[i] * dv[i] + LN2 * eA2[i]) * slope[i];  // A = A2 ln 2
                    if (valid && inside[i]) dbias[i] += ddelta_t[i];
                }
                store_own(du + (own * D_INNER + own_channel), valid, inside, du_t);
                store_own(delta + (own * DELTA_STEP + own_channel), valid, inside, ddelta_t);
            }
            // ---- dB and dC: the sum over this block's channels
            __syncthreads();
            add_dBC(dBC + first_step * (u32)(2 * N_STATE), block_shared, buffer, length - 8 * octet);
            buffer ^= 1;
        }
    }
    sums_over_time(a.sums + split_row * (N_STATE + 2), own_channel, p, inside, dA, dD, dbias);
}

// ---- sums ------------------------------------------------------------------------------------------------------

struct GroupSumArgs {
    const state_t *dBC;
    io_t *dB, *dC;
    i64 dB_batch, dB_step, dC_batch, dC_step, rows;
    int time, groups;
};

// dB and dC from the partial sums (groups, rows, 2, N_STATE) of the groups of channels; rows: batch x time. Two columns
// per thread.
extern "C" __global__ void sum_groups(const GroupSumArgs a) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.rows * N_STATE) return;
    const i64 row = i / N_STATE, batch = row / a.time, t = row % a.time;
    const int first = i % N_STATE * 2;
    float x = 0.0f, y = 0.0f;
#pragma unroll 4
    for (int group = 0; group < a.groups; group++) {
        const state_t *from = a.dBC + ((i64)group * a.rows + row) * (2 * N_STATE) + first;
#if FAST
        const u32 pair = *(const u32 *)from;
        x += __uint_as_float(pair << 16), y += __uint_as_float(pair & 0xffff0000u);
#else
        const float2 pair = *(const float2 *)from;
        x += pair.x, y += pair.y;
#endif
    }
#pragma unroll
    for (int s = 0; s < 2; s++) {
        const int n = first + s;
        if (n < N_STATE) store(a.dB + batch * a.dB_batch + t * a.dB_step + n, s ? y : x);
        else store(a.dC + batch * a.dC_batch + t * a.dC_step + n - N_STATE, s ? y : x);
    }
}

struct RowSumArgs {
    const float *rows;
    float *first, *second, *third;
    int n_rows, n_first, n_second, n_third;
};

// The sum of n_rows rows of n_first + n_second + n_third numbers, cut into tensors of these sizes. Blocks of 256
// threads: 32 columns, 8 rows at a time.
extern "C" __global__ void sum_rows(const RowSumArgs a) {
    __shared__ float parts[8][32];
    const int size = a.n_first + a.n_second + a.n_third, lane = threadIdx.x % 32, part = threadIdx.x / 32;
    const int i = blockIdx.x * 32 + lane;
    float x = 0.0f;
    if (i < size) {
#pragma unroll 4
        for (int row = part; row < a.n_rows; row += 8) x += a.rows[(i64)row * size + i];
    }
    parts[part][lane] = x;
    __syncthreads();
    if (part > 0 || i >= size) return;
    for (int other = 1; other < 8; other++) x += parts[other][lane];
    if (i < a.n_first) a.first[i] = x;
    else if (i < a.n_first + a.n_second) a.second[i - a.n_first] = x;
    else a.third[i - a.n_first - a.n_second] = x;
}

#endif
