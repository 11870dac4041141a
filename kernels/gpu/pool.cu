// Pooling. Images of one, two and three dimensions are seen as three: N, C, depth, height, width, with any strides.
//
// A thread makes V outputs next to each other. What lies next to each other is
//   ALONG   pixels of a row (contiguous images), read by 16-byte loads and a few single pixels at the ends,
//   else    channels of a pixel (channels_last), read by 16-byte loads; V = 1 serves all other strides and alignments.
// K, S, P: window, stride and padding where they are known, alike in the last DIMS dimensions (alike in height and width where
// DIMS is 3); before these, windows are one pixel. Such a thread goes down a strip of rows: what the next output needs too
// stays in registers, and all that is new is asked for before any of it is used. K = 0: g has the window.
//
// Maxima: the first of equals, the last NaN, as torch. A maximum's code is its position in the window; where the codes of all
// windows are at hand, a backward gathers: each pixel asks the windows that cover it whether they meant it. No atomics.
#include "common.cuh"

struct Steps { i64 n, c, d, h, w; };       // strides in elements
struct Digit { i64 size, factor, shift; };  // of a thread's number; see `take`

struct Pool {
    i64 x, y, index, codes;  // addresses: image, window side, 64-bit indices or 0, codes or 0
    i64 total;               // threads with work
    i64 channels_first;      // of a thread's number, the fastest digit is: 1 channels, 0 pixels of a row
    i64 c, id, ih, iw, od, oh, ow, kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, adaptive;
    Steps xs, ys, zs;                        // z: index and codes
    Digit channels, depths, strips, across;  // the digits of a thread's number
    i64 strip, wide;                         // rows a thread; whether codes have 32 bits
    i64 divisor, include_pad, lanes, side;   // see `reduce`
};

enum What { MAX, ARGMAX, AVERAGE };
enum { NONE = (int)0x80000000 };  // the code of what is not in the image; it stays negative whatever position is added

template <typename C> struct Item { C value; int code; };

template <typename T> __device__ __forceinline__ T lowest();
template <> __device__ __forceinline__ float lowest<float>() { return __uint_as_float(0xff800000u); }
template <> __device__ __forceinline__ double lowest<double>() { return __uint_as_float(0xff800000u); }
template <> __device__ __forceinline__ bfloat_t lowest<bfloat_t>() { return {0xff80}; }
template <> __device__ __forceinline__ half_t lowest<half_t>() { return {0xfc00}; }

// What joins without effect.
template <int WHAT, typename T> __device__ __forceinline__ T nothing() {
    if constexpr (WHAT == AVERAGE) return T{};
    else return lowest<T>();
}

template <typename C> __device__ __forceinline__ C larger(C a, C b) { return a > b || a != a ? a : b; }
#if !defined(FASTNN_SHIM) && __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ float larger(float a, float b) {  // one instruction; of NaNs, any
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}
#endif

// ORDERED: items come in their codes' order, so that these need no comparison. No branches: lanes would take different ones.
template <int WHAT, bool ORDERED, typename C> __device__ __forceinline__ void join(Item<C>& best, C value, int code) {
    if (WHAT == AVERAGE) best.value += value;
    else if (WHAT == MAX) best.value = larger(value, best.value);
    else {
        const bool nan = value != value, larger = value > best.value, empty = best.code < 0;
        bool better = nan | larger | empty;
        if (!ORDERED) {
            const bool known = best.value == best.value;  // not a NaN already
            better = nan & (known | (code > best.code)) | larger | (value == best.value) & (code < best.code) | empty;
            better &= code >= 0;
        }
        best.value = better ? value : best.value;
        best.code = better ? code : best.code;
    }
}

struct Span { int first, size; };  // of a window in one dimension

__device__ __forceinline__ Span window(int o, i64 n, i64 outs, i64 k, i64 s, i64 p, i64 adaptive) {
    if (!adaptive) return {(int)(o * s - p), (int)k};
    const int first = (int)((i64)o * n / outs);
    return {first, (int)(((i64)(o + 1) * n + outs - 1) / outs) - first};
}

struct Clip { int first, size, skipped; };

// What of a window is in the image, and how many of its pixels are before that.
__device__ __forceinline__ Clip clip(Span w, i64 n, i64 dilation) {
    const int step = (int)dilation, size = (int)n;
    Clip c = {w.first, w.size, 0};
    for (; c.first < 0 && c.size > 0; c.first += step) c.size--, c.skipped++;
    while (c.size > 0 && c.first + (c.size - 1) * step >= size) c.size--;
    return c;
}

