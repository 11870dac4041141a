// Recurrent layers: one launch for a whole sequence, layers or directions side by side.
//
// A job's blocks each have some of the units, each warp one unit (LSTM, GRU) or four (RNN): their rows of weights stay in the
// warp's registers from the first step to the last, and in shared memory what has no room there. A lane holds every 32nd group of
// four columns. Each step every block reads
// the state that all blocks of its job have written (and the output of the layer below), multiplies, sums over the lanes, and
// writes its part of the new state. It waits for the layer below and multiplies what that made; only then it needs its own
// job's last step, whose news has been on its way meanwhile (grid.cuh). Sums have one order, whoever is first.
#include "grid.cuh"

const int ROWS = 4;           // sums a row of the batch that a warp makes: the gates of a unit, or four units
const int FULL = 8, FEW = 2;  // rows of the batch that are multiplied together: eight, and at the end two more

// Half of the sums go to the lane `bit` away, the other half comes from there. HALF is a template's: an index that is not known
// at compile time would move the sums, and with them the multiplications' results, to local memory.
template <int HALF, int N> __device__ __forceinline__ void fold(float (&sum)[N], int bit) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float gives = upper ? sum[i] : sum[i + HALF], keeps = upper ? sum[i + HALF] : sum[i];
        sum[i] = keeps + __shfl_xor_sync(0xffffffffu, gives, bit);
    }
}

// What a lane has summed over its columns: [row · FULL + b] of eight rows of the batch, [row · FEW + b] of two more.
struct Sums {
    float full[ROWS * FULL], few[ROWS * FEW];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS * FULL; i++) full[i] = 0;
#pragma unroll
        for (int i = 0; i < ROWS * FEW; i++) few[i] = 0;
    }
    // 32 sums of each of 32 lanes → lane l has the total of row l / FULL and b = l % FULL, by 31 shuffles.
    __device__ __forceinline__ float total() {
        fold<16>(full, 16);
        fold<8>(full, 8);
        fold<4>(full, 4);
        fold<2>(full, 2);
        fold<1>(full, 1);
        return full[0];
    }
    // The same of the two, by nine: lane l has row l / FULL and b = l % FEW.
    __device__ __forceinline__ float few_total() {
        fold<4>(few, 16);
        fold<2>(few, 8);
        fold<1>(few, 1);
        few[0] += __shfl_xor_sync(0xffffffffu, few[0], 2);
        return few[0] + __shfl_xor_sync(0xffffffffu, few[0], 4);
    }
};

// How many of so many rows are next.
__device__ __forceinline__ int next_rows(int left) { return left <= FULL + FEW ? left : FULL; }

__device__ __forceinline__ float& part(float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// N rows of a warp's weights, a lane's columns: K groups in registers, `more` in shared memory, where each lane reads its own.
template <int N, int K> struct Weights {
    float4 held[N][K];
    float4* rest;  // (more, N, LANES)

    // number(n, column) of row n; 0 beyond the last
    template <typename Number> __device__ __forceinline__ void fill(float* shared, int more, Number number) {
        const int lane = threadIdx.x % LANES;
        const auto four = [&](int n, int k) {
            float4 v;
#pragma unroll
            for (int i = 0; i < 4; i++) part(v, i) = number(n, k * 128 + lane * 4 + i);
            return v;
        };
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int k = 0; k < K; k++) held[n][k] = four(n, k);
        rest = reinterpret_cast<float4*>(shared) + lane;
#pragma unroll 1
        for (int i = 0; i < N * more; i++) rest[i * LANES] = four(i % N, K + i / N);
    }
};

