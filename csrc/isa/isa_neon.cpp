#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

#include "isa/table.h"
#include "simd/items.h"

namespace fastmerge::neon {
#include "simd/neon.h"

#include "kernels/all.inl"
}  // namespace fastmerge::neon

namespace fastmerge {
extern const Kernels kNeonKernels;
namespace neon {
static const Kernels kTable = FM_TABLE("neon");
}
const Kernels kNeonKernels = neon::kTable;
}  // namespace fastmerge
#endif
