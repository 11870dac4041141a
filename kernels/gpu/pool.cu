// Pooling. Images of one, two and three dimensions are seen as three: N, C, depth, height, width, with any strides.
//
// A thread makes V outputs next to each other, in a strip of rows one below the other. What lies next to each other is
//   ALONG   pixels of a row (contiguous images), read by 16-byte loads and a few single pixels at the ends,
//   else    channels of a pixel (channels_last), read by 16-byte loads; V = 1 serves all other strides and alignments.
// A row of input is reduced along the row first; the results of the rows that the next output needs too stay in registers
// while the window slides down. K, S, P: window, stride and padding where they are known in both directions; K = 0: g has them.
//
// Maxima: the first of equals, the last NaN, as torch. A maximum's code is its position in the window; where the codes of all
// windows are at hand, a backward gathers: each pixel asks the windows that cover it whether they meant it. No atomics.
#include "common.cuh"

struct Pool {
    i64 x, y, index, codes;  // addresses: image, window side, 64-bit indices or 0, codes or 0
    i64 total;               // threads with work
    i64 channels_first;      // of a thread's number, the fastest digit is: 1 channels, 0 pixels of a row
    i64 c, id, ih, iw, od, oh, ow, kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, adaptive;
    i64 xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, zn, zc, zd, zh, zw;  // strides in elements; z: of index and codes
    i64 strip, wide;                                                 // rows a thread; whether codes have 32 bits
    i64 divisor, include_pad;
};

enum What { MAX, ARGMAX, AVERAGE };
enum { NONE = 0x7fffffff };  // the code of what is not in the image

template <typename C> struct Item { C value; int code; };

template <typename C> __device__ __forceinline__ C lowest() { return (C)__uint_as_float(0xff800000u); }

template <int WHAT, typename C> __device__ __forceinline__ Item<C> nothing() {
    return {WHAT == AVERAGE ? (C)0 : lowest<C>(), NONE};
}

template <int WHAT, typename C> __device__ __forceinline__ void join(Item<C>& best, C value, int code) {
    if (WHAT == AVERAGE) best.value += value;
    else if (WHAT == MAX) best.value = value > best.value || value != value ? value : best.value;
    else {
        const bool nan = value != value, known = best.value != best.value;  // known: a NaN already
        const bool better = nan ? !known || code > best.code : value > best.value || (value == best.value && code < best.code);
        if (better && code != NONE) best = {value, code};
    }
}

struct Span { int first, size; };  // of a window in one dimension

__device__ __forceinline__ Span window(int o, i64 n, i64 outs, i64 k, i64 s, i64 p, i64 adaptive) {
    if (!adaptive) return {(int)(o * s - p), (int)k};
    const int first = (int)((i64)o * n / outs);
    return {first, (int)(((i64)(o + 1) * n + outs - 1) / outs) - first};
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
    const int end = w.first + w.size;
    if (include_pad) return (end < n + p ? end : (int)(n + p)) - w.first;
    return (end < n ? end : (int)n) - (w.first > 0 ? w.first : 0);
}

__device__ __forceinline__ i64 divisor(const Pool& g, Span d, Span h, Span w) {
    if (g.divisor) return g.divisor;
    return (i64)counted(d, g.id, g.pd, g.include_pad, g.adaptive) * counted(h, g.ih, g.ph, g.include_pad, g.adaptive) *
           counted(w, g.iw, g.pw, g.include_pad, g.adaptive);
}

struct Place { i64 n; int c, d, h, w; };  // h: a strip's first row

// From a thread's number; `wide` and `rows`: how many numbers it has along a row or among the channels, and one below the other.
template <int V, bool ALONG>
__device__ __forceinline__ Place place(const Pool& g, i64 number, i64 depth, i64 height, i64 width, i64 rows) {
    Place at;
    const bool channels = !ALONG && g.channels_first;
    if (channels) at.c = take(number, g.c / V) * V;
    at.w = ALONG ? take(number, (width + V - 1) / V) * V : take(number, width);
    at.h = take(number, (height + rows - 1) / rows) * (int)rows;
    at.d = take(number, depth);
    if (!channels) at.c = take(number, g.c);
    at.n = number;
    return at;
}

