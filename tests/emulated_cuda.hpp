// Runs the kernels of kernels/scan.cu on a CPU, for the tests: what they use of CUDA, emulated. The threads of a block
// are coroutines (ucontext) in one thread of the operating system; a barrier or an exchange between the lanes of a warp
// hands over to the next until all have come to it.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define DEVICE static inline
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
using std::max;
using std::min;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }

struct Index { int x; };
static Index threadIdx, blockIdx, blockDim;
alignas(16) static unsigned char shared_bytes[1 << 20];

struct Barrier { int arrived = 0; unsigned generation = 0; };
static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static Barrier block_barrier, warp_barriers[32];
static uint32_t exchanged[32][32][6];

static void wait(Barrier &barrier, int count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) barrier.arrived = 0, barrier.generation++;
    else while (barrier.generation == generation) swapcontext(&threads[threadIdx.x], &scheduler);
}
static void __syncthreads() { wait(block_barrier, blockDim.x); }
static void __syncwarp() { wait(warp_barriers[threadIdx.x / 32], 32); }

// All lanes give COUNT numbers; then each reads those of all lanes.
template <int COUNT, typename F> static void exchange(const uint32_t (&given)[COUNT], F read) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::copy(given, given + COUNT, exchanged[warp][lane]);
    __syncwarp();
    read(exchanged[warp], lane);
    __syncwarp();
}

static float __shfl_xor_sync(unsigned, float x, int mask) {
    const uint32_t given[1] = {__float_as_uint(x)};
    exchange(given, [&](uint32_t(*all)[6], int lane) { x = __uint_as_float(all[lane ^ mask][0]); });
    return x;
}

static float exp2_(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1 / x; }
static void prefetch(const void *) {}
template <typename T> static T *settled(T *p) { return p; }
static uint32_t to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
static float from_f16(uint16_t x) { _Float16 y; memcpy(&y, &x, 2); return y; }
static uint16_t to_f16(float x) { _Float16 y = x; uint16_t z; memcpy(&z, &y, 2); return z; }
static float tf32(uint32_t x) { return __uint_as_float(x & 0xffffe000u); }
static float half_of(uint32_t x, int i) { return __uint_as_float(i ? x & 0xffff0000u : x << 16); }

static void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    const float given[6] = {a0, a1, a2, a3, b0, b1};
    uint32_t bits[6];
    memcpy(bits, given, sizeof bits);
    exchange(bits, [&](uint32_t(*all)[6], int lane) {
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
            for (int k = 0; k < 8; k++)
                d[i] += tf32(all[4 * row + k % 4][i / 2 + k / 4 * 2]) * tf32(all[4 * column + k % 4][4 + k / 4]);
        }
    });
}
static void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t given[6] = {a0, a1, a2, a3, b0, b1};
    exchange(given, [&](uint32_t(*all)[6], int lane) {
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
            for (int k = 0; k < 16; k++)
                d[i] += half_of(all[4 * row + k % 8 / 2][i / 2 + k / 8 * 2], k % 2)
                        * half_of(all[4 * column + k % 8 / 2][4 + k / 8], k % 2);
        }
    });
}
static uint32_t transposed(uint32_t x) {
    const uint32_t given[1] = {x};
    exchange(given, [&](uint32_t(*all)[6], int lane) {
        const int column = lane / 4, row = 2 * (lane % 4);
        const auto at = [&](int r) { return all[4 * r + column / 2][0] >> (column % 2 * 16) & 0xffff; };
        x = at(row) | at(row + 1) << 16;
    });
    return x;
}

// Whether threads go on in the reverse order, each pausing at random: a missing barrier then shows in the results.
extern "C" int shuffled;
int shuffled = 0;

static std::function<void()> body;
static std::vector<char> done;
static void thread_main() { body(); done[threadIdx.x] = 1; }

static void run(std::function<void()> kernel, int blocks, int n_threads) {
    static std::vector<char> stacks;
    const size_t stack = 1 << 18;
    stacks.resize(stack * n_threads);
    threads.resize(n_threads);
    blockDim.x = n_threads;
    body = kernel;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        done.assign(n_threads, 0);
        block_barrier = Barrier();
        std::fill(warp_barriers, warp_barriers + 32, Barrier());
        memset(shared_bytes, 0xff, sizeof shared_bytes);  // NaN: what isn't written must not be read
        for (int i = 0; i < n_threads; i++) {
            getcontext(&threads[i]);
            threads[i].uc_stack.ss_sp = stacks.data() + stack * i;
            threads[i].uc_stack.ss_size = stack;
            threads[i].uc_link = &scheduler;
            makecontext(&threads[i], thread_main, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (int k = 0; k < n_threads; k++) {
                const int i = shuffled ? n_threads - 1 - k : k;
                if (done[i]) continue;
                running = true;
                if (shuffled && rand() % 3 == 0) continue;
                threadIdx.x = i;
                swapcontext(&scheduler, &threads[i]);
            }
        }
    }
}

#include "../kernels/scan.cu"

#define RUN(KERNEL, ARGUMENTS)                                                        \
    extern "C" void run_##KERNEL(const ARGUMENTS *a, int blocks, int n_threads) {     \
        run([=] { KERNEL(*a); }, blocks, n_threads);                                  \
    }
RUN(carry_over_splits, CarryArgs)
#if BACKWARD
RUN(split_ends_reversed, ForwardArgs)
RUN(scan_backward, BackwardArgs)
RUN(sum_groups, GroupSumArgs)
RUN(sum_rows, RowSumArgs)
extern "C" int shared_size() { return sizeof(BlockShared); }
#else
RUN(scan_forward, ForwardArgs)
RUN(split_ends, ForwardArgs)
#endif
