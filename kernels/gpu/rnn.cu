// Recurrent layers: one launch for a whole sequence, layers and directions side by side.
//
// A job is one direction of one layer. It has blocks of its own, each block some of the units, each warp one unit (LSTM, GRU)
// or four (RNN): four rows of weights, which stay in the warp's registers from the first step to the last. A lane holds every
// 32nd group of four columns. Each step every block reads the state that all blocks of its job have written (and the output of
// the layer below), multiplies, sums over the lanes, and writes its part of the new state.
//
// Who waits for whom: a job's counter grows by one as one of its blocks finishes a step. A block waits until its job's counter
// says that the last step is done and the counter of the layer below that its input is there. Layers thus run one step behind
// each other, with no barrier that all wait at. All blocks have to be on the device at once: a cooperative launch.
//
// What other blocks wrote is read past L1 (__ldcg), which is not coherent. Sums have one order, whoever is first.
#include "common.cuh"

enum Mode { LSTM, GRU, RNN };

const int ROWS = 4;    // rows of weights a warp holds: the gates of a unit, or four units
const int TILE = 8;    // rows of the batch that are multiplied together: ROWS · TILE sums, one for each lane in the end
const int LANES = 32;

// One direction of one layer. All arrays are dense, in float.
struct Job {
    const float *below, *w_ih, *w_hh, *b_ih, *b_hh;  // below: outputs of the layer below, or 0 where gates_in has their product
    const float* gates_in;                           // (rows, G·H): the input's product with both biases, or 0
    const float *h0, *c0;
    float *y, *h_n, *c_n, *kept;  // kept: (rows, 5·H or 4·H), or 0
    int* done;                    // this job's counter
    const int *wait0, *wait1;     // counters of the layer below, or 0
    i64 reverse, below_columns, y_stride, y_at;
    // the backward
    const float *grad_y0, *grad_y1;  // gradients of y: the caller's, or what the jobs of the layer above made
    const float *grad_h, *grad_c;
    float *gates_x, *gates_h, *d_below, *d_h0, *d_c0;
    i64 grad_stride, grad_at;
    const int *above0, *above1;      // counters of the jobs above
};

struct Call {
    const i64* starts;  // of each step's rows; 0: all have `batch`
    i64 steps, batch, units, relu;
    i64 blocks, staged, parts, vectors;  // blocks of a job; rows of the batch in shared memory; see backward; 16-byte reads
    Job jobs[12];
};

__device__ __forceinline__ i64 at_most(i64 a, i64 b) { return a < b ? a : b; }

__device__ __forceinline__ float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }

__device__ __forceinline__ i64 row_of(const Call& g, i64 step) { return g.starts ? g.starts[step] : step * g.batch; }
__device__ __forceinline__ int rows_in(const Call& g, i64 step) {
    return g.starts ? (int)(g.starts[step + 1] - g.starts[step]) : (int)g.batch;
}

__device__ __forceinline__ int at_least(const int* counter) {
#ifdef FASTNN_SHIM
    return *counter;
#else
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
#endif
}

// One thread waits, the block behind it.
__device__ __forceinline__ void await(const int* counter, i64 wanted) {
    if (counter == 0 || wanted <= 0) return;
    while (at_least(counter) < wanted) __nanosleep(20);
}

// The block's writes are there for whoever has seen the counter.
__device__ __forceinline__ void publish(int* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
    }
}

// Half of the sums go to the lane HALF away, the other half comes from there. HALF is a template's: an index that is not known at
// compile time would move the sums, and with them the multiplications' results, to local memory.
template <int HALF> __device__ __forceinline__ void fold(float (&sum)[ROWS * TILE]) {
    const bool upper = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float gives = upper ? sum[i] : sum[i + HALF], keeps = upper ? sum[i + HALF] : sum[i];
        sum[i] = keeps + __shfl_xor_sync(0xffffffffu, gives, HALF);
    }
}

// 32 sums of each of 32 lanes → lane l has the total of sum l, by 31 shuffles.
__device__ __forceinline__ float transpose_sum(float (&sum)[ROWS * TILE]) {
    fold<16>(sum);
    fold<8>(sum);
    fold<4>(sum);
    fold<2>(sum);
    fold<1>(sum);
    return sum[0];
}