// What a window keeps of one row (and one plane) of the image, for V outputs; codes lack the row.
template <typename T, int V, bool ALONG, int K, int S, int P, int WHAT, typename C>
__device__ __forceinline__ void reduce_row(const Pool& g, Item<C> (&items)[V], const T* row, Span across, int w0, int code) {
    if constexpr (ALONG) {
        const int base = w0 * S, iw = (int)g.iw;
        constexpr int RIGHT = K - P - S > 0 ? K - P - S : 0, N = P + S * V + RIGHT;
        C line[N];
        bool in[N];
#pragma unroll
        for (int j = 0; j < P; j++) {
            in[j] = base - P + j >= 0;
            line[j] = in[j] ? widen(row[base - P + j]) : nothing<WHAT, C>().value;
        }
#pragma unroll
        for (int j = 0; j < S; j++) {
            Vec<T, V> v;
            const bool inside = base + j * V < iw;  // rows have whole vectors
            if (inside) v = load<T, V>(row + base + j * V);
#pragma unroll
            for (int e = 0; e < V; e++) {
                in[P + j * V + e] = inside;
                line[P + j * V + e] = inside ? widen(v.at[e]) : nothing<WHAT, C>().value;
            }
        }
#pragma unroll
        for (int j = 0; j < RIGHT; j++) {
            const int at = base + S * V + j;
            in[P + S * V + j] = at < iw;
            line[P + S * V + j] = at < iw ? widen(row[at]) : nothing<WHAT, C>().value;
        }
#pragma unroll
        for (int e = 0; e < V; e++)
#pragma unroll
            for (int k = 0; k < K; k++)
                join<WHAT>(items[e], line[e * S + k], in[e * S + k] ? code + k : NONE);
    } else {
        const int kw = K ? K : across.size, step = K ? 1 : (int)g.dw;
#pragma unroll
        for (int k = 0; k < kw; k++) {
            const int w = across.first + k * step;
            if (w < 0 || w >= (int)g.iw) continue;
            const Vec<T, V> v = load<T, V>(row + w * g.xw);
#pragma unroll
            for (int e = 0; e < V; e++) join<WHAT>(items[e], widen(v.at[e]), code + k);
        }
    }
}

// The same over the window's planes: what it keeps of row h. Nothing where the row is not in the image.
template <typename T, int V, bool ALONG, int K, int S, int P, int WHAT, typename C>
__device__ __forceinline__ void reduce_planes(const Pool& g, Item<C> (&items)[V], const T* image, Span deep, Span across, int h, int w0) {
#pragma unroll
    for (int e = 0; e < V; e++) items[e] = nothing<WHAT, C>();
    if (h < 0 || h >= (int)g.ih) return;
    for (int k = 0; k < deep.size; k++) {
        const int d = deep.first + k * (int)g.dd;
        if (d < 0 || d >= (int)g.id) continue;
        reduce_row<T, V, ALONG, K, S, P, WHAT, C>(g, items, image + d * g.xd + h * g.xh, across, w0, k * (int)(g.kh * g.kw));
    }
}

template <int WHAT, int V, typename C>
__device__ __forceinline__ void join_row(Item<C> (&sum)[V], const Item<C> (&row)[V], int code) {
#pragma unroll
    for (int e = 0; e < V; e++) join<WHAT>(sum[e], row[e].value, row[e].code == NONE ? NONE : row[e].code + code);
}

template <int WHAT, typename T, typename C>
__device__ __forceinline__ void finish(const Pool& g, Item<C> item, i64 y, i64 z, Span d, Span h, Span w) {
    if (WHAT == AVERAGE) item.value /= (C)divisor(g, d, h, w);
    if (g.y) ((T*)g.y)[y] = narrow<T>(item.value);
    if (WHAT != ARGMAX) return;
    int code = item.code == NONE ? 0 : item.code;
    if (g.codes && g.wide) ((int*)g.codes)[z] = code;
    else if (g.codes) ((unsigned char*)g.codes)[z] = (unsigned char)code;
    if (!g.index) return;
    const int kw = code % (int)g.kw, kh = code / (int)g.kw % (int)g.kh, kd = code / (int)(g.kw * g.kh);
    ((i64*)g.index)[z] = ((d.first + kd * g.dd) * g.ih + h.first + kh * g.dh) * g.iw + w.first + kw * g.dw;
}

