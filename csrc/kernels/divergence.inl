// Softmax and its divergence by row. Exponential and logarithm are polynomials of IEEE operations,
// so that no library's version decides bits.
//
// A fine-tune's row moves so little that the sum p ln(p / q) is the 1e-9 by which nearly equal sums
// differ. Both softmaxes add up to one, so that it is as well, in the reals, the sum of
//     p ln(p / q) - p + q = (p + q) ((1 + v) atanh v - v),  v = (p - q) / (p + q)
// which are squares: nothing cancels, and fp32 terms have it to some 1e-6 (fp64 sums of p ln(p / q)
// lose that below deltas of 1e-5). p - q = q (e - s) / (1 + s), e = exp(x - base) - 1, s the mean
// of e by q: no logarithm, one exponential, both of fp32. Rows that are not so near (kFarthest,
// kMost) take p ln(p / q) in fp64, exponential and logarithm right to 1e-15.

constexpr float kFarthest = 0.125f;  // |x - base|: up to it the series below are right to 1e-7
constexpr float kMost = 64.0f;       // |base|: up to it no e^base is lost beside another row's sum

template <class To, class From>
FM_INLINE To bits_as(const From& from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// e^x, |x| <= kMost, to 2e-7.
FM_INLINE float power_of(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last bits are the integer
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // the first has 9 bits
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * bits_as<float>((bits_as<uint32_t>(shifted) + 127) << 23);
}

// e^x for x <= 0; 0 to 1e-307 where x is below -708.
FM_INLINE double exponential(double x) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: its last bits are the integer
    x = x < -708.0 ? -708.0 : x;
    const double shifted = x * 1.4426950408889634 + kRound;
    const double n = shifted - kRound;
    const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double sum = 1.0 / 479001600;
    sum = sum * r + 1.0 / 39916800;
    sum = sum * r + 1.0 / 3628800;
    sum = sum * r + 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    return sum * bits_as<double>((bits_as<uint64_t>(shifted) + 1023) << 52);
}

// Numbers for which the compiler works out each step before the next: the steps of one wait for
// each other, and those of four vectors fill the time (1.2 in place of 1.5 ns an entry;
// exponentials, which have no division, gain nothing).
constexpr int kPack = 32;
typedef double Pack __attribute__((vector_size(kPack * sizeof(double))));
typedef uint64_t PackBits __attribute__((vector_size(kPack * sizeof(uint64_t))));

// p ln(p / q) of normal p and q > 0. ln x is 2 atanh((m - 1) / (m + 1)) + e ln 2 with m between
// sqrt(1/2) and sqrt(2). A NaN's logarithm is by its bits a number.
template <class Number, class Bits>
FM_INLINE void relative_entropy(const Number& p, const Number& q, Number& out) {
    const Number x = p / q;
    const Bits bits = bits_as<Bits>(x);
    const Bits exponent = (bits + (0x3FF0000000000000u - 0x3FE6A09E667F3BCDu)) >> 52;
    const Bits mantissa = bits - ((exponent - 1023) << 52), whole = exponent | 0x4330000000000000u;
    const Number m = bits_as<Number>(mantissa);
    const Number e = bits_as<Number>(whole) - (4503599627370496.0 + 1023);
    const Number s = (m - 1.0) / (m + 1.0), z = s * s;
    Number sum = z * (1.0 / 21) + 1.0 / 19;
    sum = sum * z + 1.0 / 17;
    sum = sum * z + 1.0 / 15;
    sum = sum * z + 1.0 / 13;
    sum = sum * z + 1.0 / 11;
    sum = sum * z + 1.0 / 9;
    sum = sum * z + 1.0 / 7;
    sum = sum * z + 1.0 / 5;
    sum = sum * z + 1.0 / 3;
    const Number logarithm = e * 6.93147180369123816490e-01 +
                             (e * 1.90821492927058770002e-10 + (2.0 * s + 2.0 * s * z * sum));
    out = p * logarithm + (q - q);
}

FM_INLINE void add_to_lanes(const double* values, int64_t count, double* lanes) {
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes)
        for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += values[i + lane];
    for (; i < count; ++i) lanes[i % kSumLanes] += values[i];
}

