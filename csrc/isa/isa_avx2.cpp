#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "isa/isa.h"
#include "isa/table.h"
#include "simd/items.h"

FM_TARGET_BEGIN("avx2,fma,f16c,popcnt")
namespace fastmerge::avx2 {
#include "simd/avx2.h"

#include "kernels/all.inl"
}  // namespace fastmerge::avx2
FM_TARGET_END

namespace fastmerge {
extern const Kernels kAvx2Kernels;
namespace avx2 {
static const Kernels kTable = FM_TABLE("avx2");
}
const Kernels kAvx2Kernels = avx2::kTable;
}  // namespace fastmerge
#endif