template <typename T, int V, bool ALONG, int K, int S, int P, int WHAT, typename C>
__device__ __forceinline__ void put(const Pool& g, const Item<C> (&items)[V], Place at, int h, Span deep, Span down, Span across) {
    const i64 y = at.n * g.yn + at.c * g.yc + at.d * g.yd + h * g.yh + at.w * g.yw;
    const i64 z = at.n * g.zn + at.c * g.zc + at.d * g.zd + h * g.zh + at.w * g.zw;
    if (V > 1 && WHAT != ARGMAX && (!ALONG || g.ow % V == 0)) {  // else the rows of the output do not begin at whole vectors
        Vec<T, V> v;
#pragma unroll
        for (int e = 0; e < V; e++) {
            const Span w = ALONG ? Span{(at.w + e) * S - P, K} : across;
            v.at[e] = narrow<T>(WHAT == AVERAGE ? items[e].value / (C)divisor(g, deep, down, w) : items[e].value);
        }
        store<T, V>((T*)g.y + y, v);
    } else {
#pragma unroll
        for (int e = 0; e < V; e++) {
            if (ALONG && at.w + e >= (int)g.ow) break;
            const Span w = ALONG ? Span{(at.w + e) * S - P, K} : across;
            finish<WHAT, T>(g, items[e], y + (ALONG ? e * g.yw : e * g.yc), z + (ALONG ? e * g.zw : e * g.zc), deep, down, w);
        }
    }
}

template <typename T, int V, bool ALONG, int K, int S, int P, int WHAT>
__global__ void forward(const Pool g) {
    typedef typename Compute<T>::type C;
    const i64 number = thread_number();
    if (number >= g.total) return;
    const Place at = place<V, ALONG>(g, number, g.od, g.oh, g.ow, g.strip);
    const T* image = (const T*)g.x + at.n * g.xn + at.c * g.xc;
    const Span deep = window(at.d, g.id, g.od, g.kd, g.sd, g.pd, g.adaptive);
    const Span across = window(at.w, g.iw, g.ow, g.kw, g.sw, g.pw, g.adaptive);
    Item<C> row[V], sum[V];
    if constexpr (K == 0) {
        const Span down = window(at.h, g.ih, g.oh, g.kh, g.sh, g.ph, g.adaptive);
#pragma unroll
        for (int e = 0; e < V; e++) sum[e] = nothing<WHAT, C>();
        for (int k = 0; k < down.size; k++) {
            reduce_planes<T, V, ALONG, K, S, P, WHAT, C>(g, row, image, deep, across, down.first + k * (int)g.dh, at.w);
            join_row<WHAT, V>(sum, row, k * (int)g.kw);
        }
        put<T, V, ALONG, K, S, P, WHAT, C>(g, sum, at, at.h, deep, down, across);
    } else {
        constexpr int SHARED = K > S ? K - S : 0;  // rows that an output has in common with the next
        Item<C> kept[SHARED ? SHARED : 1][V];
        int h = at.h * S - P;
#pragma unroll
        for (int k = 0; k < SHARED; k++)
            reduce_planes<T, V, ALONG, K, S, P, WHAT, C>(g, kept[k], image, deep, across, h + k, at.w);
        const int last = at.h + (int)g.strip < (int)g.oh ? at.h + (int)g.strip : (int)g.oh;
        for (int o = at.h; o < last; o++, h += S) {
#pragma unroll
            for (int e = 0; e < V; e++) sum[e] = nothing<WHAT, C>();
#pragma unroll
            for (int k = 0; k < SHARED; k++) join_row<WHAT, V>(sum, kept[k], k * (int)g.kw);
#pragma unroll
            for (int k = 0; k + S < SHARED; k++)
#pragma unroll
                for (int e = 0; e < V; e++) kept[k][e] = kept[k + S][e];
#pragma unroll
            for (int k = SHARED; k < K; k++) {
                reduce_planes<T, V, ALONG, K, S, P, WHAT, C>(g, row, image, deep, across, h + k, at.w);
                join_row<WHAT, V>(sum, row, k * (int)g.kw);
                if (k >= S)  // the next output has it S rows higher
#pragma unroll
                    for (int e = 0; e < V; e++) kept[k - S][e] = row[e];
            }
            put<T, V, ALONG, K, S, P, WHAT, C>(g, sum, at, o, deep, {h, K}, across);
        }
    }
}