// Adds weights[row] · vectors[b], the lane's columns only; the last row's product goes to sum LAST.
template <int LAST, int N, int K>
__device__ __forceinline__ void multiply(Sums& sums, const Weights<N, K>& weights, int more, const float* vectors, int count,
                                         int width) {
    const float* const mine = vectors + threadIdx.x % LANES * 4;
    const auto add = [&](int n, int b, const float4& w, const float4& v) {
        const int r = n < N - 1 ? n : LAST;
        float& s = b < FULL ? sums.full[r * FULL + b] : sums.few[r * FEW + b - FULL];
        s = fmaf(w.x, v.x, s);
        s = fmaf(w.y, v.y, s);
        s = fmaf(w.z, v.z, s);
        s = fmaf(w.w, v.w, s);
    };
#pragma unroll
    for (int b = 0; b < FULL + FEW; b++) {
        if (b < count) {  // the same for all lanes
#pragma unroll
            for (int k = 0; k < K; k++) {
                const float4 v = *reinterpret_cast<const float4*>(mine + b * width + k * 128);
#pragma unroll
                for (int n = 0; n < N; n++) add(n, b, weights.held[n][k], v);
            }
        }
    }
#pragma unroll 1
    for (int k = 0; k < more; k++) {
        float4 w[N];
#pragma unroll
        for (int n = 0; n < N; n++) w[n] = weights.rest[(k * N + n) * LANES];
#pragma unroll
        for (int b = 0; b < FULL + FEW; b++) {
            if (b < count) {
                const float4 v = *reinterpret_cast<const float4*>(mine + b * width + (K + k) * 128);
#pragma unroll
                for (int n = 0; n < N; n++) add(n, b, w[n], v);
            }
        }
    }
}

// Threads of a block, so that each has the registers for KV · 128 columns of weights; WARPS in rnn.py.
template <int KV> struct Most { static const int threads = KV <= 4 ? 384 : 256; };