// sum[row · TILE + b] += weights[row] · vectors[b], the lane's columns only. `vectors`: rows of `width` in shared memory.
template <int KV>
__device__ __forceinline__ void multiply(float (&sum)[ROWS * TILE], const float4 (&weights)[ROWS][KV], const float* vectors,
                                         int count, int width) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int b = 0; b < TILE; b++) {
        if (b < count) {  // the same for all lanes
#pragma unroll
            for (int k = 0; k < KV; k++) {
                const float4 v = *reinterpret_cast<const float4*>(vectors + b * width + k * 128 + lane * 4);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float& s = sum[r * TILE + b];
                    s = fmaf(weights[r][k].x, v.x, s);
                    s = fmaf(weights[r][k].y, v.y, s);
                    s = fmaf(weights[r][k].z, v.z, s);
                    s = fmaf(weights[r][k].w, v.w, s);
                }
            }
        }
    }
}

__device__ __forceinline__ float& part(float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Row `unit` of what a warp multiplies with, a gate's (LSTM, GRU: rows r, z, the input's n, the state's n) or a unit's.
template <int MODE>
__device__ __forceinline__ float weight(const Job& j, int units, int r, int unit, int column) {
    const int row = MODE == RNN ? unit + r : (MODE == GRU && r == 3 ? 2 : r) * units + unit;
    const int below = (int)j.below_columns;
    if ((MODE == RNN ? unit + r : unit) >= units || column >= below + units) return 0;
    if (MODE == GRU && r == (column < below ? 3 : 2)) return 0;  // the candidate's two products are kept apart
    return column < below ? j.w_ih[(i64)row * below + column] : j.w_hh[(i64)row * units + column - below];
}

// The state that row b of a step begins with: that of the step before, or the first.
__device__ __forceinline__ const float* before(const Call& g, const Job& j, i64 step, int b) {
    const i64 near = step + (j.reverse ? 1 : -1);
    if (near < 0 || near >= g.steps || b >= rows_in(g, near)) return j.h0 + (i64)b * g.units;
    return j.y + (row_of(g, near) + b) * j.y_stride + j.y_at;
}

// Copies rows [first, first + count) of the batch to shared memory, `width` numbers each: source(b, k) says where number k of
// row b lies, or 0. Four independent reads are under way at once.
template <typename Source>
__device__ __forceinline__ void stage(float* shared, int first, int count, int width, bool vectors, Source source) {
    if (vectors) {
        const int quads = width / 4;
#pragma unroll 4
        for (int i = threadIdx.x; i < count * quads; i += blockDim.x) {
            const int b = i / quads, k = i % quads * 4;
            const float* from = source(first + b, k);
            reinterpret_cast<float4*>(shared)[i] = from ? __ldcg(reinterpret_cast<const float4*>(from)) : float4{0, 0, 0, 0};
        }
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < count * width; i += blockDim.x) {
            const float* from = source(first + i / width, i % width);
            shared[i] = from ? __ldcg(from) : 0.0f;
        }
    }
}

#ifdef FASTNN_SHIM
#define SHARED(name) float* const name = (float*)shim::memory()
#else
#define SHARED(name) extern __shared__ __align__(16) float name[]
#endif

template <int KV> struct Most { static const int threads = KV <= 2 ? 512 : KV <= 4 ? 384 : 256; };  // leave enough registers

