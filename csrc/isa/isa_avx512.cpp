#if defined(__x86_64__)
// GCC 12 warns of the undefined pass-through operands inside its own AVX-512 header.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstring>

#include "isa/isa.h"
#include "isa/table.h"
#include "simd/items.h"

FM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt")
namespace fastmerge::avx512 {
#include "simd/avx512.h"

#include "kernels/all.inl"
}  // namespace fastmerge::avx512
FM_TARGET_END

namespace fastmerge {
extern const Kernels kAvx512Kernels;
namespace avx512 {
static const Kernels kTable = FM_TABLE("avx512");
}
const Kernels kAvx512Kernels = avx512::kTable;
}  // namespace fastmerge
#endif
