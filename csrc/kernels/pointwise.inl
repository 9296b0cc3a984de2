// What an entry becomes from those of the base and the models at its place: plain loops over blocks
// that stay in the first cache, which the compiler vectorises. Masks multiply, so that NaN and Inf
// survive them, sums start from +0 in the models' order, and nothing is fused.

struct Block {
    const PointwiseArgs& args;
    int64_t at, count;

    const float* input(int j) const { return args.inputs[j] + at; }
    const float* base() const { return args.base + at; }
    float* out() const { return args.out + at; }
};

inline void delta_of(const Block& block, int j, float* __restrict delta) {
    const float* x = block.input(j);
    const float* base = block.base();
    for (int64_t i = 0; i < block.count; ++i) delta[i] = x[i] - base[i];
}

inline void add_base(const Block& block, const float* __restrict sum) {
    const float* base = block.base();
    float* out = block.out();
    for (int64_t i = 0; i < block.count; ++i) out[i] = base[i] + sum[i];
}

// The reciprocal and the product are rounded one by one, as in torch's quotient of a number by a
// tensor.
inline void near_swap(const Block& block, float t) {
    const float* x = block.input(0);
    const float* base = block.base();
    float* out = block.out();
    for (int64_t i = 0; i < block.count; ++i) {
        float distance = __builtin_fabsf(base[i] - x[i]);
        distance = distance < 1e-6f ? 1e-6f : distance;
        float weight = 1.0f / distance * t;
        weight = weight < 0.0f ? 0.0f : weight;
        weight = weight > 1.0f ? 1.0f : weight;
        out[i] = weight * x[i] + (1.0f - weight) * base[i];
    }
}

// How many deltas are above `least` in size.
inline void count_active(const Block& block, float least, float* __restrict counts) {
    float delta[kBlock];
    for (int64_t i = 0; i < block.count; ++i) counts[i] = 0.0f;
    for (int j = 0; j < block.args.inputs_count; ++j) {
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i)
            counts[i] += __builtin_fabsf(delta[i]) > least ? 1.0f : 0.0f;
    }
}

inline void is_count(const Block& block, float least, float wanted) {
    float counts[kBlock];
    count_active(block, least, counts);
    float* out = block.out();
    for (int64_t i = 0; i < block.count; ++i) out[i] = counts[i] == wanted ? 1.0f : 0.0f;
}

inline void reinforced(const Block& block, float least, const float* gains) {
    float counts[kBlock], delta[kBlock], sum[kBlock] = {};
    count_active(block, least, counts);
    for (int j = 0; j < block.args.inputs_count; ++j) {
        const float gain = gains[j];
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i) {
            const float own = delta[i] * (__builtin_fabsf(delta[i]) > least ? 1.0f : 0.0f);
            const float only = counts[i] == 1.0f ? 1.0f : 0.0f;
            const float several = counts[i] > 1.0f ? 1.0f : 0.0f;
            const float among = counts[i] > 1.0f ? counts[i] : 1.0f;
            sum[i] += own * only * gain + own * several / among;
        }
    }
    add_base(block, sum);
}

// The deltas' variance over the models, fp64 by Welford's updates, rounded to fp32: of few models
// in registers.
template <int kInputs>
void variance_of(const Block& block, float* __restrict result) {
    const float* base = block.base();
    const float* x[kInputs];
    for (int j = 0; j < kInputs; ++j) x[j] = block.input(j);
    for (int64_t i = 0; i < block.count; ++i) {
        double mean = 0.0, squares = 0.0;
        for (int j = 0; j < kInputs; ++j) {
            const double value = x[j][i] - base[i], off = value - mean;
            mean += off / (j + 1);
            squares += off * (value - mean);
        }
        result[i] = static_cast<float>(squares / kInputs);
    }
}

inline void variance(const Block& block, float* __restrict result) {
    switch (block.args.inputs_count) {
        case 1:
            return variance_of<1>(block, result);
        case 2:
            return variance_of<2>(block, result);
        case 3:
            return variance_of<3>(block, result);
        case 4:
            return variance_of<4>(block, result);
        default:
            break;
    }
    double mean[kBlock], squares[kBlock];
    float delta[kBlock];
    for (int64_t i = 0; i < block.count; ++i) mean[i] = squares[i] = 0.0;
    for (int j = 0; j < block.args.inputs_count; ++j) {
        const double models = j + 1;
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i) {
            const double value = delta[i], off = value - mean[i];
            mean[i] += off / models;
            squares[i] += off * (value - mean[i]);
        }
    }
    const double models = block.args.inputs_count;
    for (int64_t i = 0; i < block.count; ++i) result[i] = static_cast<float>(squares[i] / models);
}