// The windows that cover a pixel: the first, and how many. With a dilation some of them have it in a gap.
__device__ __forceinline__ Span covering(int i, i64 n, i64 outs, i64 k, i64 s, i64 p, i64 d, i64 adaptive) {
    i64 low, high;
    if (adaptive) {
        low = (i64)i * outs / n;
        high = ((i64)(i + 1) * outs - 1) / n;
    } else {
        const int after = i + (int)p - (int)((k - 1) * d);
        low = after <= 0 ? 0 : (after + (int)s - 1) / (int)s;
        high = (i + (int)p) / (int)s;
        high = high < outs - 1 ? high : outs - 1;
    }
    return {(int)low, (int)(high - low + 1)};
}

// How many pixels of a dimension a mean counts.
__device__ __forceinline__ int counted(Span w, i64 n, i64 p, i64 include_pad, i64 adaptive) {
    if (adaptive) return w.size;
    const int end = w.first + w.size, past = (int)(include_pad ? n + p : n);
    return (end < past ? end : past) - (include_pad || w.first > 0 ? w.first : 0);
}

// What a mean divides by, in two steps: one for a row of windows, one for each.
__device__ __forceinline__ i64 counted_rows(const Pool& g, Span d, Span h) {
    return (i64)counted(d, g.id, g.pd, g.include_pad, g.adaptive) * counted(h, g.ih, g.ph, g.include_pad, g.adaptive);
}
template <typename C, int K> __device__ __forceinline__ C divisor(const Pool& g, i64 rows, Span w) {
    if (g.divisor) return (C)g.divisor;
    const i64 count = rows * counted(w, g.iw, g.pw, g.include_pad, g.adaptive);
    return K ? (C)(int)count : (C)count;  // known windows are small
}

// Takes the fastest digit off a thread's number: the host knows by what to multiply instead of dividing, below 2^31 threads.
// Only kernels that are FAR meet more.
template <bool FAR> __device__ __forceinline__ int take(i64& number, const Digit& d) {
    if (FAR && d.factor == 0) return take(number, d.size);
    const unsigned all = (unsigned)number, rest = (unsigned)((unsigned long long)all * (unsigned)d.factor >> 31 >> (int)d.shift);
    number = rest;
    return (int)(all - rest * (unsigned)d.size);
}

struct Place { i64 n; int c, d, h, w; };  // in units of what a thread makes: V channels, strips of rows, V pixels

template <bool ALONG, bool FAR> __device__ __forceinline__ Place place(const Pool& g, i64 number) {
    Place at;
    const bool channels = !ALONG && g.channels_first;
    if (channels) at.c = take<FAR>(number, g.channels);
    at.w = take<FAR>(number, g.across);
    at.h = take<FAR>(number, g.strips);
    at.d = take<FAR>(number, g.depths);
    if (!channels) at.c = take<FAR>(number, g.channels);
    at.n = number;
    return at;
}

__device__ __forceinline__ i64 offset(const Steps& s, const Place& at, i64 c) {
    return at.n * s.n + c * s.c + at.d * s.d + at.h * s.h + at.w * s.w;
}

// Without a branch: loads that follow each other are on their way together.
template <typename T, int V> __device__ __forceinline__ void read(T* to, const T* from, bool there) {
    if (!there) return;
    const Vec<T, V> v = load<T, V>(from);
#pragma unroll
    for (int e = 0; e < V; e++) to[e] = v.at[e];
}