template <int MODE, int KV>
__global__ void __launch_bounds__(Most<KV>::threads, 1) forward(const __grid_constant__ Call g) {
    SHARED(shared);
    const Job& j = g.jobs[blockIdx.x / (unsigned)g.blocks];
    const int units = (int)g.units, warps = blockDim.x / LANES, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int mine = ((int)(blockIdx.x % (unsigned)g.blocks) * warps + warp) * (MODE == RNN ? ROWS : 1);  // the warp's first unit
    const int below = (int)j.below_columns, columns = below + units, width = KV * 128;
    float* const cells = shared + g.staged * width + warp * g.batch;  // of the warp's unit
    float4 weights[ROWS][KV];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < KV; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) part(weights[r][k], i) = weight<MODE>(j, units, r, mine, k * 128 + lane * 4 + i);
    // After a product lane l has the sum of row l / TILE and row l % TILE of the batch.
    const int r = lane / TILE, unit = MODE == RNN ? mine + r : mine;
    const int gate = MODE == RNN ? 0 : MODE == GRU && r == 3 ? 2 : r;
    const bool from_below = MODE != GRU || r != 3, from_state = MODE != GRU || r != 2;  // whose bias a sum has
    float bias = 0;
    if (j.b_ih && unit < units) {  // gates_in has all biases but that of the state's part of n
        if (from_below && !j.gates_in) bias += j.b_ih[gate * units + unit];
        if (from_state && (!j.gates_in || (MODE == GRU && r == 3))) bias += j.b_hh[gate * units + unit];
    }
    if (MODE == LSTM && mine < units)
        for (int b = lane; b < g.batch; b += LANES) cells[b] = j.c0[(i64)b * units + mine];

    for (i64 s = 0; s < g.steps; s++) {
        const i64 t = j.reverse ? g.steps - 1 - s : s, row = row_of(g, t);
        const int batch = rows_in(g, t);
        if (threadIdx.x == 0) {
            await(j.wait0, (t + 1) * g.blocks);
            await(j.wait1, (g.steps - t) * g.blocks);
            await(j.done, s * g.blocks);
        }
        __syncthreads();
        for (int first = 0; first < batch; first += (int)g.staged) {
            const int staged = (int)at_most(batch - first, g.staged);
            if (first) __syncthreads();  // all have read what was there
            stage(shared, first, staged, width, g.vectors, [&](int b, int k) -> const float* {
                return k < below ? j.below + (row + b) * below + k : k < columns ? before(g, j, t, b) + (k - below) : 0;
            });
            __syncthreads();
            for (int tile = 0; tile < staged; tile += TILE) {
                float sum[ROWS * TILE];
#pragma unroll
                for (int i = 0; i < ROWS * TILE; i++) sum[i] = 0;
                multiply<KV>(sum, weights, shared + tile * width, staged - tile, width);
                float z = transpose_sum(sum) + bias;
                const int b = first + tile + lane % TILE;
                const bool inside = lane % TILE < staged - tile && unit < units;
                if (j.gates_in && inside && from_below)
                    z += j.gates_in[(row + b) * (MODE == LSTM ? 4 : MODE == GRU ? 3 : 1) * units + gate * units + unit];
                float h = 0, c = 0;
                if (MODE == RNN) {
                    h = g.relu ? (z < 0 ? 0 : z) : tanhf(z);
                } else {
                    const float act = MODE == LSTM ? (r == 2 ? tanhf(z) : sigmoid(z)) : r < 2 ? sigmoid(z) : z;
                    const float a0 = __shfl_sync(0xffffffffu, act, lane % TILE),
                                a1 = __shfl_sync(0xffffffffu, act, lane % TILE + TILE),
                                a3 = __shfl_sync(0xffffffffu, act, lane % TILE + 3 * TILE);
                    float a2 = __shfl_sync(0xffffffffu, act, lane % TILE + 2 * TILE);
                    if (inside && r == 0) {
                        if (MODE == LSTM) {  // i, f, g, o
                            c = cells[b] = fmaf(a1, cells[b], a0 * a2);
                            h = a3 * tanhf(c);
                        } else {  // r, z, the input's and the state's part of n
                            a2 = tanhf(fmaf(a0, a3, a2));
                            h = fmaf(a1, __ldcg(before(g, j, t, b) + unit) - a2, a2);
                        }
                        if (j.kept) {
                            float* kept = j.kept + (row + b) * (MODE == LSTM ? 5 : 4) * units + unit;
                            kept[0] = a0;
                            kept[units] = a1;
                            kept[2 * units] = a2;
                            kept[3 * units] = a3;
                            if (MODE == LSTM) kept[4 * units] = c;
                        }
                    }
                }
                if (inside && (MODE == RNN || r == 0)) {
                    __stcg(j.y + (row + b) * j.y_stride + j.y_at + unit, h);
                    const i64 next = t + (j.reverse ? -1 : 1);
                    if (next < 0 || next >= g.steps || b >= rows_in(g, next)) {  // the sequence's last step
                        j.h_n[(i64)b * units + unit] = h;
                        if (MODE == LSTM) j.c_n[(i64)b * units + unit] = c;
                    }
                }
            }
        }
        publish(j.done);
    }
}