// 1 where the deltas' variance is among those kept, else 0.
inline void varied(const Block& block, float* __restrict mask) {
    const Keep& keep = block.args.keep;
    if (keep.kind == Keep::kAll) {
        for (int64_t i = 0; i < block.count; ++i) mask[i] = 1.0f;
        return;
    }
    float size[kBlock];
    variance(block, size);
    const uint64_t index = block.args.index + static_cast<uint64_t>(block.at);
    const uint32_t high = keep.mixed ? static_cast<uint32_t>(index >> 32) * 0x9E3779B9u : 0u;
    const bool ties = keep.kind == Keep::kAboveOrTie;
    for (int64_t i = 0; i < block.count; ++i) {
        uint32_t order = static_cast<uint32_t>(index) + static_cast<uint32_t>(i), mixed;
        mixed = order ^ high;  // as mixed_order
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6Bu;
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35u;
        mixed ^= mixed >> 16;
        order = keep.mixed ? mixed : order;
        int32_t key;
        std::memcpy(&key, size + i, sizeof key);
        key &= 0x7FFFFFFF;
        const int32_t least = keep.threshold - (ties && order <= keep.order_max ? 1 : 0);
        mask[i] = key > least ? 1.0f : 0.0f;
    }
}

inline void varied_delta(const Block& block, int j) {
    float mask[kBlock], delta[kBlock];
    varied(block, mask);
    delta_of(block, j, delta);
    float* out = block.out();
    for (int64_t i = 0; i < block.count; ++i) out[i] = delta[i] * mask[i];
}

inline void select_and_erase(const Block& block, const float* weights) {
    float mask[kBlock], delta[kBlock], total[kBlock] = {}, sum[kBlock] = {}, share[kBlock] = {};
    varied(block, mask);
    for (int j = 0; j < block.args.inputs_count; ++j) {
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i) total[i] += delta[i] * mask[i];
    }
    for (int j = 0; j < block.args.inputs_count; ++j) {
        const float weight = weights[j];
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i) {
            const float own = delta[i] * mask[i];
            const float signed_own = total[i] >= 0.0f ? own : -own;
            const float used = signed_own > 0.0f ? weight : 0.0f;
            sum[i] += own * used;
            share[i] += used;
        }
    }
    for (int64_t i = 0; i < block.count; ++i)
        sum[i] = sum[i] / (share[i] < 1e-6f ? 1e-6f : share[i]);
    add_base(block, sum);
}

inline void importance(const Block& block) {
    const float* x = block.input(0);
    const float* base = block.base();
    const float* factors = block.args.factors + block.at;
    float* out = block.out();
    for (int64_t i = 0; i < block.count; ++i) out[i] = __builtin_fabsf(x[i] - base[i]) * factors[i];
}

inline void fuse(const Block& block, float least) {
    const float* x = block.input(0);
    const float* base = block.base();
    const float* factors = block.args.factors + block.at;
    float* out = block.out();
    for (int64_t i = 0; i < block.count; ++i) {
        const float delta = x[i] - base[i];
        const float kept = __builtin_fabsf(delta) * factors[i] >= least ? 1.0f : 0.0f;
        out[i] = base[i] + delta * kept;
    }
}

inline void largest(const Block& block, float scale) {
    float delta[kBlock], best[kBlock];
    delta_of(block, 0, best);
    for (int j = 1; j < block.args.inputs_count; ++j) {
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i)
            best[i] = __builtin_fabsf(delta[i]) > __builtin_fabsf(best[i]) ? delta[i] : best[i];
    }
    for (int64_t i = 0; i < block.count; ++i) best[i] *= scale;
    add_base(block, best);
}

