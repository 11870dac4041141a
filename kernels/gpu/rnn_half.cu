// Recurrent layers of 16-bit numbers, forward: a step's products by the matrix units.
//
// A tile is 16 rows of weights: the gates of four units, or 16 units of an RNN. A warp holds KW groups of 32 columns of a tile in
// its registers from the first step to the last; `parts` warps share a tile's columns. Eight rows of the batch are multiplied at
// a time. States have 16 bits, as torch rounds them after each step; sums, cells and the input's product are float. How blocks
// wait for each other: grid.cuh.
#include "grid.cuh"

const int TILE = 16, GROUP = 32, EIGHT = 8;
const int PAD = 32;  // numbers between rows of states in shared memory: 16 banks, so that eight lanes' 16 bytes meet no bank twice

// c += a b: a tile by 16 columns of a (rows r and r + 8, columns 2q and 2q + 8 of lane 4r + q), b of eight rows of the batch
template <typename T> __device__ __forceinline__ void mma(float (&c)[4], const unsigned* a, unsigned b0, unsigned b1) {
#ifdef FASTNN_SHIM
    shim::mma(c, a, b0, b1, [](unsigned short bits) { return widen(T{bits}); });
#else
#define FASTNN_MMA(kind)                                                                                                   \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
                 "{%0, %1, %2, %3};"                                                                                       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if (IsHalf<T>::value) FASTNN_MMA("f16");
    else FASTNN_MMA("bf16");
#undef FASTNN_MMA
#endif
}