// The pixels of one row that a thread's windows see, from where its vectors begin.
template <typename T, int V, bool ALONG, int K, int S, int P> struct Line {
    enum { RIGHT = K - P - S > 0 ? K - P - S : 0, N = ALONG ? P + S * V + RIGHT : K * V };
    T at[N];

    template <int WHAT> __device__ __forceinline__ void fetch(const Pool& g, const T* row, bool there, int w0) {
        const int iw = (int)g.iw;
#pragma unroll
        for (int j = 0; j < N; j++) at[j] = nothing<WHAT, T>();
        if constexpr (ALONG) {
#pragma unroll
            for (int j = 0; j < P; j++) read<T, 1>(at + j, row + j - P, there & (w0 - P + j >= 0));
#pragma unroll
            for (int j = 0; j < S; j++)  // rows have whole vectors
                read<T, V>(at + P + j * V, row + j * V, there & (w0 + j * V < iw));
#pragma unroll
            for (int j = S * V; j < S * V + RIGHT; j++) read<T, 1>(at + P + j, row + j, there & (w0 + j < iw));
        } else {
#pragma unroll
            for (int k = 0; k < K; k++)
                read<T, V>(at + k * V, row + (k - P) * g.xs.w, there & ((unsigned)(w0 - P + k) < (unsigned)iw));
        }
    }

    // Of each window. Pixels past the row's end have the code of their position, but are never better than those before.
    template <int WHAT, typename C> __device__ __forceinline__ void reduce(Item<C> (&items)[V], int w0) const {
#pragma unroll
        for (int e = 0; e < V; e++)
#pragma unroll
            for (int k = 0; k < K; k++) {
                const int j = ALONG ? e * S + k : k;
                const C value = widen(ALONG ? at[j] : at[k * V + e]);
                const int code = j < P && w0 - P + j < 0 ? NONE : k;
                if (k) join<WHAT, true>(items[e], value, code);
                else items[e] = {value, code};
            }
    }
};

template <int WHAT, bool ORDERED, int V, typename C>
__device__ __forceinline__ void join_all(Item<C> (&sum)[V], const Item<C> (&more)[V], int code) {
#pragma unroll
    for (int e = 0; e < V; e++) join<WHAT, ORDERED>(sum[e], more[e].value, more[e].code + code);
}

__device__ __forceinline__ void put_code(const Pool& g, int code, i64 z, Span d, Span h, Span w, int kh, int kw) {
    if (g.codes && g.wide) ((int*)g.codes)[z] = code;
    else if (g.codes) ((unsigned char*)g.codes)[z] = (unsigned char)code;
    if (!g.index) return;
    const int in_w = code % kw, in_h = code / kw % kh, in_d = code / (kw * kh);
    ((i64*)g.index)[z] = ((d.first + in_d * g.dd) * g.ih + h.first + in_h * g.dh) * g.iw + w.first + in_w * g.dw;
}

template <int N> struct Bytes;  // N codes of a byte
template <> struct Bytes<1> { typedef unsigned char type; };
template <> struct Bytes<2> { typedef unsigned short type; };
template <> struct Bytes<4> { typedef unsigned type; };
template <> struct Bytes<8> { typedef unsigned long long type; };

// Writes V outputs, of which `outs` are in the image. y, z and the windows: of the first.
template <typename T, int V, bool ALONG, int K, int S, int WHAT, typename C>
__device__ __forceinline__ void put(const Pool& g, const Item<C> (&items)[V], i64 y, i64 z, Span deep, Span down, Span across,
                                    int outs) {
    Vec<T, V> v;
    const i64 rows = WHAT == AVERAGE ? counted_rows(g, deep, down) : 0;
#pragma unroll
    for (int e = 0; e < V; e++) {
        const Span w = {across.first + (ALONG ? e * S : 0), across.size};
        v.at[e] = narrow<T>(WHAT == AVERAGE ? items[e].value / divisor<C, K>(g, rows, w) : items[e].value);
    }
    const bool whole = !ALONG || g.ow % V == 0;  // else the output's rows do not begin at whole vectors
    if (whole) store<T, V>((T*)g.y + y, v);
    else
#pragma unroll
        for (int e = 0; e < V; e++)
            if (e < outs) ((T*)g.y)[y + e] = v.at[e];
    if (WHAT != ARGMAX) return;
    if (V > 1 && whole && g.codes && !g.wide) {
        typename Bytes<V>::type codes = 0;
#pragma unroll
        for (int e = 0; e < V; e++) codes |= (typename Bytes<V>::type)(items[e].code & 255) << 8 * e;
        *(typename Bytes<V>::type*)((unsigned char*)g.codes + z) = codes;
        return;
    }
#pragma unroll
    for (int e = 0; e < V; e++) {
        const Span w = {across.first + (ALONG ? e * S : 0), across.size};
        const int code = items[e].code < 0 ? 0 : items[e].code;
        if (e < outs) put_code(g, code, z + e, deep, down, w, K ? K : (int)g.kh, K ? K : (int)g.kw);
    }
}

