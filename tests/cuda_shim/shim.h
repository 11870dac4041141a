// CUDA C on a CPU, for tests. Threads are fibers that run one after the other and change at barriers, shuffles and __nanosleep.
// Kernels that have none of these run as plain loops. All blocks of a cooperative grid are alive at the same time.
// Found and reported: threads that wait at different barriers, threads that leave while others wait, nobody getting on, writes
// past the end of shared memory, reads by __ldcg that are not aligned. Shared memory starts as NaN, and so does what lies beyond it.
#pragma once
#define FASTNN_SHIM
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 { unsigned x, y, z; };
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum State { READY, BLOCK, WARP, DONE };

struct Fiber {
    ucontext_t context;
    char* stack;
    unsigned thread, block;
    State state;
    const void* site;  // of the barrier at which it waits
    uint64_t value;    // what it gives to a shuffle
    unsigned operands[6];  // and to a matrix instruction
};

static const size_t STACK = 64 << 10, PAST = 4096;
static ucontext_t home;
static jmp_buf plain;
static std::vector<Fiber> fibers;
static std::vector<char*> stacks;  // kept for the next launch
static std::vector<char> shared;
static size_t shared_room;
static Fiber* current;
static bool fibrous, whole;
static void (*body)(const void*);
static const void* body_args;
static char* message;

static void fail(const char* why) {
    if (message[0] == 0)
        snprintf(message, 200, "%s (block %u, thread %u)", why, blockIdx.x, threadIdx.x);
    if (!fibrous) return;
    setcontext(&home);
}

static void wait(State state, const void* site) {
    if (!fibrous) longjmp(plain, 1);  // the loop over threads cannot serve this kernel: once more, with fibers
    current->state = state;
    current->site = site;
    Fiber* self = current;
    swapcontext(&self->context, &home);
}

static void start() {
    body(body_args);
    current->state = DONE;
    setcontext(&home);
}

static void* memory() { return shared.data() + (whole ? blockIdx.x : 0) * shared_room; }

static void enter(Fiber& f) {
    current = &f;
    threadIdx.x = f.thread;
    blockIdx.x = f.block;
    swapcontext(&home, &f.context);
}

// A group of fibers of which all must be at the same barrier; true if they were and may go on.
static bool together(Fiber* first, unsigned count, State state, const char* mixed, const char* left) {
    unsigned waiting = 0, done = 0;
    for (unsigned i = 0; i < count; i++) {
        waiting += first[i].state == state;
        done += first[i].state == DONE;
    }
    if (!waiting) return false;
    if (waiting + done < count) return false;
    blockIdx.x = first->block;
    threadIdx.x = first->thread;
    if (done) { snprintf(message, 200, "%s (block %u)", left, first->block); return false; }
    for (unsigned i = 1; i < count; i++)
        if (first[i].site != first->site) { snprintf(message, 200, "%s (block %u)", mixed, first->block); return false; }
    return true;
}

// Every thread of a block to its next barrier or pause; true if a barrier opened.
static bool advance(Fiber* first, unsigned block) {
    bool opened = false;
    for (unsigned i = 0; i < block; i++) {
        if (first[i].state == READY) enter(first[i]);
        if (message[0]) return false;
    }
    for (unsigned w = 0; w < block; w += 32) {
        const unsigned lanes = w + 32 < block ? 32 : block - w;
        if (together(first + w, lanes, WARP, "lanes of a warp at different shuffles", "lanes left before a shuffle"))
            for (unsigned i = w; i < w + lanes; i++) { first[i].state = READY; opened = true; }
    }
    if (together(first, block, BLOCK, "threads at different barriers", "threads left before a barrier"))
        for (unsigned i = 0; i < block; i++) { first[i].state = READY; opened = true; }
    return opened && !message[0];
}

static void run_blocks(unsigned from, unsigned to, unsigned block) {
    const unsigned count = (to - from) * block;
    fibers.resize(count);
    while (stacks.size() < count) stacks.push_back((char*)malloc(STACK));
    for (unsigned i = 0; i < count; i++) {
        Fiber& f = fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks[i];
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &home;
        f.thread = i % block;
        f.block = from + i / block;
        f.state = READY;
        makecontext(&f.context, start, 0);
    }
    // Unfair on purpose: a block runs until it can get no further without another one, forwards and backwards through the grid, so
    // that who forgets to wait for the others reads what they have not written yet.
    unsigned idle = 0;
    bool back = false;
    for (unsigned alive = count; alive; back = !back) {
        bool moved = false;
        alive = 0;
        for (unsigned n = 0; n < count; n += block) {
            const unsigned b = back ? count - block - n : n;
            while (advance(&fibers[b], block)) moved = true;
            if (message[0]) return;
            for (unsigned i = b; i < b + block; i++) alive += fibers[i].state != DONE;
        }
        // Without a barrier that opened, only a thread that waits for memory can get on.
        idle = moved ? 0 : idle + 1;
        if (alive && idle > 2000) {
            bool at_barrier = false;
            for (auto& f : fibers) at_barrier |= f.state == BLOCK || f.state == WARP;
            snprintf(message, 200, at_barrier ? "barrier divergence: some threads wait, the others never come" : "nobody gets on");
            return;
        }
    }
}

