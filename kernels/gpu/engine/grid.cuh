// What recurrent layers have in common, whose blocks wait for each other through memory.
//
// A job is one direction of one layer, with blocks of its own. Its counter grows by one as one of its blocks finishes a step; a
// block waits until all have finished the last one, and for the layer below, if that is in the same launch. Layers run one step
// behind each other, with no barrier that all wait at. Rows of the batch know nothing of each other: a large batch may be
// cut into groups, each with blocks and counters of its own. All blocks have to be on the device at once: a cooperative launch.
//
// What other blocks wrote is read past L1 (__ldcg), which is not coherent.
#include "common.cuh"

enum Mode { LSTM, GRU, RNN };

const int LANES = 32;
const int APART = 32;  // between counters, in ints: many blocks poll each, none shares a line

#ifdef FASTNN_SHIM
#define SHARED(name) float* const name = (float*)shim::memory()
#else
#define SHARED(name) extern __shared__ __align__(16) float name[]
#endif

// One direction of one layer. All arrays are dense, in float; rnn_half.cu has 16-bit numbers in w_hh, h0, y and h_n.
struct Job {
    const float *below, *w_ih, *w_hh, *b_ih, *b_hh;  // below: outputs of the layer below, or 0 where gates_in has their product
    const float* gates_in;                           // (rows, G·H): the input's product with both biases, or 0
    const float *h0, *c0;
    float *y, *h_n, *c_n, *kept;  // kept: (rows, 5·H or 4·H), or 0
    int* done;                    // this job's counters, one a group
    const int* wait;              // counters of the layer below, or 0
    i64 reverse, y_stride, y_at;
    // the backward
    const float* grad_y;             // the caller's, or what the job of the layer above made
    const float *grad_h, *grad_c;
    float *gates_x, *gates_h, *d_below, *d_h0, *d_c0;  // d_below: 0 where nobody below is in this launch
    i64 grad_stride, grad_at;
    const int* above;                // counters of the job above, or 0
};

struct Call {
    const i64* starts;  // of each step's rows; 0: all have `batch`
    i64 steps, batch, units, relu;
    i64 blocks, groups, share;    // blocks of a job and group; groups of the batch; rows of a group
    i64 staged, parts, vectors;   // rows in shared memory at once; see backward; whether 16 bytes are read at once
    i64 more;                     // groups of 128 columns of weights in shared memory
    Job jobs[12];
};

// A row and a column's offset: one multiplication of 32 bits to 64, where those of 64 bits are five.
__device__ __forceinline__ i64 offset(unsigned rows, unsigned stride) { return (i64)((unsigned long long)rows * stride); }

__device__ __forceinline__ int at_most(int a, int b) { return a < b ? a : b; }

__device__ __forceinline__ float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }

// Where a block is: the job, and the rows of the batch.
struct Place {
    const Job& job;
    int group, block, from;  // from: the group's first row of the batch
    __device__ __forceinline__ Place(const Call& g)
        : job(g.jobs[blockIdx.x / (unsigned)(g.blocks * g.groups)]), group(blockIdx.x / (unsigned)g.blocks % (unsigned)g.groups),
          block(blockIdx.x % (unsigned)g.blocks), from(group * (int)g.share) {}
};

// The group's first row of a step, and how many it has: none of a step that there is not.
__device__ __forceinline__ i64 row_of(const Call& g, i64 step, int from) {
    return step < 0 || step >= g.steps ? 0 : (g.starts ? g.starts[step] : step * g.batch) + from;
}
__device__ __forceinline__ int rows_in(const Call& g, i64 step, int from) {
    if (step < 0 || step >= g.steps) return 0;
    const int rows = (int)(g.starts ? g.starts[step + 1] - g.starts[step] : g.batch) - from;
    return rows < 0 ? 0 : at_most(rows, (int)g.share);
}

__device__ __forceinline__ int seen(const int* counter) {
#ifdef FASTNN_SHIM
    return *counter;
#else
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
#endif
}

// One thread waits, the block behind it.
__device__ __forceinline__ void await(const int* counters, int group, i64 wanted) {
    if (counters == 0) return;
    while (seen(counters + group * APART) < wanted) __nanosleep(20);
}

// The block's writes are there for whoever has seen the counter.
__device__ __forceinline__ void publish(int* counters, int group) {
    __syncthreads();
    if (threadIdx.x == 0) {
        int* const counter = counters + group * APART;
#ifdef FASTNN_SHIM
        shim::release_one(counter);
#else
        asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
#endif
    }
}

// 16 bytes of such numbers
template <typename N> struct Sixteen { typedef float4 type; };
template <> struct Sixteen<unsigned short> { typedef uint4 type; };

// Copies so many rows of the batch to shared memory, `width` numbers each, 0 from `columns` on; row(b): where a row lies. READS
// of a thread are under way before the first is written: each round waits for L2 once.
template <int READS, typename V, typename N, typename Row>
__device__ __forceinline__ void stage_as(N* shared, int count, int columns, int width, Row row) {
    const unsigned each = sizeof(V) / sizeof(N), per = width / each, all = count * per;
    const unsigned down = blockDim.x / per, right = blockDim.x % per;  // to a thread's next: no division for each
    unsigned b = threadIdx.x / per, k = threadIdx.x % per;
    for (unsigned i = threadIdx.x; i < all; i += READS * blockDim.x) {
        V v[READS];
#pragma unroll
        for (int q = 0; q < READS; q++) {
            const V* const from = reinterpret_cast<const V*>(row(b)) + k;
            v[q] = b < (unsigned)count && k * each < (unsigned)columns ? __ldcg(from) : V{};
            b += down;
            k += right;
            if (k >= per) {
                k -= per;
                b++;
            }
        }
#pragma unroll
        for (int q = 0; q < READS; q++)
            if (i + q * blockDim.x < all) reinterpret_cast<V*>(shared)[i + q * blockDim.x] = v[q];
    }
}

template <int READS, typename N, typename Row>
__device__ __forceinline__ void stage(N* shared, int count, int columns, int width, bool vectors, Row row) {
    if (vectors) stage_as<READS, typename Sixteen<N>::type>(shared, count, columns, width, row);
    else stage_as<READS, N>(shared, count, columns, width, row);
}
