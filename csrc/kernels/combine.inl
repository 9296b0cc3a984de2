// out = (start + sum_j c_j x_j) / divisor in fp32, fused multiply-adds in input order, one
// rounding. Starting from -0 where only one coefficient is nonzero makes that product exact, sign
// of zero included; starting from +0 elsewhere is what mergekit 0.1.5's accumulator does.

template <class T, bool kPerElement, bool kPartial>
inline void combine_group(const CombineArgs& args, int64_t at, Part part) {
    Floats total[2];
    for (int v = 0; v < 2; ++v) {
        const char* starts = reinterpret_cast<const char*>(args.starts + at);
        total[v] = kPerElement ? read<kPartial>(F32(), starts, v, part) : spread(args.starts[0]);
    }
    for (int j = 0; j < args.inputs_count; ++j) {
        const char* from = static_cast<const char*>(args.inputs[j]) + at * T::kBytes;
        for (int v = 0; v < 2; ++v) {
            const Floats x = read<kPartial>(T(), from, v, part);
            if (kPerElement) {
                const char* factors = reinterpret_cast<const char*>(args.coefficients[j] + at);
                const Floats c = read<kPartial>(F32(), factors, v, part);
                total[v] = choose(equal(c, spread(0.0f)), total[v], multiply_add(x, c, total[v]));
            } else {
                total[v] = multiply_add(x, spread(args.coefficients[j][0]), total[v]);
            }
        }
    }
    for (int v = 0; v < 2; ++v) {
        if (args.divide) total[v] = total[v] / spread(args.divisor);
        write<kPartial>(T(), static_cast<char*>(args.out) + at * T::kBytes, v, part, total[v]);
    }
}

template <class T, bool kPerElement>
void combine_span(const CombineArgs& args) {
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        combine_group<T, kPerElement, false>(args, at, {});
    if (at < args.count)
        combine_group<T, kPerElement, true>(args, at, {0, static_cast<int>(args.count - at)});
}

template <class T>
void combine(const CombineArgs& args) {
    args.per_element ? combine_span<T, true>(args) : combine_span<T, false>(args);
}