// Rows FROM to TO of the window that begins at row h, where `image` points to, all planes of it.
template <int FROM, int TO, typename T, int V, bool ALONG, int K, int S, int P, int WHAT, int DIMS, typename C, int KH>
__device__ __forceinline__ void gather(const Pool& g, Item<C> (&rows)[KH][V], const T* image, Span deep, int h, int w0) {
    if constexpr (FROM < TO)
        for (int kd = 0; kd < (DIMS == 3 ? deep.size : 1); kd++) {
            const int d = deep.first + kd;
            const bool inside = DIMS < 3 || (unsigned)d < (unsigned)g.id;
            const T* plane = image + d * g.xs.d;
            Line<T, V, ALONG, K, S, P> lines[TO - FROM];
#pragma unroll
            for (int k = FROM; k < TO; k++)
                lines[k - FROM].template fetch<WHAT>(g, plane + k * g.xs.h, inside & ((unsigned)(h + k) < (unsigned)g.ih),
                                                     w0);
#pragma unroll
            for (int k = FROM; k < TO; k++) {
                Item<C> found[V];
                lines[k - FROM].template reduce<WHAT>(found, w0);
                const int code = inside && h + k >= 0 ? kd * KH * K : NONE;
                if (DIMS == 3 && kd > 0) join_all<WHAT, true, V>(rows[k], found, code);
                else
#pragma unroll
                    for (int e = 0; e < V; e++) rows[k][e] = {found[e].value, found[e].code + code};
            }
        }
}

// The window is known.
template <typename T, int V, bool ALONG, int K, int S, int P, int WHAT, int DIMS>
__device__ __forceinline__ void slide(const Pool& g, i64 number) {
    typedef typename Compute<T>::type C;
    constexpr int KH = DIMS == 1 ? 1 : K, SH = DIMS == 1 ? 1 : S, PH = DIMS == 1 ? 0 : P;
    constexpr int KEPT = KH > SH ? KH - SH : 0;  // rows that an output has in common with the next
    const Place at = place<ALONG, false>(g, number);
    const int w0 = at.w * (ALONG ? V * S : S), c = at.c * (ALONG ? 1 : V), ow = at.w * (ALONG ? V : 1);
    const int first = at.h * (int)g.strip, last = first + (int)g.strip < (int)g.oh ? first + (int)g.strip : (int)g.oh;
    const Span deep = DIMS == 3 ? window(at.d, g.id, g.od, g.kd, g.sd, g.pd, 0) : Span{at.d, 1}, across = {w0 - P, K};
    const T* image = (const T*)g.x + at.n * g.xs.n + c * g.xs.c + w0 * g.xs.w;
    i64 y = at.n * g.ys.n + c * g.ys.c + at.d * g.ys.d + first * g.ys.h + ow * g.ys.w;
    i64 z = at.n * g.zs.n + c * g.zs.c + at.d * g.zs.d + first * g.zs.h + ow * g.zs.w;
    Item<C> rows[KH][V], sum[V];
    int h = first * SH - PH;
    image += h * g.xs.h;
    gather<0, KEPT, T, V, ALONG, K, S, P, WHAT, DIMS>(g, rows, image, deep, h, w0);
#pragma unroll 1
    for (int o = first; o < last; o++, h += SH) {
        gather<KEPT, KH, T, V, ALONG, K, S, P, WHAT, DIMS>(g, rows, image, deep, h, w0);
#pragma unroll
        for (int e = 0; e < V; e++) sum[e] = rows[0][e];
#pragma unroll
        for (int k = 1; k < KH; k++) join_all<WHAT, DIMS < 3, V>(sum, rows[k], k * K);
#pragma unroll
        for (int k = 0; k < KEPT; k++)
#pragma unroll
            for (int e = 0; e < V; e++) rows[k][e] = rows[k + SH][e];
        put<T, V, ALONG, K, S, WHAT, C>(g, sum, y, z, deep, {h, KH}, across, ALONG ? (int)g.ow - ow : V);
        image += SH * g.xs.h;
        y += g.ys.h;
        z += g.zs.h;
    }
}