// KV · 128 columns: of the state, or half of them, and the other half of the layer below where there are such layers (BELOW).
template <int MODE, int KV, bool BELOW = false, bool MORE = false>
__global__ void __launch_bounds__(Most<KV>::threads, 1) forward(const __grid_constant__ Call g) {
    SHARED(shared);
    const int K = KV / (1 + BELOW);
    const Place place(g);
    const Job& j = place.job;
    const int units = (int)g.units, warps = blockDim.x / LANES, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int group = place.group, from = place.from, share = (int)g.share;
    const int mine = (place.block * warps + warp) * (MODE == RNN ? ROWS : 1);  // the warp's first unit
    const int held = MODE == GRU ? 3 : ROWS, gates = MODE == LSTM ? 4 : MODE == GRU ? 3 : 1;
    const int more = MORE ? (int)g.more : 0, width = (K + more) * 128, rest = held * more * 128;  // rest: of a warp
    const bool below = BELOW && j.below;
    float* const states = shared + warps * (1 + BELOW) * rest;
    float* const inputs = states + g.staged * width;                             // where there is a layer below
    float* const cells = inputs + (BELOW ? g.staged * width : 0) + warp * share;  // of the warp's unit

    // The candidate of a GRU has two sums, 2 of the input and 3 of the state; the other gates have one.
    Weights<held, K> of_state, of_input;
    const auto weight = [&](const float* w, int n, int column) {
        const int row = MODE == RNN ? mine + n : n * units + mine;
        return (MODE == RNN ? row : mine) < units && column < units ? w[(i64)row * units + column] : 0.0f;
    };
    of_state.fill(shared + warp * rest, more, [&](int n, int column) { return weight(j.w_hh, n, column); });
    if (below)
        of_input.fill(shared + (warps + warp) * rest, more, [&](int n, int column) { return weight(j.w_ih, n, column); });

    // After a product a lane has the sum of row lane / FULL.
    const int r = lane / FULL, unit = MODE == RNN ? mine + r : mine;
    const int gate = MODE == RNN ? 0 : MODE == GRU && r == 3 ? 2 : r;
    const bool of_below = MODE != GRU || r != 3, of_own = MODE != GRU || r != 2;  // whose bias a sum has
    float bias = 0;
    if (j.b_ih && unit < units) {  // gates_in has all biases but that of the state's part of n
        if (of_below && !j.gates_in) bias += j.b_ih[gate * units + unit];
        if (of_own && (!j.gates_in || (MODE == GRU && r == 3))) bias += j.b_hh[gate * units + unit];
    }
    const i64 own = (i64)from * units;  // of the group's rows in h0, c0, h_n and c_n
    const float* const start = j.h0 + own;
    const int stride = (int)j.y_stride;
    if (MODE == LSTM && mine < units)
        for (int b = lane; b < at_most((int)g.batch - from, share); b += LANES) cells[b] = j.c0[own + (i64)b * units + mine];

    for (i64 s = 0; s < g.steps; s++) {
        const i64 t = j.reverse ? g.steps - 1 - s : s, near = t + (j.reverse ? 1 : -1), next = t + (j.reverse ? -1 : 1);
        const i64 row = row_of(g, t, from);
        const int batch = rows_in(g, t, from), before = rows_in(g, near, from), after = rows_in(g, next, from);
        const float* const old = j.y + row_of(g, near, from) * j.y_stride + j.y_at;  // of rows that have a step before this one
        const float* const input = j.below + row * units;
        if (below) {
            if (threadIdx.x == 0) await(j.wait, group, (t + 1) * g.blocks);
            __syncthreads();
        }
        for (int first = 0; first == 0 || first < batch; first += (int)g.staged) {
            const int some = at_most(batch - first, (int)g.staged);
            Sums sums;
            float given = 0, few_given = 0;
            // The part of a product that needs nothing of the last step
            const auto begin = [&](int at) {
                const int count = next_rows(some - at);
                if (j.gates_in && of_below && unit < units) {
                    const float* from_input = j.gates_in + (row + first + at) * gates * units + gate * units + unit;
                    if (lane % FULL < count) given = from_input[(i64)(lane % FULL) * gates * units];
                    if (FULL + lane % FEW < count) few_given = from_input[(i64)(FULL + lane % FEW) * gates * units];
                }
                sums.clear();
                if (below) multiply<MODE == GRU ? 2 : 3>(sums, of_input, more, inputs + at * width, count, width);
            };
            if (below) {
                if (first) __syncthreads();  // all have read what was there
                stage<4>(inputs, some, units, width, g.vectors, [&](int b) { return input + offset(first + b, units); });
                __syncthreads();
            }
            begin(0);
            if (first == 0 && threadIdx.x == 0) await(j.done, group, s * g.blocks);
            __syncthreads();
            stage<BELOW ? 4 : 8>(states, some, units, width, g.vectors, [&](int b) {
                const bool known = first + b < before;
                return (known ? old : start) + offset(first + b, known ? stride : units);
            });
            __syncthreads();
            for (int at = 0; at < some;) {
                const int count = next_rows(some - at);
                if (at) begin(at);
                multiply<3>(sums, of_state, more, states + at * width, count, width);
                // From a sum of each lane to a row's new state; a[4] is the cell.
                const auto finish = [&](float z, int b, bool inside, float (&a)[5]) {
                    float h;
                    if (MODE == RNN) {
                        h = g.relu ? (z < 0 ? 0 : z) : tanhf(z);
                    } else {
                        const float act = MODE == LSTM ? (r == 2 ? tanhf(z) : sigmoid(z)) : r < 2 ? sigmoid(z) : z;
#pragma unroll
                        for (int i = 0; i < 4; i++) a[i] = __shfl_sync(0xffffffffu, act, lane % FULL + i * FULL);
                        if (!inside) return;
                        if (MODE == LSTM) {  // i, f, g, o
                            a[4] = cells[first + at + b] = fmaf(a[1], cells[first + at + b], a[0] * a[2]);
                            h = a[3] * tanhf(a[4]);
                        } else {  // r, z, the input's and the state's part of n
                            a[2] = tanhf(fmaf(a[0], a[3], a[2]));
                            h = fmaf(a[1], states[(at + b) * width + unit] - a[2], a[2]);
                        }
                    }
                    if (!inside) return;
                    __stcg(j.y + (row + first + at + b) * j.y_stride + j.y_at + unit, h);
                    if (first + at + b >= after) {  // the sequence's last step
                        j.h_n[own + (i64)(first + at + b) * units + unit] = h;
                        if (MODE == LSTM) j.c_n[own + (i64)(first + at + b) * units + unit] = a[4];
                    }
                };
                const auto keep = [&](int b, bool inside, const float (&a)[5]) {
                    if (MODE == RNN || !j.kept || !inside) return;
                    float* const kept = j.kept + (row + first + at + b) * (MODE == LSTM ? 5 : 4) * units + unit;
#pragma unroll
                    for (int i = 0; i < (MODE == LSTM ? 5 : 4); i++) kept[i * units] = a[i];
                };
                const bool owner = unit < units && (MODE == RNN || r == 0);
                const bool inside = owner && lane % FULL < count, few_inside = owner && FULL + lane % FULL < count;
                float a[5], few_a[5];
                finish(sums.total() + bias + given, lane % FULL, inside, a);
                if (count > FULL) finish(sums.few_total() + bias + few_given, FULL + lane % FULL, few_inside, few_a);
                if (first + at + count >= batch) publish(j.done, group);  // what nobody waits for is written behind it
                keep(lane % FULL, inside, a);
                if (count > FULL) keep(FULL + lane % FULL, few_inside, few_a);
                at += count;
            }
        }
        if (batch == 0) publish(j.done, group);
    }
}

