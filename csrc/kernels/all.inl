// Everything that is compiled once per instruction set; included inside its namespace and region,
// after its simd header.
#include "kernels/common.inl"
#include "kernels/mask.inl"

#include "kernels/checksum.inl"
#include "kernels/combine.inl"
#include "kernels/consensus.inl"
#include "kernels/dequantise.inl"
#include "kernels/divergence.inl"
#include "kernels/gram.inl"
#include "kernels/low_rank.inl"
#include "kernels/pointwise.inl"
#include "kernels/rank.inl"
#include "kernels/select.inl"

#define FM_EACH_TYPE(kernel) {&kernel<F32>, &kernel<F16>, &kernel<BF16>}
#define FM_GRAM(count, deltas)                                         \
    {&gram_fused<F32, count, deltas>, &gram_fused<F16, count, deltas>, \
     &gram_fused<BF16, count, deltas>}
#define FM_TABLE(name)                                                 \
    {name,                                                             \
     FM_EACH_TYPE(widen),                                              \
     FM_EACH_TYPE(narrow),                                             \
     {&nonfinite<uint32_t, 0x7F800000u>, &nonfinite<uint16_t, 0x7C00>, \
      &nonfinite<uint16_t, 0x7F80>},                                   \
     {FM_GRAM(2, false), FM_GRAM(2, true)},                            \
     {FM_GRAM(3, false), FM_GRAM(3, true)},                            \
     &gram_any,                                                        \
     &gram_columns,                                                    \
     &subtract,                                                        \
     FM_EACH_TYPE(combine),                                            \
     FM_EACH_TYPE(combine_wide),                                       \
     FM_EACH_TYPE(consensus),                                          \
     FM_EACH_TYPE(count_keys),                                         \
     FM_EACH_TYPE(count_ties),                                         \
     &count_orders,                                                    \
     FM_EACH_TYPE(measure),                                            \
     &pointwise,                                                       \
     &moves,                                                           \
     &moved_divergence,                                                \
     &largest_of,                                                      \
     &exponentials,                                                    \
     &divergence,                                                      \
     FM_EACH_TYPE(low_rank),                                           \
     &fill_random,                                                     \
     &magnitudes,                                                      \
     &undecided,                                                       \
     &entries_before,                                                  \
     &orders_of,                                                       \
     {&dequantise<E4M3>, &dequantise<E5M2>},                           \
     &weigh}
