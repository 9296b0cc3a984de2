#include "primitives/combine.h"

#include <atomic>
#include <cstring>

namespace fastmerge {

namespace {

// The accumulator's start: see kernels/combine.inl.
template <class Number>
Number start_of(int nonzero) {
    return nonzero == 1 ? -Number(0) : Number(0);
}

void run(const CombineArgs& args, size_t type) { kernels().combine[type](args); }
void run(const WideCombineArgs& args, size_t type) { kernels().combine_wide[type](args); }

// Whether all lie in memory as the output's type, whose NaN are not looked for while they are in
// the cache.
bool from_memory_to_memory(const std::vector<Span>& inputs, const Sink& out, DType reads) {
    bool plain = !out.checked() && out.dtype() == reads;
    for (const Span& span : inputs) plain = plain && span.dtype == reads && !span.elements;
    return plain;
}

// Sums that read and write more bytes than kCaches write past the caches: these could not hold
// them until they are read again, and would first read what is overwritten. Of two tensors of 16
// MiB that takes 0.8 of the time, of 4 MiB 1. An output as large as this is mostly of pages that
// are new to the process, which the system has just filled with zeros in the caches: there it
// takes 1.05.
bool goes_past_caches(int64_t inputs, int64_t output_bytes) {
    return output_bytes < kCaches && (inputs + 1) * output_bytes > kCaches;
}

// Number: what it is computed in; `reads`: what the kernel takes.
template <class Number>
int64_t combine_in(Pool& pool, const std::vector<Span>& inputs,
                   const std::vector<Number>& by_vector, Sink& out, float divisor,
                   const Vectors& vectors, DType reads) {
    const size_t k = inputs.size();
    const auto number = static_cast<size_t>(vectors.count());
    std::vector<Number> by_input, starts;  // for columns: one coefficient per element of a row
    if (vectors.axis == Axis::kColumns) {
        by_input.resize(by_vector.size());
        starts.resize(number);
        for (size_t v = 0; v < number; ++v) {
            int nonzero = 0;
            for (size_t j = 0; j < k; ++j) {
                by_input[j * number + v] = by_vector[v * k + j];
                nonzero += by_vector[v * k + j] != 0;
            }
            starts[v] = start_of<Number>(nonzero);
        }
    }
    const bool plain = from_memory_to_memory(inputs, out, reads);
    const bool past_caches =
        plain && vectors.axis == Axis::kAll &&
        goes_past_caches(static_cast<int64_t>(k),
                         out.count() * static_cast<int64_t>(item_bytes(reads)));
    // What a tile of the usual length costs besides its elements is a tenth of a sum.
    const int64_t tile = plain ? int64_t{1} << 20 : tile_for(inputs);
    const int64_t row_length =
        vectors.axis == Axis::kAll ? std::max<int64_t>(1, out.count()) : vectors.cols;

    const auto make = [&] {
        return [&, used = std::vector<const void*>(k), factors = std::vector<const Number*>(k)](
                   TileReader& reader, int64_t begin, int64_t end, char* to) mutable {
            const auto item = static_cast<int64_t>(item_bytes(reader.dtype()));
            for (int64_t at = begin; at < end;) {
                const int64_t row = at / row_length, column = at % row_length;
                const int64_t count = std::min(end, (row + 1) * row_length) - at;
                reader.seek(at, count);
                CombineArgsOf<Number> args = {};
                args.inputs = used.data();
                args.coefficients = factors.data();
                args.per_element = vectors.axis == Axis::kColumns;
                Number start = 0;
                int used_count = 0;
                for (size_t j = 0; j < k; ++j) {
                    const Number* factor =
                        args.per_element ? by_input.data() + j * number + column
                                         : by_vector.data() + static_cast<size_t>(row) * k + j;
                    if (!args.per_element && *factor == 0) continue;
                    used[static_cast<size_t>(used_count)] = reader.inputs()[j];
                    factors[static_cast<size_t>(used_count++)] = factor;
                }
                start = start_of<Number>(used_count);
                args.starts = args.per_element ? starts.data() + column : &start;
                args.inputs_count = used_count;
                args.divide = divisor != 1.0f;  // which takes a quarter of the time
                args.divisor = divisor;
                args.out = to + (at - begin) * item;
                args.past_caches = past_caches;
                args.count = count;
                run(args, reader.type());
                at += count;
            }
        };
    };
    return fill_sink(pool, inputs, nullptr, out, make, tile, reads);
}

}  // namespace

int64_t combine(Pool& pool, const std::vector<Span>& inputs,
                const std::vector<double>& coefficients, Sink& out, const double* divisor,
                const Vectors& vectors, bool wide) {
    check_inputs(inputs, nullptr, out.count());
    vectors.check(out.count());
    if (coefficients.size() != static_cast<size_t>(vectors.count()) * inputs.size())
        throw std::invalid_argument("one coefficient per vector and input is needed");
    if (out.dtype() == DType::kRaw) throw std::invalid_argument("the output must not be RAW");
    if (wide) {
        if (divisor) throw std::invalid_argument("a wide sum has no divisor");
        const DType reads = vectors.axis == Axis::kColumns ? DType::kF32 : out.dtype();
        return combine_in<double>(pool, inputs, coefficients, out, 1.0f, vectors, reads);
    }
    return combine_in<float>(pool, inputs, {coefficients.begin(), coefficients.end()}, out,
                             divisor ? static_cast<float>(*divisor) : 1.0f, vectors, out.dtype());
}

void copy(Pool& pool, const Span& source, Sink& out) {
    if (source.dtype != out.dtype() || source.count != out.count())
        throw std::invalid_argument("source and output differ in dtype or element count");
    const auto item = static_cast<int64_t>(item_bytes(source.dtype));
    pool.run(out.pieces(), [&](int64_t piece) {
        int64_t begin = 0, end = 0;
        out.range(piece, begin, end);
        void* to = out.open(piece);
        const void* from = source.read(begin, end - begin, to);
        if (from != to) std::memcpy(to, from, static_cast<size_t>((end - begin) * item));
        out.close(piece);
    });
}

bool equal(Pool& pool, const Span& a, const Span& b) {
    if (a.dtype != b.dtype || a.count != b.count || a.elements || b.elements) return false;
    constexpr int64_t kFirst = 4096, kPiece = 1 << 20;  // bytes; most tensors differ in the first
    const int64_t bytes = a.count * static_cast<int64_t>(item_bytes(a.dtype));
    std::atomic<bool> same{true};
    const auto compare = [&](int64_t begin, int64_t end) {
        if (same.load(std::memory_order_relaxed) &&
            std::memcmp(a.at(0) + begin, b.at(0) + begin, static_cast<size_t>(end - begin)) != 0)
            same = false;
    };
    if (bytes == 0) return true;
    compare(0, std::min(bytes, kFirst));
    if (same && bytes > kFirst)
        pool.run((bytes + kPiece - 1) / kPiece, [&](int64_t piece) {
            compare(piece * kPiece, std::min(bytes, (piece + 1) * kPiece));
        });
    return same;
}

}  // namespace fastmerge