// mode: 0 threads as a loop, 1 fibers block by block, 2 of all blocks at once → 0, 1 with a message, or 2: use mode 1.
static int run(void (*kernel)(const void*), const void* args, unsigned grid, unsigned block, unsigned room, int mode, char* out) {
    body = kernel;
    body_args = args;
    message = out;
    message[0] = 0;
    fibrous = mode > 0;
    blockDim = {block, 1, 1};
    gridDim = {grid, 1, 1};
    whole = mode == 2;  // cooperative: all blocks at once
    shared_room = (room + PAST + 15) / 16 * 16;
    shared.assign(shared_room * (whole ? grid : 1) + 16, (char)0xFF);
    if (!fibrous) {
        if (setjmp(plain)) return 2;
        for (blockIdx.x = 0; blockIdx.x < grid && !message[0]; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < block && !message[0]; threadIdx.x++) kernel(args);
    } else if (whole) {
        run_blocks(0, grid, block);
    } else {
        for (unsigned b = 0; b < grid && !message[0]; b++) {
            memset(shared.data(), 0xFF, shared.size());
            run_blocks(b, b + 1, block);
        }
    }
    for (unsigned b = 0; b < (whole ? grid : 1) && !message[0]; b++)
        for (size_t i = room; i < shared_room; i++)
            if (shared[b * shared_room + i] != (char)0xFF) {
                snprintf(message, 200, "a write past the end of shared memory (block %u, byte %zu of %u)", b, i, room);
                break;
            }
    return message[0] != 0;
}

static float from_half(unsigned short h) {
    const int e = (h >> 10) & 31, m = h & 1023;
    const float v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1.0f + m / 1024.0f, e - 15) : std::ldexp((float)m, -24);
    return h >> 15 ? -v : v;
}

static unsigned short to_half(float a) {
    const unsigned short sign = std::signbit(a) ? 0x8000 : 0;
    const float v = std::fabs(a);
    if (v != v) return sign | 0x7e00;
    if (v >= 65520.0f) return sign | 0x7c00;
    int e;
    std::frexp(v, &e);
    const int least = e - 11 < -24 ? -24 : e - 11;                 // the exponent of the last bit
    const long n = std::lrint(std::ldexp((double)v, -least));      // to nearest, ties to even
    return sign | (unsigned short)(n < 1024 ? n : n == 2048 ? (least + 26) << 10 : ((least + 25) << 10) + (n - 1024));
}

// An addition that releases what was written before. Whoever waits for it runs now, ahead of all that follows it here.
static void release_one(int* p) {
    ++*p;
    wait(READY, nullptr);
}

// mma.m16n8k16, by lanes that meet twice: c += a b.
template <typename Widen> static void mma(float (&c)[4], const unsigned* a, unsigned b0, unsigned b1, Widen widen) {
    if (!fibrous) wait(WARP, nullptr);
    Fiber* self = current;
    memcpy(self->operands, a, 4 * sizeof *a);
    self->operands[4] = b0;
    self->operands[5] = b1;
    wait(WARP, (const void*)3);
    const Fiber* const warp = self - self->thread % 32;
    const unsigned lane = self->thread % 32;
    const auto number = [&](unsigned lane, unsigned which, unsigned k) {
        return widen((unsigned short)(warp[lane].operands[which] >> k % 2 * 16));
    };
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++)
            c[i] += number(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k) * number(column * 4 + k % 8 / 2, 4 + k / 8, k);
    }
    wait(WARP, (const void*)3);
}

}  // namespace shim

static inline unsigned __float_as_uint(float a) { unsigned u; memcpy(&u, &a, 4); return u; }
static inline float __uint_as_float(unsigned u) { float a; memcpy(&a, &u, 4); return a; }
static inline void __syncwarp() {}
static inline void __threadfence() {}
static inline void __trap() { shim::fail("__trap"); }
static __attribute__((noinline)) void __syncthreads() { shim::wait(shim::BLOCK, __builtin_return_address(0)); }
static inline void __nanosleep(unsigned) { shim::wait(shim::READY, nullptr); }
template <typename T> T __ldcg(const T* p) {
    if ((uintptr_t)p % sizeof(T)) shim::fail("a read across its alignment");
    return *p;
}
template <typename T> void __stcg(T* p, T v) { *p = v; }
static inline int atomicAdd(int* p, int v) { const int old = *p; *p += v; return old; }

// All lanes give, wait for each other, take, and wait again, before the next one can give.
template <typename T> T shuffle(T v, unsigned lane, const void* site) {
    if (!shim::fibrous) shim::wait(shim::WARP, site);
    shim::Fiber* self = shim::current;
    memcpy(&self->value, &v, sizeof v);
    shim::wait(shim::WARP, site);
    T got;
    memcpy(&got, &(self - self->thread % 32 + lane)->value, sizeof got);
    shim::wait(shim::WARP, site);
    return got;
}
template <typename T> T __shfl_xor_sync(unsigned, T v, int other) { return shuffle(v, threadIdx.x % 32 ^ other, (void*)1); }
template <typename T> T __shfl_sync(unsigned, T v, int lane) { return shuffle(v, lane, (void*)2); }