template <typename T, int MODE, int KW>
__global__ void __launch_bounds__(256, 1) forward(const __grid_constant__ Call g) {
    SHARED(shared);
    const Place place(g);
    const Job& j = place.job;
    const int units = (int)g.units, parts = (int)g.parts, tiles = blockDim.x / LANES / parts;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, tile = warp / parts, part = warp % parts;
    const int r = lane / 4, q = lane % 4;  // of the tile's rows and of the batch's; of the columns
    const int group = place.group, from = place.from, share = (int)g.share;
    const int gates = MODE == LSTM ? 4 : MODE == GRU ? 3 : 1;
    const int first_unit = (place.block * tiles + tile) * (MODE == RNN ? TILE : 4);
    const int stride = parts * KW * GROUP + PAD;
    unsigned short* const states = reinterpret_cast<unsigned short*>(shared);
    float* const sums = shared + g.staged * stride / 2;                                        // (2, tiles, parts, lanes, 4)
    float* const cells = sums + (parts > 1) * 2 * tiles * parts * LANES * 4 + tile * 4 * share;  // (4, share) of the tile's units
    const unsigned short* const w = reinterpret_cast<const unsigned short*>(j.w_hh);
    T* const y = reinterpret_cast<T*>(j.y);

    // A lane's columns of a group are eight that follow each other, of both operands: the order of a sum's terms is free. A GRU's
    // tile has no row for what its candidate gets from the input, which is in gates_in.
    unsigned weights[KW][8];
    const auto weight = [&](int row, int column) -> unsigned {
        const int unit = first_unit + (MODE == RNN ? row : row % 4), gate = MODE == RNN ? 0 : row / 4;
        if (unit >= units || column >= units || (MODE == GRU && gate == 2)) return 0;
        return w[(i64)((MODE == GRU && gate == 3 ? 2 : gate) * units + unit) * units + column];
    };
#pragma unroll
    for (int k = 0; k < KW; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = r + i % 2 * EIGHT, column = (part * KW + k) * GROUP + q * 8 + i / 2 * 2;
            weights[k][i] = weight(row, column) | weight(row, column + 1) << 16;
        }

    // What becomes of a tile's sums: a lane has one unit and row of the batch, or four of an RNN's.
    const int unit = first_unit + (MODE == RNN ? r : r % 4), column = 2 * q + (MODE == RNN ? 0 : r / 4);
    const float bias = MODE == GRU && j.b_hh && unit < units ? j.b_hh[2 * units + unit] : 0;  // gates_in has the others
    const i64 own = (i64)from * units;  // of the group's rows in h0, c0, h_n and c_n
    const unsigned short* const start = reinterpret_cast<const unsigned short*>(j.h0) + own;
    if (MODE == LSTM && part == 0 && unit < units)
        for (int b = r / 4; b < at_most((int)g.batch - from, share); b += 2)
            if (b % EIGHT == column) cells[r % 4 * share + b] = j.c0[own + (i64)b * units + unit];

    for (i64 s = 0; s < g.steps; s++) {
        const i64 t = j.reverse ? g.steps - 1 - s : s, near = t + (j.reverse ? 1 : -1), next = t + (j.reverse ? -1 : 1);
        const i64 row = row_of(g, t, from);
        const int batch = rows_in(g, t, from), before = rows_in(g, near, from), after = rows_in(g, next, from);
        const unsigned short* const old =  // of rows that have a step before this one
            reinterpret_cast<const unsigned short*>(j.y) + row_of(g, near, from) * j.y_stride + j.y_at;
        for (int first = 0; first == 0 || first < batch; first += (int)g.staged) {
            const int some = at_most(batch - first, (int)g.staged);
            // The input's product with eight rows: of the lane's unit, or of an RNN's two units and two rows of the batch.
            float given[4];
            const auto read = [&](int at) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int b = at + column + (MODE == RNN ? i % 2 : 0), u = unit + (MODE == RNN ? i / 2 * EIGHT : 0);
                    const bool there = part == 0 && b < some && u < units && (MODE == RNN || i < gates);
                    given[i] = there ? j.gates_in[(row + first + b) * gates * units + (MODE == RNN ? 0 : i * units) + u] : 0;
                }
            };
            read(0);
            if (first == 0 && threadIdx.x == 0) await(j.done, group, s * g.blocks);
            __syncthreads();
            const auto state = [&](int b) {
                const bool known = first + b < before;
                return (known ? old : start) + offset(first + b, known ? (int)j.y_stride : units);
            };
            stage<4>(states, some, units, stride, g.vectors, state);  // zeros where a warp's columns are more than there are
            __syncthreads();
            for (int at = 0; at < some; at += EIGHT) {
                float c[4][4] = {};  // four sums side by side: one would wait for itself
                const unsigned short* const mine = states + (at + r) * stride + part * KW * GROUP + q * 8;
#pragma unroll
                for (int k = 0; k < KW; k++) {
                    const uint4 v = *reinterpret_cast<const uint4*>(mine + k * GROUP);
                    mma<T>(c[k % 2 * 2], weights[k], v.x, v.y);
                    mma<T>(c[k % 2 * 2 + 1], weights[k] + 4, v.z, v.w);
                }
                float z[4];
#pragma unroll
                for (int i = 0; i < 4; i++) z[i] = (c[0][i] + c[1][i]) + (c[2][i] + c[3][i]);
                if (parts > 1) {
                    float4* const shares = reinterpret_cast<float4*>(sums) + (at / EIGHT % 2 * tiles + tile) * parts * LANES;
                    shares[part * LANES + lane] = float4{z[0], z[1], z[2], z[3]};
                    __syncthreads();
                    for (int p = 1; p < parts && part == 0; p++) {
                        const float4 v = shares[p * LANES + lane];
                        z[0] += v.x;
                        z[1] += v.y;
                        z[2] += v.z;
                        z[3] += v.w;
                    }
                }
                if (part == 0) {
                    const auto result = [&](int b, int u, float h) {
                        if (b >= some || u >= units) return;
                        const unsigned short bits = narrow<T>(h).bits;
                        __stcg(reinterpret_cast<unsigned short*>(y) + (row + first + b) * j.y_stride + j.y_at + u, bits);
                        if (first + b >= after)  // the sequence's last step
                            reinterpret_cast<unsigned short*>(j.h_n)[own + (i64)(first + b) * units + u] = bits;
                    };
                    if (MODE == RNN) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float a = z[i] + given[i];
                            result(at + column + i % 2, unit + i / 2 * EIGHT, g.relu ? (a < 0 ? 0 : a) : tanhf(a));
                        }
                    } else {
                        // The lane 16 away has the unit's other two gates, of both rows of the batch.
                        const bool upper = r >= 4;
                        const float one = __shfl_xor_sync(0xffffffffu, upper ? z[0] : z[1], 16);
                        const float two = __shfl_xor_sync(0xffffffffu, upper ? z[2] : z[3], 16);
                        float a[5] = {upper ? one : z[0], upper ? z[1] : one, upper ? two : z[2], upper ? z[3] : two, 0};
                        const int b = at + column;
                        const bool inside = b < some && unit < units;
                        float h;
                        if (MODE == LSTM) {  // i, f, g, o
#pragma unroll
                            for (int i = 0; i < 4; i++) a[i] = i == 2 ? tanhf(a[i] + given[i]) : sigmoid(a[i] + given[i]);
                            float* const cell = cells + r % 4 * share + first + b;
                            if (inside) a[4] = *cell = fmaf(a[1], *cell, a[0] * a[2]);
                            h = a[3] * tanhf(a[4]);
                            if (inside && first + b >= after) j.c_n[own + (i64)(first + b) * units + unit] = a[4];
                        } else {  // r, z, the input's and the state's part of n
                            a[0] = sigmoid(a[0] + given[0]);
                            a[1] = sigmoid(a[1] + given[1]);
                            a[3] += bias;
                            a[2] = tanhf(fmaf(a[0], a[3], given[2]));
                            const float last = inside ? widen(T{states[b * stride + unit]}) : 0;
                            h = fmaf(a[1], last - a[2], a[2]);
                        }
                        result(b, unit, h);
                        if (j.kept && inside) {
                            float* const kept = j.kept + (row + first + b) * (MODE == LSTM ? 5 : 4) * units + unit;
#pragma unroll
                            for (int i = 0; i < (MODE == LSTM ? 5 : 4); i++) kept[i * units] = a[i];
                        }
                    }
                }
                read(at + EIGHT);
            }
            if (first + some >= batch) publish(j.done, group);
        }
    }
}