// Through time. What the gates' gradients of a step, all of them, make of the state before and of the layer below are columns, of
// which a warp holds four of each, a stretch of the gates of them; `parts` warps share the columns. Those of the state come first: a
// block turns the gradients of its own units into those of their gates at the step before, and publishes them. While that is on
// its way it multiplies for the layer below, which is published with the step after. A GRU's candidate has one gradient for what
// came from the input (gates_x) and another for what came from the state (gates_h).
template <int MODE, int KV, bool BELOW = false, bool MORE = false>
__global__ void __launch_bounds__(Most<KV>::threads, 1) backward(const __grid_constant__ Call g) {
    SHARED(shared);
    const int K = KV / (1 + BELOW);
    const Place place(g);
    const Job& j = place.job;
    const int units = (int)g.units, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, parts = (int)g.parts;
    const int group = place.group, from = place.from, share = (int)g.share;
    const int many = (int)(blockDim.x / LANES / g.parts) * ROWS;  // units of a block, and columns of the layer below
    const int first_unit = place.block * many, quad = warp / parts * ROWS, stretch = warp % parts;
    const int gates = MODE == LSTM ? 4 : MODE == GRU ? 3 : 1;
    const int more = MORE ? (int)g.more : 0, length = (K + more) * 128, width = parts * length;  // length: of a stretch
    const int numbers = many * share, row_size = gates * units, rest = ROWS * more * 128, warps = blockDim.x / LANES;
    float* const rows_of_gates = shared + warps * (1 + BELOW) * rest;
    float* const sums = rows_of_gates + g.staged * width;  // (parts, many, share)
    float* const carry = sums + parts * numbers;           // (share, many): the gradient of the state, as far as it is known
    float* const d_cell = carry + numbers;                 // (share, many)
    Weights<ROWS, K> of_state, of_input;
    const auto weight = [&](const float* w, int n, int at) {
        const int k = stretch * length + at, column = first_unit + quad + n;
        return k < gates * units && column < units ? w[(i64)k * units + column] : 0.0f;
    };
    of_state.fill(shared + warp * rest, more, [&](int n, int at) { return weight(j.w_hh, n, at); });
    const bool below = BELOW && j.d_below;
    if (below) of_input.fill(shared + (warps + warp) * rest, more, [&](int n, int at) { return weight(j.w_ih, n, at); });
    const i64 own = (i64)from * units + first_unit;  // of the block's units in h0, c0 and their gradients
    const int most = at_most((int)g.batch - from, share), inside = at_most(units - first_unit, many);
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
        const int u = i % many, b = i / many;
        const bool there = u < inside && b < most;
        carry[i] = there ? j.grad_h[own + (i64)b * units + u] : 0;
        d_cell[i] = there && MODE == LSTM ? j.grad_c[own + (i64)b * units + u] : 0;
    }

    for (i64 s = 0; s <= g.steps; s++) {
        const i64 t = j.reverse ? s : g.steps - 1 - s, last = t + (j.reverse ? -1 : 1), near = t + (j.reverse ? 1 : -1);
        const int done = rows_in(g, last, from), batch = rows_in(g, t, from), before = rows_in(g, near, from);
        const i64 row = row_of(g, t, from), last_row = row_of(g, last, from), near_row = row_of(g, near, from);

        // What the block's numbers are multiplied with is from launches before: it is read while the block waits.
        struct Known { float gate[5], old; };
        const auto known = [&](int i) {
            Known v;
            const int u = i % many, b = i / many, unit = first_unit + u;
            if (u < inside && b < batch) {
                const float* kept = j.kept + (row + b) * (MODE == LSTM ? 5 : 4) * units + unit;
                if (MODE == RNN) {
                    v.gate[0] = j.y[(row + b) * j.y_stride + j.y_at + unit];
                } else {
#pragma unroll
                    for (int q = 0; q < (MODE == LSTM ? 5 : 4); q++) v.gate[q] = kept[q * units];
                    if (MODE == LSTM)
                        v.old = b < before ? j.kept[(near_row + b) * 5 * units + 4 * units + unit] : j.c0[own + (i64)b * units + u];
                    else
                        v.old = b < before ? j.y[(near_row + b) * j.y_stride + j.y_at + unit] : j.h0[own + (i64)b * units + u];
                }
            }
            return v;
        };
        const auto grad = [&](int i) {
            const int u = i % many, b = i / many;
            return u < inside && b < batch ? __ldcg(j.grad_y + (row + b) * j.grad_stride + j.grad_at + first_unit + u) : 0.0f;
        };
        Known v = known(threadIdx.x);
        if (threadIdx.x == 0) await(j.done, group, s * g.blocks);
        // What the job above makes of a step, it makes as it turns to the next, and publishes with the one after.
        if (threadIdx.x == 1 && s < g.steps) await(j.above, group, (s + 3) * g.blocks);
        __syncthreads();
        float d_y = grad(threadIdx.x);

        // The columns' sums over the gates of the last step, which are in shared memory from one product to the next if they fit.
        const auto product = [&](const Weights<ROWS, K>& weights, const float* from_gates, bool again) {
            for (int first = 0; first < done; first += (int)g.staged) {
                const int some = at_most(done - first, (int)g.staged);
                if (first) __syncthreads();
                if (!again || done > g.staged) {
                    const float* const rows = from_gates + (last_row + first) * row_size;
                    stage<8>(rows_of_gates, some, row_size, width, g.vectors, [&](int b) { return rows + offset(b, row_size); });
                    __syncthreads();
                }
                for (int at = 0; at < some;) {
                    const int count = next_rows(some - at);
                    Sums part;
                    part.clear();
                    multiply<3>(part, weights, more, rows_of_gates + at * width + stretch * length, count, width);
                    float* const to = sums + (stretch * many + quad + lane / FULL) * share + first + at;
                    const float full = part.total();
                    if (lane % FULL < count) to[lane % FULL] = full;
                    if (count > FULL) {
                        const float few = part.few_total();
                        if (FULL + lane % FULL < count) to[FULL + lane % FULL] = few;
                    }
                    at += count;
                }
            }
            __syncthreads();
        };
        const auto total = [&](int u, int b) {
            float sum = 0;
            for (int p = 0; p < parts; p++) sum += sums[(p * many + u) * share + b];
            return sum;
        };
        product(of_state, MODE == GRU ? j.gates_h : j.gates_x, false);
        for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
            if (i != threadIdx.x) {
                v = known(i);
                d_y = grad(i);
            }
            const int u = i % many, b = i / many;
            if (u >= inside) continue;
            if (b < done) carry[i] += total(u, b);
            if (b >= batch) continue;
            const float d = carry[i] + d_y;
            float* const to = j.gates_x + (row + b) * gates * units + first_unit + u;
            if (MODE == LSTM) {
                const float a = v.gate[0], f = v.gate[1], n = v.gate[2], o = v.gate[3], c = tanhf(v.gate[4]);
                const float dc = fmaf(d * o, 1 - c * c, d_cell[i]);
                __stcg(to, dc * n * a * (1 - a));
                __stcg(to + units, dc * v.old * f * (1 - f));
                __stcg(to + 2 * units, dc * a * (1 - n * n));
                __stcg(to + 3 * units, d * c * o * (1 - o));
                d_cell[i] = dc * f;
                carry[i] = 0;
            } else if (MODE == GRU) {
                const float r = v.gate[0], z = v.gate[1], n = v.gate[2], state = v.gate[3];
                const float d_n = d * (1 - z) * (1 - n * n), d_r = d_n * state * r * (1 - r), d_z = d * (v.old - n) * z * (1 - z);
                float* also = j.gates_h + (row + b) * gates * units + first_unit + u;
                __stcg(to, d_r);
                __stcg(to + units, d_z);
                __stcg(to + 2 * units, d_n);
                __stcg(also, d_r);
                __stcg(also + units, d_z);
                __stcg(also + 2 * units, d_n * r);
                carry[i] = d * z;
            } else {
                const float y = v.gate[0];
                __stcg(to, g.relu ? (y > 0 ? d : 0) : d * (1 - y * y));
                carry[i] = 0;
            }
        }
        publish(j.done, group);
        if (below) {
            product(of_input, j.gates_x, MODE != GRU);
            for (int i = threadIdx.x; i < many * done; i += blockDim.x)
                if (i % many < inside)
                    __stcg(j.d_below + (last_row + i / many) * units + first_unit + i % many, total(i % many, i / many));
        }
    }
    if (threadIdx.x == 0) await(j.done, group, (g.steps + 1) * g.blocks);  // nobody's count takes another's place
    publish(j.done, group);
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
        const int u = i % many, b = i / many;
        if (u >= inside || b >= most) continue;
        j.d_h0[own + (i64)b * units + u] = carry[i];
        if (MODE == LSTM) j.d_c0[own + (i64)b * units + u] = d_cell[i];
    }
}