// Any window, and V channels next to each other.
template <typename T, int V, int WHAT> __device__ __forceinline__ void walk(const Pool& g, i64 number) {
    typedef typename Compute<T>::type C;
    const Place at = place<false, true>(g, number);
    const i64 c = (i64)at.c * V;
    const Span deep = window(at.d, g.id, g.od, g.kd, g.sd, g.pd, g.adaptive),
               down = window(at.h, g.ih, g.oh, g.kh, g.sh, g.ph, g.adaptive),
               across = window(at.w, g.iw, g.ow, g.kw, g.sw, g.pw, g.adaptive);
    const Clip d = clip(deep, g.id, g.dd), h = clip(down, g.ih, g.dh), w = clip(across, g.iw, g.dw);
    const T* image = (const T*)g.x + offset(g.xs, {at.n, 0, d.first, h.first, w.first}, c);
    const i64 step_d = g.dd * g.xs.d, step_h = g.dh * g.xs.h, step_w = g.dw * g.xs.w;
    Item<C> best[V];
#pragma unroll
    for (int e = 0; e < V; e++) best[e] = {nothing<WHAT, C>(), NONE};
    for (int kd = 0; kd < d.size; kd++, image += step_d) {
        const T* row = image;
        for (int kh = 0; kh < h.size; kh++, row += step_h) {
            const int code = (int)(((d.skipped + kd) * g.kh + h.skipped + kh) * g.kw) + w.skipped;
            const T* p = row;
#pragma unroll 4
            for (int kw = 0; kw < w.size; kw++, p += step_w) {
                const Vec<T, V> v = load<T, V>(p);
#pragma unroll
                for (int e = 0; e < V; e++) join<WHAT, true>(best[e], (C)widen(v.at[e]), code + kw);
            }
        }
    }
    put<T, V, false, 0, 0, WHAT, C>(g, best, offset(g.ys, at, c), offset(g.zs, at, c), deep, down, across, V);
}

template <typename T, int V, bool ALONG, int K, int S, int P, int WHAT, int DIMS = 2>
__global__ void forward(const Pool g) {
    const i64 number = thread_number();
    if (number >= g.total) return;
    if constexpr (K == 0) walk<T, V, WHAT>(g, number);
    else slide<T, V, ALONG, K, S, P, WHAT, DIMS>(g, number);
}

// What one of g.lanes lanes takes of `count` pixels next to each other, by 16-byte loads where these may begin.
template <typename T, int WHAT, typename C>
__device__ __forceinline__ void take_run(Item<C>& best, const T* p, int count, int lane, int lanes, int code) {
    constexpr int V = 16 / sizeof(T);
    int head = (int)((16 - (i64)p % 16) % 16 / sizeof(T));
    if (count < 4 * V * lanes) head = count;  // not worth it
#pragma unroll 4
    for (int k = lane; k < (head < count ? head : count); k += lanes) join<WHAT, true>(best, (C)widen(p[k]), code + k);
    const int vectors = head < count ? (count - head) / V : 0;
    for (int i = lane; i < vectors; i += 4 * lanes) {  // four at a time are on their way
        Vec<T, V> v[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * lanes < vectors) v[j] = load<T, V>(p + head + (i + j * lanes) * V);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * lanes < vectors)
#pragma unroll
                for (int e = 0; e < V; e++)
                    join<WHAT, true>(best, (C)widen(v[j].at[e]), code + head + (i + j * lanes) * V + e);
    }
    for (int k = head + vectors * V + lane; k < count; k += lanes) join<WHAT, true>(best, (C)widen(p[k]), code + k);
}

#ifdef FASTNN_SHIM
#define SHARED(T, name) T* name = (T*)shim::memory()
#else
#define SHARED(T, name) extern __shared__ __align__(16) unsigned char bytes[]; T* name = (T*)bytes
#endif