// numbers: how many must agree, the scale, then a weight and a mask's factor for each model.
inline void agreed(const Block& block, const float* numbers) {
    float delta[kBlock], sum[kBlock] = {}, votes[kBlock] = {};
    for (int j = 0; j < block.args.inputs_count; ++j) {
        const float weight = numbers[2 + 2 * j];
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i) sum[i] += delta[i] * weight;
    }
    for (int j = 0; j < block.args.inputs_count; ++j) {
        const float factor = numbers[3 + 2 * j];
        delta_of(block, j, delta);
        for (int64_t i = 0; i < block.count; ++i)
            votes[i] += __builtin_fabsf(delta[i]) >= __builtin_fabsf(sum[i] - delta[i]) * factor
                            ? 1.0f
                            : 0.0f;
    }
    for (int64_t i = 0; i < block.count; ++i)
        sum[i] = sum[i] * (votes[i] >= numbers[0] ? 1.0f : 0.0f) * numbers[1];
    add_base(block, sum);
}

inline void operate(const Operation& own, const float* numbers, const float* a, const float* b,
                    const float* c, float* __restrict to, int64_t count) {
    switch (own.op) {
        case Op::kConstant:
            for (int64_t i = 0; i < count; ++i) to[i] = numbers[own.a];
            return;
        case Op::kCopy:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i];
            return;
        case Op::kAdd:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i];
            return;
        case Op::kSubtract:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] - b[i];
            return;
        case Op::kMultiply:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] * b[i];
            return;
        case Op::kDivide:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] / b[i];
            return;
        case Op::kNegative:
            for (int64_t i = 0; i < count; ++i) to[i] = -a[i];
            return;
        case Op::kAbsolute:
            for (int64_t i = 0; i < count; ++i) to[i] = __builtin_fabsf(a[i]);
            return;
        case Op::kMinimum:
            for (int64_t i = 0; i < count; ++i) to[i] = b[i] < a[i] ? b[i] : a[i];
            return;
        case Op::kMaximum:
            for (int64_t i = 0; i < count; ++i) to[i] = b[i] > a[i] ? b[i] : a[i];
            return;
        case Op::kLess:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] < b[i] ? 1.0f : 0.0f;
            return;
        case Op::kLessEqual:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] <= b[i] ? 1.0f : 0.0f;
            return;
        case Op::kWhere:
            for (int64_t i = 0; i < count; ++i) to[i] = a[i] != 0.0f ? b[i] : c[i];
            return;
        case Op::kLast:
            return;
    }
}

inline void expression(const Block& block) {
    const PointwiseArgs& args = block.args;
    const auto place = [&](int i) -> float* {
        return args.results + (i - args.inputs_count - 1) * args.results_step;
    };
    const auto operand = [&](int i) -> const float* {
        return i < args.inputs_count    ? block.input(i)
               : i == args.inputs_count ? block.base()
                                        : place(i);
    };
    for (int at = 0; at < args.operations_count; ++at) {
        const Operation& own = args.operations[at];
        const bool last = at + 1 == args.operations_count;
        operate(own, args.numbers, operand(own.op == Op::kConstant ? 0 : own.a), operand(own.b),
                operand(own.c), last ? block.out() : place(own.to), block.count);
    }
}

inline void pointwise_block(const Block& block) {
    const float* numbers = block.args.numbers;
    switch (block.args.kind) {
        case Formula::kZero:
            std::memset(block.out(), 0, static_cast<size_t>(block.count) * sizeof(float));
            return;
        case Formula::kNearSwap:
            return near_swap(block, numbers[0]);
        case Formula::kActive:
            return is_count(block, numbers[0], numbers[1]);
        case Formula::kReinforced:
            return reinforced(block, numbers[0], numbers + 1);
        case Formula::kVariance:
            return variance(block, block.out());
        case Formula::kVaried:
            return varied(block, block.out());
        case Formula::kVariedDelta:
            return varied_delta(block, static_cast<int>(numbers[0]));
        case Formula::kSelectAndErase:
            return select_and_erase(block, numbers);
        case Formula::kImportance:
            return importance(block);
        case Formula::kFuse:
            return fuse(block, numbers[0]);
        case Formula::kLargest:
            return largest(block, numbers[0]);
        case Formula::kAgreed:
            return agreed(block, numbers);
        case Formula::kExpression:
            return expression(block);
        case Formula::kLast:
            return;
    }
}

void pointwise(const PointwiseArgs& args) {
    for (int64_t at = 0; at < args.count; at += kBlock)
        pointwise_block({args, at, args.count - at < kBlock ? args.count - at : kBlock});
}