struct Scan {
    i64 f, u, c0, out, steps, columns, reverse;
};

const int AHEAD = 8;

// What a column needs for some steps.
template <typename T> struct Steps {
    T f[AHEAD], u[AHEAD];

    __device__ __forceinline__ void read(const Scan& g, i64 first, i64 step, i64 left) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (i < left) {
                f[i] = ((const T*)g.f)[first + i * step];
                u[i] = ((const T*)g.u)[first + i * step];
            }
    }
};

// c_t = f_t · c_{t-1} + u_t, a column a thread. While eight steps are computed the next eight are read.
template <typename T>
__global__ void scan(const Scan g) {
    typedef typename Compute<T>::type C;
    const i64 column = thread_number();
    if (column >= g.columns) return;
    const i64 step = g.reverse ? -g.columns : g.columns;
    i64 at = (g.reverse ? (g.steps - 1) * g.columns : 0) + column;
    C c = widen(((const T*)g.c0)[column]);
    Steps<T> now;
    now.read(g, at, step, g.steps);
    for (i64 left = g.steps; left > 0; left -= AHEAD, at += AHEAD * step) {
        Steps<T> next;
        next.read(g, at + AHEAD * step, step, left - AHEAD);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (i < left) {
                c = widen(now.f[i]) * c + widen(now.u[i]);
                ((T*)g.out)[at + i * step] = narrow<T>(c);
            }
        now = next;
    }
}