// Large windows: g.lanes threads share one. A group of threads, part of a warp or a block, makes g.side outputs, each V channels,
// next to each other.
template <typename T, int WHAT, int V = 1>
__global__ void reduce(const Pool g) {
    typedef typename Compute<T>::type C;
    const int side = (int)g.side, lanes = (int)g.lanes, group = side * lanes, t = threadIdx.x % group, lane = t / side;
    i64 number = thread_number() / group * side + t % side;
    const bool mine = number < g.total && lane == 0;
    if (number >= g.total) number = g.total - 1;  // all of a warp have to be there for the shuffles
    const Place at = place<false, true>(g, number);
    const i64 c = (i64)at.c * V;
    const Span deep = window(at.d, g.id, g.od, g.kd, g.sd, g.pd, g.adaptive),
               down = window(at.h, g.ih, g.oh, g.kh, g.sh, g.ph, g.adaptive),
               across = window(at.w, g.iw, g.ow, g.kw, g.sw, g.pw, g.adaptive);
    const Clip d = clip(deep, g.id, g.dd), h = clip(down, g.ih, g.dh), w = clip(across, g.iw, g.dw);
    const T* image = (const T*)g.x + offset(g.xs, {at.n, 0, d.first, h.first, w.first}, c);
    // Where windows are whole rows, or planes, that lie one behind the other, they are one run.
    const i64 step = g.dw * g.xs.w;
    int run = w.size, rows = h.size, planes = d.size;
    if (run == (int)g.kw && g.dh * g.xs.h == run * step) {
        run *= rows;
        rows = 1;
        if (h.size == (int)g.kh && g.dd * g.xs.d == run * step) {
            run *= planes;
            planes = 1;
        }
    }
    Item<C> best[V];
#pragma unroll
    for (int e = 0; e < V; e++) best[e] = {nothing<WHAT, C>(), NONE};
    for (int kd = 0; kd < planes; kd++)
        for (int kh = 0; kh < rows; kh++) {
            const int code = (int)(((d.skipped + kd) * g.kh + h.skipped + kh) * g.kw) + w.skipped;
            const T* row = image + kd * g.dd * g.xs.d + kh * g.dh * g.xs.h;
            if (V == 1 && step == 1) take_run<T, WHAT, C>(best[0], row, run, lane, lanes, code);
            else
#pragma unroll 4
                for (int k = lane; k < run; k += lanes) {
                    const Vec<T, V> v = load<T, V>(row + k * step);
#pragma unroll
                    for (int e = 0; e < V; e++) join<WHAT, true>(best[e], (C)widen(v.at[e]), code + k);
                }
        }
    for (int other = (group < 32 ? group : 32) / 2; other >= side; other /= 2)
#pragma unroll
        for (int e = 0; e < V; e++) {
            const C value = __shfl_xor_sync(0xffffffffu, best[e].value, other);
            join<WHAT, false>(best[e], value, WHAT == ARGMAX ? __shfl_xor_sync(0xffffffffu, best[e].code, other) : 0);
        }
    if (group > 32) {  // each warp has found something
        SHARED(Item<C>, found);
        if (t % 32 < side)
#pragma unroll
            for (int e = 0; e < V; e++) found[(t / 32 * side + t % 32) * V + e] = best[e];
        __syncthreads();
        if (lane == 0)
            for (int warp = 1; warp < group / 32; warp++)
#pragma unroll
                for (int e = 0; e < V; e++) {
                    const Item<C> more = found[(warp * side + t) * V + e];
                    join<WHAT, false>(best[e], more.value, more.code);
                }
    }
    if (mine)
        put<T, V, false, 0, 0, WHAT, C>(g, best, offset(g.ys, at, c), offset(g.zs, at, c), deep, down, across, V);
}

// The gradient of pixels from the windows that cover them, in the windows' order. x is what is written, y the gradient.

