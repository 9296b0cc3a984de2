// out = (start + sum_j c_j x_j) / divisor in fp32, fused multiply-adds in input order, one
// rounding. Fused, because torch's add_(x, alpha) is, by which mergekit's linear is bit-equal;
// where c x = -(c y), it leaves 1e-8 |c x| for 0, which is for combine_wide to find. Starting from
// -0 where only one coefficient is nonzero makes that product exact, sign of zero included;
// starting from +0 elsewhere is what mergekit 0.1.5's accumulator does.

// A group, without asking for memory ahead, as read() does: that cost sums of two and three inputs
// of 8 to 64 MiB 4 to 25 % of their time, bf16 and fp32 alike.
template <bool kPartial, class T, class Loads = Whole>
FM_INLINE void terms(T type, const char* group, Part part, Floats* x, Loads loads = {}) {
    kPartial ? read_part(type, group, part, x) : load_group(type, group, x, loads);
}

template <class T, bool kPerElement, bool kPartial>
FM_INLINE void combine_group(const CombineArgs& args, int64_t at, Part part) {
    Floats total[2] = {spread(args.starts[0]), spread(args.starts[0])}, x[2], c[2];
    if (kPerElement)
        read<kPartial>(F32(), reinterpret_cast<const char*>(args.starts + at), part, total);
    for (int j = 0; j < args.inputs_count; ++j) {
        terms<kPartial>(T(), static_cast<const char*>(args.inputs[j]) + at * T::kBytes, part, x);
        if (kPerElement)
            read<kPartial>(F32(), reinterpret_cast<const char*>(args.coefficients[j] + at), part,
                           c);
        else
            c[0] = c[1] = spread(args.coefficients[j][0]);
        for (int v = 0; v < 2; ++v) {
            const Floats added = multiply_add(x[v], c[v], total[v]);
            total[v] = kPerElement ? choose(equal(c[v], spread(0.0f)), total[v], added) : added;
        }
    }
    if (args.divide)
        for (int v = 0; v < 2; ++v) total[v] = total[v] / spread(args.divisor);
    write<kPartial>(T(), static_cast<char*>(args.out) + at * T::kBytes, part, total);
}

// As combine_group of few inputs, from an element on, whose places and coefficients stay in
// registers: the caches then give as many bytes as they can.
template <class T, int K, class Loads, class Stores>
int64_t combine_few(const CombineArgs& args, int64_t from) {
    const char* x[K];
    Floats c[K];
    for (int j = 0; j < K; ++j) {
        x[j] = static_cast<const char*>(args.inputs[j]);
        c[j] = spread(args.coefficients[j][0]);
    }
    const Floats start = spread(args.starts[0]), divisor = spread(args.divisor);
    const bool divide = args.divide;
    char* out = static_cast<char*>(args.out);
    int64_t at = from;
    for (; at + kGroup <= args.count; at += kGroup) {
        Floats total[2] = {start, start}, entries[2];
        for (int j = 0; j < K; ++j) {
            terms<false>(T(), x[j] + at * T::kBytes, {}, entries, Loads());
            for (int v = 0; v < 2; ++v) total[v] = multiply_add(entries[v], c[j], total[v]);
        }
        if (divide)
            for (int v = 0; v < 2; ++v) total[v] = total[v] / divisor;
        store_group(T(), out + at * T::kBytes, total, Stores());
    }
    return at;
}

constexpr uintptr_t kLine = 64;  // bytes

// The same, from where the output is at a line's beginning; groups of inputs that are not there,
// too, are loaded in halves.
template <class T, int K, class Stores>
int64_t combine_lines(const CombineArgs& args, int64_t from) {
    bool apart = false;
    for (int j = 0; j < K; ++j) {
        const char* x = static_cast<const char*>(args.inputs[j]) + from * T::kBytes;
        apart = apart || reinterpret_cast<uintptr_t>(x) % kLine != 0;
    }
    return apart ? combine_few<T, K, Halves, Stores>(args, from)
                 : combine_few<T, K, Whole, Stores>(args, from);
}

