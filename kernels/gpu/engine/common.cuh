// What every kernel starts with. No CUDA header is needed, so that NVRTC compiles it wherever it is; where FASTNN_SHIM is
// defined, tests run the same source on a CPU.
#pragma once

typedef long long i64;

// 16-bit numbers are bits here; kernels compute in float.
struct half_t { unsigned short bits; };
struct bfloat_t { unsigned short bits; };

template <typename T> struct Compute { typedef float type; };
template <> struct Compute<double> { typedef double type; };

template <typename T> struct IsHalf { static const bool value = false; };
template <> struct IsHalf<half_t> { static const bool value = true; };

__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ double widen(double a) { return a; }
__device__ __forceinline__ float widen(bfloat_t a) { return __uint_as_float((unsigned)a.bits << 16); }
__device__ __forceinline__ float widen(half_t a) {
#ifdef FASTNN_SHIM
    return shim::from_half(a.bits);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(a.bits));
    return f;
#endif
}

template <typename T> __device__ __forceinline__ T narrow(typename Compute<T>::type a);
template <> __device__ __forceinline__ float narrow<float>(float a) { return a; }
template <> __device__ __forceinline__ double narrow<double>(double a) { return a; }
template <> __device__ __forceinline__ bfloat_t narrow<bfloat_t>(float a) {
    const unsigned u = __float_as_uint(a);
    if (a != a) return {0x7fc0};
    return {(unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <> __device__ __forceinline__ half_t narrow<half_t>(float a) {
#ifdef FASTNN_SHIM
    return {shim::to_half(a)};
#else
    half_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(a));
    return h;
#endif
}

// V numbers that are read and written at once: 16 bytes, or fewer where fewer is asked for.
template <typename T, int V> struct alignas(sizeof(T) * V) Vec { T at[V]; };

template <typename T, int V> __device__ __forceinline__ Vec<T, V> load(const T* p) {
    return *reinterpret_cast<const Vec<T, V>*>(p);
}
template <typename T, int V> __device__ __forceinline__ void store(T* p, const Vec<T, V>& v) {
    *reinterpret_cast<Vec<T, V>*>(p) = v;
}

// Takes the fastest digit off a thread's number. Dividing 64 bits costs ten times what dividing 32 does.
__device__ __forceinline__ int take(i64& number, i64 size) {
    i64 rest;
    if ((unsigned long long)number >> 32 == 0) rest = (unsigned)number / (unsigned)size;
    else rest = number / size;
    const int digit = (int)(number - rest * size);
    number = rest;
    return digit;
}

__device__ __forceinline__ i64 thread_number() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