// Any window, and V channels next to each other.
template <typename T, int V, bool AVG> __device__ __forceinline__ void ask(const Pool& g, i64 number) {
    typedef typename Compute<T>::type C;
    typedef typename Bytes<V>::type Codes;
    const Place at = place<false, true>(g, number);
    const i64 c = (i64)at.c * V;
    const Span od = covering(at.d, g.id, g.od, g.kd, g.sd, g.pd, g.dd, g.adaptive),
               oh = covering(at.h, g.ih, g.oh, g.kh, g.sh, g.ph, g.dh, g.adaptive),
               ow = covering(at.w, g.iw, g.ow, g.kw, g.sw, g.pw, g.dw, g.adaptive);
    C sum[V];
#pragma unroll
    for (int e = 0; e < V; e++) sum[e] = 0;
    for (int d = od.first; d < od.first + od.size; d++) {
        const Span deep = window(d, g.id, g.od, g.kd, g.sd, g.pd, g.adaptive);
        const int in_d = at.d - deep.first;
        if (in_d % (int)g.dd) continue;
        for (int h = oh.first; h < oh.first + oh.size; h++) {
            const Span down = window(h, g.ih, g.oh, g.kh, g.sh, g.ph, g.adaptive);
            const int in_h = at.h - down.first;
            if (in_h % (int)g.dh) continue;
            const int code = (int)((in_d / (int)g.dd * g.kh + in_h / (int)g.dh) * g.kw);
            const i64 y = offset(g.ys, {at.n, 0, d, h, 0}, c), z = offset(g.zs, {at.n, 0, d, h, 0}, c);
            const i64 rows = AVG ? counted_rows(g, deep, down) : 0;
            for (int w = ow.first; w < ow.first + ow.size; w++) {
                const Span across = window(w, g.iw, g.ow, g.kw, g.sw, g.pw, g.adaptive);
                const int in_w = at.w - across.first;
                if (in_w % (int)g.dw) continue;
                const Vec<T, V> grad = load<T, V>((const T*)g.y + y + w * g.ys.w);
                if constexpr (AVG) {
                    const C count = divisor<C, 0>(g, rows, across);
#pragma unroll
                    for (int e = 0; e < V; e++) sum[e] += widen(grad.at[e]) / count;
                } else {
                    const int mine = code + in_w / (int)g.dw;
                    const i64 at_z = z + w * g.zs.w;
                    if (g.wide) {
#pragma unroll
                        for (int e = 0; e < V; e++) sum[e] += ((const int*)g.codes)[at_z + e] == mine ? widen(grad.at[e]) : (C)0;
                    } else {
                        const Codes codes = *(const Codes*)((const unsigned char*)g.codes + at_z);
#pragma unroll
                        for (int e = 0; e < V; e++) sum[e] += (int)(codes >> 8 * e & 255) == mine ? widen(grad.at[e]) : (C)0;
                    }
                }
            }
        }
    }
    Vec<T, V> out;
#pragma unroll
    for (int e = 0; e < V; e++) out.at[e] = narrow<T>(sum[e]);
    store<T, V>((T*)g.x + offset(g.xs, at, c), out);
}

// The window is known. Pixels go in groups: the S of a dimension from a window's first one have the same windows, that one and
// M before it. A thread makes a strip of groups, ALONG V pixels wide, else one group of V channels; each row of windows is
// read once.
template <typename T, int V, bool ALONG, int K, int S, int P, bool AVG, int DIMS>
__device__ __forceinline__ void give(const Pool& g, i64 number) {
    typedef typename Compute<T>::type C;
    constexpr int KH = DIMS == 1 ? 1 : K, SH = DIMS == 1 ? 1 : S, PH = DIMS == 1 ? 0 : P, M = (KH - 1) / SH;
    // V is a multiple of S, so that ALONG the windows begin at the same places in each thread's pixels.
    constexpr int LOW = !ALONG ? -((K - 1) / S) : P - K + 1 >= 0 ? (P - K + S) / S : -((K - 1 - P) / S);
    constexpr int HIGH = ALONG ? (V - 1 + P) / S : 0;
    constexpr int N = HIGH - LOW + 1, U = ALONG ? 1 : V;  // windows of a row, and channels
    constexpr int WIDE = ALONG ? V : S, LEFT = ALONG ? 0 : P;  // pixels of a row, and how far before S times their window
    typedef typename Bytes<U>::type Codes;
    const Place at = place<ALONG, false>(g, number);
    const int c = at.c * U, w0 = at.w * WIDE - LEFT, o0 = ALONG ? at.w * (V / S) : at.w, oh = (int)g.oh, ow = (int)g.ow;
    const i64 columns = o0 + LOW;
    const T* grads = (const T*)g.y + at.n * g.ys.n + c * g.ys.c + columns * g.ys.w;
    const unsigned char* codes = (const unsigned char*)g.codes + at.n * g.zs.n + c * g.zs.c + columns * g.zs.w;
    T* image = (T*)g.x + at.n * g.xs.n + c * g.xs.c + at.d * g.xs.d + w0 * g.xs.w;
    const Span od = DIMS == 3 ? covering(at.d, g.id, g.od, g.kd, g.sd, g.pd, 1, 0) : Span{at.d, 1};
    C grad[M + 1][N][U];  // of an average: what each pixel gets
    Codes code[M + 1][N];

    const auto fetch = [&](int m, int d, int h) {  // the windows of a row
        const Span deep = DIMS == 3 ? window(d, g.id, g.od, g.kd, g.sd, g.pd, 0) : Span{d, 1};
        const i64 rows = AVG ? counted_rows(g, deep, {h * SH - PH, KH}) : 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int w = o0 + LOW + j;
            const bool there = ((unsigned)h < (unsigned)oh) & ((unsigned)w < (unsigned)ow);
            T from[U] = {};
            read<T, U>(from, grads + d * g.ys.d + h * g.ys.h + j * g.ys.w, there);
            code[m][j] = 0;
            if (!AVG && there) code[m][j] = *(const Codes*)(codes + d * g.zs.d + h * g.zs.h + j * g.zs.w);
            const C count = AVG && there ? divisor<C, K>(g, rows, {w * S - P, K}) : (C)1;
#pragma unroll
            for (int u = 0; u < U; u++) grad[m][j][u] = AVG ? widen(from[u]) / count : widen(from[u]);
        }
    };
    const int first = at.h * (int)g.strip;
    if (DIMS < 3)  // else each plane of windows is read in its turn
