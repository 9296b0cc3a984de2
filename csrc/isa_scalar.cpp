#include <cmath>
#include <cstring>

#include "simd/items.h"
#include "table.h"

namespace fastmerge::scalar {
#include "simd/scalar.h"

#include "kernels/all.inl"
}  // namespace fastmerge::scalar

namespace fastmerge {
extern const Kernels kScalarKernels;
namespace scalar {
static const Kernels kTable = FM_TABLE("scalar");
}
const Kernels kScalarKernels = scalar::kTable;
}  // namespace fastmerge
