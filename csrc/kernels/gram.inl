// fp64 inner products in kSumLanes lanes: element e of a block adds to lane e % kSumLanes.

// T's K vectors at once, from storage to sums in registers: the case that must run at memory speed.
// kDeltas: the vectors are the first and the others' differences to it.
template <class T, int K, bool kDeltas>
void gram_fused(const void* const* inputs, int64_t count, double* sums) {
    constexpr int kPairs = K * (K + 1) / 2;
    const char* from[K];
    Doubles total[kPairs], x[K];
    for (int j = 0; j < K; ++j) from[j] = static_cast<const char*>(inputs[j]);
    for (int p = 0; p < kPairs; ++p) total[p] = load_sums(sums + p * kSumLanes);
    for (int64_t i = 0; i < count; i += kSumLanes) {
        if (i + kSumLanes <= count) {
            for (int j = 0; j < K; ++j) {
                __builtin_prefetch(from[j] + i * T::kBytes + kPrefetchBytes);
                x[j] = load_doubles(T(), from[j] + i * T::kBytes);
            }
        } else {
            for (int j = 0; j < K; ++j) {
                char padded[kSumLanes * T::kBytes] = {};
                std::memcpy(padded, from[j] + i * T::kBytes,
                            static_cast<size_t>(count - i) * T::kBytes);
                x[j] = load_doubles(T(), padded);
            }
        }
        if (kDeltas)
            for (int j = 1; j < K; ++j) x[j] = subtract_single(x[j], x[0]);
        int p = 0;
        for (int a = 0; a < K; ++a)
            for (int b = a; b < K; ++b, ++p) total[p] = multiply_add(x[a], x[b], total[p]);
    }
    for (int p = 0; p < kPairs; ++p) store_sums(sums + p * kSumLanes, total[p]);
}

// <x, y_0>, ... <x, y_(K-1)> of fp32 vectors.
template <int K>
void dot_row(const float* x, const float* const* y, int64_t count, double* sums) {
    Doubles total[K];
    for (int j = 0; j < K; ++j) total[j] = load_sums(sums + j * kSumLanes);
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
        const Doubles a = load_doubles(F32(), x + i);
        for (int j = 0; j < K; ++j)
            total[j] = multiply_add(a, load_doubles(F32(), y[j] + i), total[j]);
    }
    if (i < count) {
        float a[kSumLanes] = {}, b[kSumLanes] = {};
        std::memcpy(a, x + i, static_cast<size_t>(count - i) * sizeof(float));
        for (int j = 0; j < K; ++j) {
            std::memcpy(b, y[j] + i, static_cast<size_t>(count - i) * sizeof(float));
            total[j] = multiply_add(load_doubles(F32(), a), load_doubles(F32(), b), total[j]);
        }
    }
    for (int j = 0; j < K; ++j) store_sums(sums + j * kSumLanes, total[j]);
}

inline void gram_any(const float* const* inputs, int vectors, int64_t count, double* sums) {
    for (int a = 0; a < vectors; ++a) {
        int b = a;
        for (; b + 4 <= vectors; b += 4, sums += 4 * kSumLanes)
            dot_row<4>(inputs[a], inputs + b, count, sums);
        for (; b < vectors; ++b, sums += kSumLanes) dot_row<1>(inputs[a], inputs + b, count, sums);
    }
}

inline void gram_columns(const float* const* inputs, int vectors, int64_t count, double* sums) {
    for (int a = 0; a < vectors; ++a)
        for (int b = a; b < vectors; ++b, sums += count)
            for (int64_t i = 0; i < count; ++i)
                sums[i] += static_cast<double>(inputs[a][i]) * static_cast<double>(inputs[b][i]);
}

inline void subtract(const float* base, float* in_out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) in_out[i] -= base[i];
}