#pragma unroll
        for (int m = 0; m < M; m++) fetch(m, at.d, first - M + m);
#pragma unroll 1
    for (int q = first; q < first + (int)g.strip; q++) {
        C sum[SH][WIDE][U];
#pragma unroll
        for (int a = 0; a < SH; a++)
#pragma unroll
            for (int e = 0; e < WIDE; e++)
#pragma unroll
                for (int u = 0; u < U; u++) sum[a][e][u] = 0;
        for (int d = od.first; d < od.first + od.size; d++) {
            const int before = DIMS == 3 ? (int)(at.d - (d * g.sd - g.pd)) * K * K : 0;  // codes of the planes before this one
            if (DIMS < 3) fetch(M, d, q);
#pragma unroll
            for (int m = 0; m <= M; m++) {
                if (DIMS == 3) fetch(m, d, q - M + m);
#pragma unroll
                for (int a = 0; a < SH; a++) {
                    const int in_h = a + (M - m) * SH;
                    if (in_h >= KH) continue;
#pragma unroll
                    for (int j = 0; j < N; j++)
#pragma unroll
                        for (int e = 0; e < WIDE; e++) {
                            const int in_w = e - LEFT + P - (LOW + j) * S;
                            if (in_w < 0 || in_w >= K) continue;
#pragma unroll
                            for (int u = 0; u < U; u++) {
                                const bool meant = AVG || (int)(code[m][j] >> 8 * u & 255) == before + in_h * K + in_w;
                                sum[a][e][u] += meant ? grad[m][j][u] : (C)0;
                            }
                        }
                }
            }
        }
#pragma unroll
        for (int a = 0; a < SH; a++) {
            const int h = q * SH - PH + a;
            T* row = image + h * g.xs.h;
#pragma unroll
            for (int b = 0; b < (ALONG ? 1 : S); b++) {
                Vec<T, V> out;
#pragma unroll
                for (int e = 0; e < V; e++) out.at[e] = narrow<T>(ALONG ? sum[a][e][0] : sum[a][b][e % U]);
                const bool inside = ((unsigned)h < (unsigned)g.ih) & (ALONG || (unsigned)(w0 + b) < (unsigned)g.iw);
                if (inside) store<T, V>(row + b * g.xs.w, out);
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                code[m][j] = code[m + 1][j];
#pragma unroll
                for (int u = 0; u < U; u++) grad[m][j][u] = grad[m + 1][j][u];
            }
    }
}

template <typename T, int V, bool ALONG, int K, int S, int P, bool AVG, int DIMS = 2>
__global__ void backward(const Pool g) {
    const i64 number = thread_number();
    if (number >= g.total) return;
    if constexpr (K == 0) ask<T, V, AVG>(g, number);
    else give<T, V, ALONG, K, S, P, AVG, DIMS>(g, number);
}

struct Unpool {
    i64 small, large, index, total, c, small_pixels, large_pixels;
    i64 sn, sc, sp, ln, lc, lp, in, ic, ip;  // strides: batch, channel, pixel
};

// large[index] = small, or with BACK small = large[index]. T has the numbers' size; they are only moved.
template <typename T, bool BACK>
__global__ void unpool(const Unpool g) {
    i64 number = thread_number();
    if (number >= g.total) return;
    const int pixel = take(number, g.small_pixels), c = take(number, g.c);
    const i64 to = ((const i64*)g.index)[number * g.in + c * g.ic + pixel * g.ip];
    if (to < 0 || to >= g.large_pixels) __trap();  // torch's own kernel ends with a device-side assertion here
    else {
        T* small = (T*)g.small + number * g.sn + c * g.sc + pixel * g.sp;
        T* large = (T*)g.large + number * g.ln + c * g.lc + to * g.lp;
        if (BACK) *small = *large;
        else *large = *small;
    }
}