// Large windows of contiguous images: a warp makes an output, its lanes take the window's pixels in turn.
template <typename T, int WHAT>
__global__ void reduce(const Pool g) {
    typedef typename Compute<T>::type C;
    const int lane = threadIdx.x % 32;
    i64 number = thread_number() / 32;
    if (number >= g.total) return;  // whole warps: blocks are multiples of them
    const int ow = take(number, g.ow), oh = take(number, g.oh), od = take(number, g.od), c = take(number, g.c);
    const T* image = (const T*)g.x + number * g.xn + c * g.xc;
    const Span d = window(od, g.id, g.od, g.kd, g.sd, g.pd, g.adaptive), h = window(oh, g.ih, g.oh, g.kh, g.sh, g.ph, g.adaptive),
               w = window(ow, g.iw, g.ow, g.kw, g.sw, g.pw, g.adaptive);
    Item<C> best = nothing<WHAT, C>();
    for (i64 k = lane; k < (i64)d.size * h.size * w.size; k += 32) {
        i64 rest = k;
        const int kw = take(rest, w.size), kh = take(rest, h.size), kd = (int)rest;
        const int z = d.first + kd * (int)g.dd, y = h.first + kh * (int)g.dh, x = w.first + kw * (int)g.dw;
        if (z < 0 || z >= (int)g.id || y < 0 || y >= (int)g.ih || x < 0 || x >= (int)g.iw) continue;
        join<WHAT>(best, (C)widen(image[z * g.xd + y * g.xh + x * g.xw]), (int)((kd * g.kh + kh) * g.kw + kw));
    }
#pragma unroll
    for (int other = 16; other; other /= 2) {
        const C value = __shfl_xor_sync(0xffffffffu, best.value, other);
        join<WHAT>(best, value, WHAT == ARGMAX ? __shfl_xor_sync(0xffffffffu, best.code, other) : 0);
    }
    if (lane == 0)
        finish<WHAT, T>(g, best, number * g.yn + c * g.yc + od * g.yd + oh * g.yh + ow * g.yw,
                        number * g.zn + c * g.zc + od * g.zd + oh * g.zh + ow * g.zw, d, h, w);
}

template <int N> struct Bytes;  // V codes of a byte
template <> struct Bytes<1> { typedef unsigned char type; };
template <> struct Bytes<2> { typedef unsigned short type; };
template <> struct Bytes<4> { typedef unsigned type; };
template <> struct Bytes<8> { typedef unsigned long long type; };

__device__ __forceinline__ int code_at(const Pool& g, i64 z) {
    return g.wide ? ((const int*)g.codes)[z] : (int)((const unsigned char*)g.codes)[z];
}