// Elements of two or three inputs, from the first on; 0: none, as an element lies across a line.
template <class T, int K>
int64_t combine_few(const CombineArgs& args) {
    constexpr uintptr_t kAlign = kGroup * T::kBytes < kLine ? kGroup * T::kBytes : kLine;
    const uintptr_t before = -reinterpret_cast<uintptr_t>(args.out) % kAlign;
    const auto head = static_cast<int64_t>(before / T::kBytes);
    if (before % T::kBytes != 0 || head > args.count) return 0;
    if (head != 0) combine_group<T, false, true>(args, 0, {0, static_cast<int>(head)});
    if (!args.past_caches) return combine_lines<T, K, Cached>(args, head);
    const int64_t end = combine_lines<T, K, Past>(args, head);
    settle();
    return end;
}

template <class T, bool kPerElement>
void combine_span(const CombineArgs& args) {
    int64_t at = 0;
    if (!kPerElement && args.inputs_count == 2) at = combine_few<T, 2>(args);
    if (!kPerElement && args.inputs_count == 3) at = combine_few<T, 3>(args);
    for (; at + kGroup <= args.count; at += kGroup)
        combine_group<T, kPerElement, false>(args, at, {});
    if (at < args.count)
        combine_group<T, kPerElement, true>(args, at, {0, static_cast<int>(args.count - at)});
}

template <class T>
void combine(const CombineArgs& args) {
    args.per_element ? combine_span<T, true>(args) : combine_span<T, false>(args);
}

// The same in fp64, one rounding to fp32: products and sums one after the other, each rounded, so
// that it needs no fused operation of a device's. It is for sums that cancel.

template <class T, bool kPartial>
FM_INLINE void combine_wide_group(const WideCombineArgs& args, int64_t at, Part part) {
    Wide total[2] = {spread(args.starts[0]), spread(args.starts[0])};
    for (int j = 0; j < args.inputs_count; ++j) {
        Floats x[2];
        terms<kPartial>(T(), static_cast<const char*>(args.inputs[j]) + at * T::kBytes, part, x);
        const Wide c = spread(args.coefficients[j][0]);
        for (int v = 0; v < 2; ++v) total[v] = add_product(x[v], c, total[v]);
    }
    const Floats rounded[2] = {narrow(total[0]), narrow(total[1])};
    write<kPartial>(T(), static_cast<char*>(args.out) + at * T::kBytes, part, rounded);
}

// One coefficient per element; of fp32.
inline void combine_wide_columns(const WideCombineArgs& args) {
    double total[kBlock];
    for (int64_t begin = 0; begin < args.count; begin += kBlock) {
        const int64_t count = args.count - begin < kBlock ? args.count - begin : kBlock;
        for (int64_t i = 0; i < count; ++i) total[i] = args.starts[begin + i];
        for (int j = 0; j < args.inputs_count; ++j) {
            const char* x = static_cast<const char*>(args.inputs[j]) + begin * F32::kBytes;
            const double* c = args.coefficients[j] + begin;
            for (int64_t i = 0; i < count; ++i) {
                float entry;  // at any address
                std::memcpy(&entry, x + i * F32::kBytes, F32::kBytes);
                const double added = total[i] + static_cast<double>(entry) * c[i];
                total[i] = c[i] == 0 ? total[i] : added;
            }
        }
        char* out = static_cast<char*>(args.out) + begin * F32::kBytes;
        for (int64_t i = 0; i < count; ++i) {
            const auto rounded = static_cast<float>(total[i]);
            std::memcpy(out + i * F32::kBytes, &rounded, F32::kBytes);
        }
    }
}

template <class T>
void combine_wide(const WideCombineArgs& args) {
    if (args.per_element) return combine_wide_columns(args);
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup) combine_wide_group<T, false>(args, at, {});
    if (at < args.count)
        combine_wide_group<T, true>(args, at, {0, static_cast<int>(args.count - at)});
}