FM_INLINE void add_moves(const float* values, int64_t count, double* lanes) {
    typedef float Singles __attribute__((vector_size(kMoveLanes * sizeof(float))));
    typedef double Doubles __attribute__((vector_size(kMoveLanes * sizeof(double))));
    Doubles sum;
    std::memcpy(&sum, lanes, sizeof sum);
    int64_t i = 0;
    for (; i + kMoveLanes <= count; i += kMoveLanes) {
        Singles each;
        std::memcpy(&each, values + i, sizeof each);
        sum += __builtin_convertvector(each, Doubles);
    }
    std::memcpy(lanes, &sum, sizeof sum);
    for (; i < count; ++i) lanes[i % kMoveLanes] += static_cast<double>(values[i]);
}

void moves(const MovesArgs& args, MoveSums& sums) {
    float products[kBlock];
    for (int64_t at = 0; at < args.count; at += kBlock) {
        const int64_t part = args.count - at < kBlock ? args.count - at : kBlock;
        const float* x = args.x + at;
        const float* base = args.base + at;
        float* __restrict weights = args.weights + at;
        float* __restrict moved = args.moved + at;
        int32_t far = 0;
        for (int64_t i = 0; i < part; ++i) {
            const float b = base[i], d = x[i] - b;
            far += __builtin_fabsf(d) <= kFarthest ? 0 : 1;
            far += __builtin_fabsf(b) <= kMost ? 0 : 1;
            float e = d * (1.0f / 120) + 1.0f / 24;
            e = e * d + 1.0f / 6;
            e = e * d + 0.5f;
            e = e * d + 1.0f;
            e = e * d;
            const float weight = power_of(b);
            weights[i] = weight;
            moved[i] = e;
            products[i] = weight * e;
        }
        sums.far += far;
        add_moves(weights, part, sums.weights);
        add_moves(products, part, sums.products);
    }
}

void moved_divergence(const MovedArgs& args, double* lanes) {
    float values[kBlock];
    for (int64_t at = 0; at < args.count; at += kBlock) {
        const int64_t part = args.count - at < kBlock ? args.count - at : kBlock;
        const float* weights = args.weights + at;
        const float* moved = args.moved + at;
        for (int64_t i = 0; i < part; ++i) {
            const float weight = weights[i];
            const float change = (moved[i] - args.mean) * args.gain * weight;
            const float v = change / (((weight + weight) + args.added) + change);
            float sum = v * (1.0f / 7) + 1.0f / 7;
            sum = sum * v + 1.0f / 5;
            sum = sum * v + 1.0f / 5;
            sum = sum * v + 1.0f / 3;
            sum = sum * v + 1.0f / 3;
            sum = sum * v + 1.0f;
            values[i] = change * v * sum;
        }
        add_moves(values, part, lanes);
    }
}

float largest_of(const float* x, int64_t count, float most) {
    constexpr int kWide = 32;  // that many running maxima: one alone waits for itself
    float lanes[kWide];
    for (int lane = 0; lane < kWide; ++lane) lanes[lane] = most;
    int64_t i = 0;
    for (; i + kWide <= count; i += kWide)
        for (int lane = 0; lane < kWide; ++lane)
            lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    for (int lane = 0; lane < kWide; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
    return most;
}

void exponentials(const float* x, int64_t count, float most, double* __restrict values,
                  double* lanes) {
    for (int64_t i = 0; i < count; ++i) values[i] = exponential(static_cast<double>(x[i]) - most);
    add_to_lanes(values, count, lanes);
}

void divergence(const DivergenceArgs& args, double* lanes) {
    double values[kBlock];
    for (int64_t at = 0; at < args.count; at += kBlock) {
        const int64_t part = args.count - at < kBlock ? args.count - at : kBlock;
        int64_t i = 0;
        for (; i + kPack <= part; i += kPack) {
            Pack p, q, each;
            std::memcpy(&p, args.x + at + i, sizeof p);
            std::memcpy(&q, args.base + at + i, sizeof q);
            p = p * args.x_factor + 1e-8;
            q = q * args.base_factor + 1e-8;
            relative_entropy<Pack, PackBits>(p, q, each);
            std::memcpy(values + i, &each, sizeof each);
        }
        for (; i < part; ++i) {
            const double p = args.x[at + i] * args.x_factor + 1e-8;
            const double q = args.base[at + i] * args.base_factor + 1e-8;
            relative_entropy<double, uint64_t>(p, q, values[i]);
        }
        add_to_lanes(values, part, lanes);
    }
}