// The gradient of V pixels from the windows that cover them, in the windows' order. x is what is written, y the gradient.
template <typename T, int V, bool ALONG, int K, int S, int P, bool AVG>
__global__ void backward(const Pool g) {
    typedef typename Compute<T>::type C;
    const i64 number = thread_number();
    if (number >= g.total) return;
    const Place at = place<V, ALONG>(g, number, g.id, g.ih, g.iw, 1);
    const i64 kd = g.kd, kh = K ? K : g.kh, kw = K ? K : g.kw;
    const Span od = covering(at.d, g.id, g.od, kd, g.sd, g.pd, g.dd, g.adaptive);
    const Span oh = covering(at.h, g.ih, g.oh, kh, K ? S : g.sh, K ? P : g.ph, K ? 1 : g.dh, g.adaptive);
    C sum[V];
#pragma unroll
    for (int e = 0; e < V; e++) sum[e] = 0;
    for (int d = od.first; d < od.first + od.size; d++) {
        const Span deep = window(d, g.id, g.od, kd, g.sd, g.pd, g.adaptive);
        const int in_d = at.d - deep.first;
        if (in_d % (int)g.dd) continue;
        for (int h = oh.first; h < oh.first + oh.size; h++) {
            const Span down = window(h, g.ih, g.oh, kh, K ? S : g.sh, K ? P : g.ph, g.adaptive);
            const int in_h = at.h - down.first;
            if (!K && in_h % (int)g.dh) continue;
            const int code = (int)((in_d / (int)g.dd * g.kh + (K ? in_h : in_h / (int)g.dh)) * g.kw);
            const i64 y = at.n * g.yn + at.c * g.yc + d * g.yd + h * g.yh, z = at.n * g.zn + at.c * g.zc + d * g.zd + h * g.zh;
            if constexpr (ALONG) {
                // V is a multiple of S, so that the windows begin at the same places in each thread's pixels.
                constexpr int LOW = P - K + 1 >= 0 ? (P - K + S) / S : -((K - 1 - P) / S), HIGH = (V - 1 + P) / S;
                const int first = at.w / S;
#pragma unroll
                for (int r = LOW; r <= HIGH; r++) {
                    const int w = first + r;
                    if (w < 0 || w >= (int)g.ow) continue;
                    C grad = widen(((const T*)g.y)[y + w * g.yw]);
                    int meant = 0;
                    if (AVG) grad /= (C)divisor(g, deep, down, {w * S - P, K});
                    else meant = code_at(g, z + w * g.zw) - code;
#pragma unroll
                    for (int e = 0; e < V; e++) {
                        const int in_w = e + P - r * S;
                        if (in_w >= 0 && in_w < K) sum[e] += AVG || meant == in_w ? grad : (C)0;
                    }
                }
            } else {
                const Span ow = covering(at.w, g.iw, g.ow, kw, K ? S : g.sw, K ? P : g.pw, K ? 1 : g.dw, g.adaptive);
                for (int w = ow.first; w < ow.first + ow.size; w++) {
                    const Span across = window(w, g.iw, g.ow, kw, K ? S : g.sw, K ? P : g.pw, g.adaptive);
                    const int in_w = at.w - across.first;
                    if (!K && in_w % (int)g.dw) continue;
                    const Vec<T, V> grad = load<T, V>((const T*)g.y + y + w * g.yw);
                    if constexpr (AVG) {
                        const C count = (C)divisor(g, deep, down, across);
#pragma unroll
                        for (int e = 0; e < V; e++) sum[e] += widen(grad.at[e]) / count;
                    } else {
                        const int mine = code + (K ? in_w : in_w / (int)g.dw);
                        const i64 at_z = z + w * g.zw;
                        if (g.wide) {
#pragma unroll
                            for (int e = 0; e < V; e++) sum[e] += ((const int*)g.codes)[at_z + e] == mine ? widen(grad.at[e]) : (C)0;
                        } else {
                            const typename Bytes<V>::type codes = *(const typename Bytes<V>::type*)((const unsigned char*)g.codes + at_z);
#pragma unroll
                            for (int e = 0; e < V; e++) sum[e] += (int)(codes >> (8 * e) & 255) == mine ? widen(grad.at[e]) : (C)0;
                        }
                    }
                }
            }
        }
    }
    Vec<T, V> out;
#pragma unroll
    for (int e = 0; e < V; e++) out.at[e] = narrow<T>(sum[e]);
    store<T, V>((T*)g.x + at.n * g.xn + at.c * g.xc + at.d * g.xd + at.h * g.xh + at.w * g.xw, out);
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
