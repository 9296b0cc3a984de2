#include "primitives/pointwise.h"

#include <memory>
#include <stdexcept>

#include "primitives/tiles.h"

namespace fastmerge {

namespace {

constexpr size_t kAny = SIZE_MAX;

struct Shape {
    const char* name;
    size_t inputs;  // kAny: one or more
    size_t numbers, numbers_per_input;
    bool factors;
};

// By Formula.
constexpr Shape kShapes[] = {
    {"zero", kAny, 0, 0, false},         {"near_swap", 1, 1, 0, false},
    {"active", kAny, 2, 0, false},       {"reinforced", kAny, 1, 1, false},
    {"variance", kAny, 0, 0, false},     {"varied", kAny, 0, 0, false},
    {"varied_delta", kAny, 1, 0, false}, {"select_and_erase", kAny, 0, 1, false},
    {"importance", 1, 0, 0, true},       {"fuse", 1, 1, 0, true},
    {"largest", kAny, 1, 0, false},      {"agreed", kAny, 2, 2, false},
};
static_assert(std::size(kShapes) == static_cast<size_t>(Formula::kLast));

}  // namespace

Formula formula_named(const std::string& name) {
    for (size_t i = 0; i < std::size(kShapes); ++i)
        if (name == kShapes[i].name) return static_cast<Formula>(i);
    throw std::invalid_argument("no formula '" + name + "'");
}

Pointwise::Pointwise(Formula kind, std::vector<Span> inputs, const Span& base,
                     std::vector<float> numbers, const std::optional<Selection>& selection,
                     std::vector<float> factors)
    : kind_(kind),
      inputs_(std::move(inputs)),
      base_(base),
      numbers_(std::move(numbers)),
      factors_(std::move(factors)),
      selection_(selection.value_or(Selection())),
      keys_(round_keys(selection_.key)) {
    const Shape& shape = kShapes[static_cast<size_t>(kind)];
    const size_t k = inputs_.size();
    check_inputs(inputs_, &base_, base_.count);
    if (shape.inputs != kAny && k != shape.inputs)
        throw std::invalid_argument("another number of inputs than the formula has");
    if (numbers_.size() != shape.numbers + k * shape.numbers_per_input)
        throw std::invalid_argument("other numbers than the formula has");
    if (kind == Formula::kVariedDelta && !(numbers_[0] >= 0 && numbers_[0] < static_cast<float>(k)))
        throw std::invalid_argument("no input of that number");
    if (selection_.kind == Sparsity::kRandom || selection_.ceiling_bits != Selection().ceiling_bits)
        throw std::invalid_argument("a formula's selection is by size");
    const auto rows = static_cast<int64_t>(factors_.size());
    if (shape.factors != !factors_.empty() || (rows > 0 && base_.count % rows != 0))
        throw std::invalid_argument("one factor for each row is needed, where the formula has any");
}

const void* Pointwise::read(int64_t first, int64_t count, DType, void* buffer) const {
    const auto tile = static_cast<size_t>(std::min(count, kTile));
    const size_t k = inputs_.size();
    // A tile in fp32 of each, one as it is stored, and the factors.
    const std::unique_ptr<float[]> room(new float[(k + 3) * tile]);
    float* const stored = room.get() + (k + 1) * tile;
    float* const factors = room.get() + (k + 2) * tile;
    std::vector<const float*> pointers(k);
    const Kernels& table = kernels();
    PointwiseArgs args = {};
    args.kind = kind_;
    args.inputs = pointers.data();
    args.inputs_count = static_cast<int>(k);
    args.numbers = numbers_.data();
    args.factors = factors;
    for_each_tile(first, first + count, [&](int64_t begin, int64_t end) {
        const int64_t length = end - begin;
        const auto widened = [&](const Span& span, size_t slot) {
            float* to = room.get() + slot * tile;
            const void* from = span.read(begin, length, stored);
            if (span.dtype == DType::kF32 && from != stored &&
                reinterpret_cast<uintptr_t>(from) % alignof(float) == 0)
                return static_cast<const float*>(from);
            table.widen[static_cast<size_t>(span.dtype)](from, to, length);
            return static_cast<const float*>(to);
        };
        for (size_t j = 0; j < k; ++j) pointers[j] = widened(inputs_[j], j);
        args.base = widened(base_, k);
        args.out = static_cast<float*>(buffer) + (begin - first);
        if (!factors_.empty()) {
            const int64_t cols = base_.count / static_cast<int64_t>(factors_.size());
            for (int64_t at = begin; at < end;) {
                const int64_t row = at / cols, next = std::min(end, (row + 1) * cols);
                std::fill(factors + (at - begin), factors + (next - begin),
                          factors_[static_cast<size_t>(row)]);
                at = next;
            }
        }
        args.keep = keep_in_tile(selection_, keys_, static_cast<uint64_t>(begin));
        args.index = static_cast<uint64_t>(begin);
        args.count = length;
        table.pointwise(args);
    });
    return buffer;
}

}  // namespace fastmerge
