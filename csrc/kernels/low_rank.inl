// out = w + scale * sum_k left[k] right[k][i], then times a factor: fp32, the sum from +0 in the
// order of k by fused multiply-adds, one more for the scale.

template <class T, int kVectors>
FM_INLINE void low_rank_block(const LowRankArgs& args, int64_t at) {
    Floats sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = spread(0.0f);
    const float* right = args.right + at;
    for (int64_t k = 0; k < args.rank; ++k, right += args.cols) {
        const Floats left = spread(args.left[k]);
        for (int v = 0; v < kVectors; ++v)
            sum[v] = multiply_add(load(F32(), right + v * kLanes), left, sum[v]);
    }
    const Floats scale = spread(args.scale);
    const char* from = static_cast<const char*>(args.base) + at * T::kBytes;
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = v * kLanes;
        Floats made = multiply_add(sum[v], scale, load(T(), from + i * T::kBytes));
        if (args.factors)
            made = made * (args.per_element ? load(F32(), args.factors + at + i)
                                            : spread(args.factors[0]));
        store(F32(), args.out + at + i, made);
    }
}

template <class T>
FM_INLINE void low_rank_rest(const LowRankArgs& args, int64_t at, Part part) {
    Floats sum[2] = {spread(0.0f), spread(0.0f)}, x[2];
    const float* right = args.right + at;
    for (int64_t k = 0; k < args.rank; ++k, right += args.cols) {
        read<true>(F32(), reinterpret_cast<const char*>(right), part, x);
        for (int v = 0; v < 2; ++v) sum[v] = multiply_add(x[v], spread(args.left[k]), sum[v]);
    }
    read<true>(T(), static_cast<const char*>(args.base) + at * T::kBytes, part, x);
    for (int v = 0; v < 2; ++v) sum[v] = multiply_add(sum[v], spread(args.scale), x[v]);
    if (args.factors) {
        x[0] = x[1] = spread(args.factors[0]);
        if (args.per_element)
            read<true>(F32(), reinterpret_cast<const char*>(args.factors + at), part, x);
        for (int v = 0; v < 2; ++v) sum[v] = sum[v] * x[v];
    }
    write<true>(F32(), reinterpret_cast<char*>(args.out + at), part, sum);
}

template <class T>
void low_rank(const LowRankArgs& args) {
    constexpr int kVectors = 8;  // sums in registers: a row of `right` is read once for each eight
    int64_t at = 0;
    for (; at + kVectors * kLanes <= args.count; at += kVectors * kLanes)
        low_rank_block<T, kVectors>(args, at);
    for (; at + kLanes <= args.count; at += kLanes) low_rank_block<T, 1>(args, at);
    if (at < args.count) low_rank_rest<T>(args, at, {0, static_cast<int>(args.count - at)});
}
