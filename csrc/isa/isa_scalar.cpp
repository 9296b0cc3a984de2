#include <cmath>
#include <cstring>

#include "isa/table.h"
#include "simd/items.h"

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