// Through time. What the gates' gradients of a step, all of them, make of the state before and of the layer below are columns:
// first the layer below's, then the units'. A warp holds four columns' weights, a stretch of KV · 128 gates of them; `parts` warps
// share the columns. The GRU's candidate counts twice, with what came from the input and what came from the state.
// A block then turns the gradients of its own units into those of their gates at the step before, and publishes all.
template <int MODE>
__device__ __forceinline__ float weight_back(const Job& j, int units, int column, int k) {
    const int below = (int)j.below_columns;
    if (column >= below + units || k >= (MODE == RNN ? 1 : 4) * units) return 0;
    const bool down = column < below;
    int row = k;
    if (MODE == GRU && k >= 2 * units) {
        if (down != (k < 3 * units)) return 0;
        row = down ? k : k - units;
    }
    return down ? j.w_ih[(i64)row * below + column] : j.w_hh[(i64)row * units + column - below];
}

template <int MODE, int KV>
__global__ void __launch_bounds__(Most<KV>::threads, 1) backward(const __grid_constant__ Call g) {
    SHARED(shared);
    const Job& j = g.jobs[blockIdx.x / (unsigned)g.blocks];
    const int units = (int)g.units, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, parts = (int)g.parts;
    const int many = (int)(blockDim.x / LANES / g.parts) * ROWS;  // columns of a block
    const int first_column = (int)(blockIdx.x % (unsigned)g.blocks) * many, quad = warp / parts * ROWS, stretch = warp % parts;
    const int below = (int)j.below_columns, width = parts * KV * 128, gates = MODE == LSTM ? 4 : MODE == GRU ? 3 : 1;
    float* const sums = shared + g.staged * width;         // (parts, many, batch)
    float* const carry = sums + parts * many * g.batch;    // (many, batch): the gradient of the state, as far as it is known
    float* const d_cell = carry + many * g.batch;          // (many, batch)
    float4 weights[ROWS][KV];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < KV; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                part(weights[r][k], i) =
                    weight_back<MODE>(j, units, first_column + quad + r, (stretch * KV + k) * 128 + lane * 4 + i);
    for (int i = threadIdx.x; i < many * (int)g.batch; i += blockDim.x) {
        const int unit = first_column + i / (int)g.batch - below, b = i % (int)g.batch;
        const bool inside = unit >= 0 && unit < units;
        carry[i] = inside ? j.grad_h[(i64)b * units + unit] : 0;
        d_cell[i] = inside && MODE == LSTM ? j.grad_c[(i64)b * units + unit] : 0;
    }

    for (i64 s = 0; s <= g.steps; s++) {
        const i64 t = j.reverse ? s : g.steps - 1 - s, last = j.reverse ? t - 1 : t + 1;  // last: whose gates are known
        const int done = s ? rows_in(g, last) : 0, batch = s < g.steps ? rows_in(g, t) : 0;
        const i64 row = s < g.steps ? row_of(g, t) : 0, last_row = s ? row_of(g, last) : 0;
        if (threadIdx.x == 0) {
            await(j.done, s * g.blocks);
            if (s < g.steps) {  // what a layer above makes of a step, it makes while it turns to the next
                await(j.above0, (g.steps - t + 1) * g.blocks);
                await(j.above1, (t + 2) * g.blocks);
            }
        }
        __syncthreads();
        for (int first = 0; first < done; first += (int)g.staged) {
            const int staged = (int)at_most(done - first, g.staged);
            if (first) __syncthreads();
            stage(shared, first, staged, width, g.vectors, [&](int b, int k) -> const float* {
                if (k < gates * units) return j.gates_x + (last_row + b) * gates * units + k;
                return MODE == GRU && k < 4 * units ? j.gates_h + (last_row + b) * gates * units + (k - units) : 0;
            });
            __syncthreads();
            for (int tile = 0; tile < staged; tile += TILE) {
                float sum[ROWS * TILE];
#pragma unroll
                for (int i = 0; i < ROWS * TILE; i++) sum[i] = 0;
                multiply<KV>(sum, weights, shared + tile * width + stretch * KV * 128, staged - tile, width);
                const float z = transpose_sum(sum);
                if (lane % TILE < staged - tile)
                    sums[(stretch * many + quad + lane / TILE) * g.batch + first + tile + lane % TILE] = z;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < many * (int)g.batch; i += blockDim.x) {
            const int column = first_column + i / (int)g.batch, b = i % (int)g.batch, unit = column - below;
            if (unit >= units) continue;
            if (b < done) {
                float total = 0;
                for (int p = 0; p < parts; p++) total += sums[p * many * g.batch + i];
                if (unit < 0) __stcg(j.d_below + (last_row + b) * below + column, total);
                else carry[i] += total;
            }
            if (unit < 0 || b >= batch) continue;
            const i64 at = (row + b) * j.grad_stride + j.grad_at + unit;
            float d = carry[i] + __ldcg(j.grad_y0 + at);
            if (j.grad_y1) d += __ldcg(j.grad_y1 + at);
            const float* kept = j.kept + (row + b) * (MODE == LSTM ? 5 : 4) * units + unit;
            float* to = j.gates_x + (row + b) * gates * units + unit;
            if (MODE == LSTM) {
                const float a = kept[0], f = kept[units], n = kept[2 * units], o = kept[3 * units], c = tanhf(kept[4 * units]);
                const i64 near = t + (j.reverse ? 1 : -1);
                const float old = near < 0 || near >= g.steps || b >= rows_in(g, near)
                                      ? j.c0[(i64)b * units + unit]
                                      : j.kept[(row_of(g, near) + b) * 5 * units + 4 * units + unit];
                const float dc = fmaf(d * o, 1 - c * c, d_cell[i]);
                __stcg(to, dc * n * a * (1 - a));
                __stcg(to + units, dc * old * f * (1 - f));
                __stcg(to + 2 * units, dc * a * (1 - n * n));
                __stcg(to + 3 * units, d * c * o * (1 - o));
                d_cell[i] = dc * f;
                carry[i] = 0;
            } else if (MODE == GRU) {
                const float r = kept[0], z = kept[units], n = kept[2 * units], state = kept[3 * units];
                const float old = before(g, j, t, b)[unit], d_n = d * (1 - z) * (1 - n * n), d_r = d_n * state * r * (1 - r),
                            d_z = d * (old - n) * z * (1 - z);
                float* also = j.gates_h + (row + b) * gates * units + unit;
                __stcg(to, d_r);
                __stcg(to + units, d_z);
                __stcg(to + 2 * units, d_n);
                __stcg(also, d_r);
                __stcg(also + units, d_z);
                __stcg(also + 2 * units, d_n * r);
                carry[i] = d * z;
            } else {
                const float y = j.y[(row + b) * j.y_stride + j.y_at + unit];
                __stcg(to, g.relu ? (y > 0 ? d : 0) : d * (1 - y * y));
                carry[i] = 0;
            }
        }
        publish(j.done);
    }
    for (int i = threadIdx.x; i < many * (int)g.batch; i += blockDim.x) {
        const int unit = first_column + i / (int)g.batch - below, b = i % (int)g.batch;
        if (unit < 0 || unit >= units) continue;
        j.d_h0[(i64)b * units + unit] = carry[i];
        if (MODE == LSTM) j.d_c0[(i64)b * units + unit] = d_cell[i];
    }
}

struct Scan {
    i64 f, u, c0, out, steps, columns, reverse;
};

// c_t = f_t · c_{t-1} + u_t, a column a thread; eight steps are read ahead.
template <typename T>
__global__ void scan(const Scan g) {
    typedef typename Compute<T>::type C;
    const i64 column = thread_number();
    if (column >= g.columns) return;
    const i64 step = g.reverse ? -g.columns : g.columns, first = (g.reverse ? (g.steps - 1) * g.columns : 0) + column;
    C c = widen(((const T*)g.c0)[column]);
    for (i64 t = 0; t < g.steps; t += 8) {
        T f[8], u[8];
        const int many = (int)at_most(8, g.steps - t);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < many) {
                f[i] = ((const T*)g.f)[first + (t + i) * step];
                u[i] = ((const T*)g.u)[first + (t + i) * step];
            }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < many) {
                c = widen(f[i]) * c + widen(u[i]);
                ((T*)g.out)[first + (t + i) * step] = narrow<T>(c);
            }
    }
}
