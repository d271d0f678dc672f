// wgmma (sm_90a): D (64 x N, fp32, N / 2 registers of each of 128 threads) += A (64 x 16) * B (16 x N), bf16 or f16.
//
// Thread t, w = t / 32, g = t % 32 / 4, q = t % 4: register i is row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 q +
// i % 2. A in registers: of 4 x 2 values, e is row 16 w + g + 8 (e / 2 % 2), k 2 q + e % 2 + 8 (e / 4).
#pragma once

#include "fastdit/dtype.h"
#include "ptx.h"

namespace fastdit::cuda {

// Operand in shared memory. leading, stride: bytes between core matrices (HOPPER layouts: K-major uses stride alone
// with a swizzle; MN-major: leading from one swizzle span of rows to the next, stride from eight k to the next).
__device__ __forceinline__ uint64_t matrix(const void* tile, uint32_t leading, uint32_t stride, int swizzle) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address(tile)) | field(leading) << 16 | field(stride) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

#if defined(__CUDACC__)

// Before the first product, and between any access to registers of D or A and a product that uses them.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// After the wait: what the compiler reads of these registers it reads here or later.
template <int registers>
__device__ __forceinline__ void product_values(float (&d)[registers]) {
#pragma unroll
  for (int i = 0; i < registers; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class T, bool trans_a, bool trans_b, int registers>
struct Product;  // one per dtype, layout and N

#define FASTDIT_PRODUCT(N, T, type, trans_a, trans_b, D, P0, P1, P2, P3, P4, P5, ...)                                  \
  template <>                                                                                                          \
  struct Product<T, trans_a, trans_b, N / 2> {                                                                         \
    static __device__ __forceinline__ void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
                   "." type " " D ", " P0 ", " P1 ", p, 1, 1, " #trans_a ", " #trans_b ";\n}"                          \
                   : __VA_ARGS__                                                                                       \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                 \
    }                                                                                                                  \
    static __device__ __forceinline__ void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,            \
                                                     int accumulate) {                                                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
                   "." type " " D ", {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " #trans_b ";\n}"              \
                   : __VA_ARGS__                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                             \
    }                                                                                                                  \
  };
#define FASTDIT_PRODUCTS(N, ...)                      \
  FASTDIT_PRODUCT(N, bf16, "bf16", 0, 0, __VA_ARGS__) \
  FASTDIT_PRODUCT(N, bf16, "bf16", 0, 1, __VA_ARGS__) \
  FASTDIT_PRODUCT(N, bf16, "bf16", 1, 0, __VA_ARGS__) \
  FASTDIT_PRODUCT(N, bf16, "bf16", 1, 1, __VA_ARGS__) \
  FASTDIT_PRODUCT(N, f16, "f16", 0, 0, __VA_ARGS__)   \
  FASTDIT_PRODUCT(N, f16, "f16", 0, 1, __VA_ARGS__)   \
  FASTDIT_PRODUCT(N, f16, "f16", 1, 0, __VA_ARGS__)   \
  FASTDIT_PRODUCT(N, f16, "f16", 1, 1, __VA_ARGS__)
// The registers of an N are those of the N before it and some more.
#define FASTDIT_D64                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTDIT_OUT64                                                                                         \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTDIT_D96 \
  FASTDIT_D64       \
  ", "              \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTDIT_OUT96                                                                                         \
  FASTDIT_OUT64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]),   \
      "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
      "+f"(d[47])
#define FASTDIT_D128 \
  FASTDIT_D96        \
  ", "               \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTDIT_OUT128                                                                                        \
  FASTDIT_OUT96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),   \
      "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
      "+f"(d[63])
#define FASTDIT_D192                                                                                               \
  FASTDIT_D128                                                                                                     \
  ", "                                                                                                             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTDIT_OUT192                                                                                        \
  FASTDIT_OUT128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),  \
      "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), \
      "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), \
      "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), \
      "+f"(d[95])
FASTDIT_PRODUCTS(64, "{" FASTDIT_D64 "}", "%32", "%33", "%34", "%35", "%36", "%37", FASTDIT_OUT64)
FASTDIT_PRODUCTS(96, "{" FASTDIT_D96 "}", "%48", "%49", "%50", "%51", "%52", "%53", FASTDIT_OUT96)
FASTDIT_PRODUCTS(128, "{" FASTDIT_D128 "}", "%64", "%65", "%66", "%67", "%68", "%69", FASTDIT_OUT128)
FASTDIT_PRODUCTS(192, "{" FASTDIT_D192 "}", "%96", "%97", "%98", "%99", "%100", "%101", FASTDIT_OUT192)
#undef FASTDIT_D64
#undef FASTDIT_OUT64
#undef FASTDIT_D96
#undef FASTDIT_OUT96
#undef FASTDIT_D128
#undef FASTDIT_OUT128
#undef FASTDIT_D192
#undef FASTDIT_OUT192
#undef FASTDIT_PRODUCT
#undef FASTDIT_PRODUCTS

// d = a * b (+ d with `accumulate`, a constant: a run-time one makes ptxas peel loops). trans: M- or N-major operand.
template <class T, bool trans_a = false, bool trans_b = false, int registers>
__device__ __forceinline__ void product(float (&d)[registers], uint64_t a, uint64_t b, bool accumulate = true) {
  Product<T, trans_a, trans_b, registers>::shared(d, a, b, accumulate);
}
template <class T, bool trans_b = false, int registers>
__device__ __forceinline__ void product(float (&d)[registers], const uint32_t (&a)[4], uint64_t b,
                                        bool accumulate = true) {
  Product<T, false, trans_b, registers>::registers(d, a, b, accumulate);
}

#else

inline void product_fence() { async()->product_fence(); }
inline void product_commit() { async()->product_commit(); }
template <int groups>
void product_wait(FASTDIT_CALLED) {
  async()->product_wait(groups, FASTDIT_SITE("wgmma.wait_group"));
}
template <int registers>
void product_values(float (&)[registers]) {}

template <class T, int registers>
simt::Product describe(uint64_t b, bool accumulate, bool trans_b, simt::Site site) {
  simt::Product p;
  p.site = site, p.n = 2 * registers, p.b = b, p.accumulate = accumulate, p.trans_b = trans_b;
  p.type = std::is_same_v<T, bf16> ? simt::MmaType::bf16 : simt::MmaType::f16;
  return p;
}
template <class T, bool trans_a = false, bool trans_b = false, int registers>
void product(float (&d)[registers], uint64_t a, uint64_t b, bool accumulate = true, FASTDIT_CALLED) {
  simt::Product p = describe<T, registers>(b, accumulate, trans_b, FASTDIT_SITE("wgmma"));
  p.a = a, p.trans_a = trans_a;
  async()->product(p, d, nullptr);
}
template <class T, bool trans_b = false, int registers>
void product(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, bool accumulate = true, FASTDIT_CALLED) {
  simt::Product p = describe<T, registers>(b, accumulate, trans_b, FASTDIT_SITE("wgmma"));
  p.a_registers = true;
  async()->product(p, d, a);
}

#endif

}  // namespace fastdit::cuda
