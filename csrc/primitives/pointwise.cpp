#include "primitives/pointwise.h"

#include <memory>
#include <stdexcept>

#include "primitives/tiles.h"

namespace fastmerge {

namespace {

constexpr size_t kAny = SIZE_MAX;
constexpr int64_t kStep = 512;  // elements: of five tensors they stay in the first-level cache
static_assert(kTile % kStep == 0);
constexpr int kMostResults = 1 << 12;  // of an expression at a time: 8 MiB a thread

struct Shape {
    const char* name;
    size_t inputs;  // kAny: one or more
    size_t numbers, numbers_per_input;
    bool factors;
};

// By Formula.
constexpr Shape kShapes[] = {
    {"zero", kAny, 0, 0, false},          {"near_swap", 1, 1, 0, false},
    {"active", kAny, 2, 0, false},        {"reinforced", kAny, 1, 1, false},
    {"variance", kAny, 0, 0, false},      {"varied", kAny, 0, 0, false},
    {"varied_delta", kAny, 1, 0, false},  {"select_and_erase", kAny, 0, 1, false},
    {"importance", 1, 0, 0, true},        {"fuse", 1, 1, 0, true},
    {"largest", kAny, 1, 0, false},       {"agreed", kAny, 2, 2, false},
    {"expression", kAny, kAny, 0, false},
};
static_assert(std::size(kShapes) == static_cast<size_t>(Formula::kLast));

struct Arity {
    const char* name;
    int operands;
};

// By Op.
constexpr Arity kArities[] = {
    {"constant", 0}, {"copy", 1},       {"add", 2},      {"subtract", 2}, {"multiply", 2},
    {"divide", 2},   {"negative", 1},   {"absolute", 1}, {"minimum", 2},  {"maximum", 2},
    {"less", 2},     {"less_equal", 2}, {"where", 3},
};
static_assert(std::size(kArities) == static_cast<size_t>(Op::kLast));

}  // namespace

Formula formula_named(const std::string& name) {
    for (size_t i = 0; i < std::size(kShapes); ++i)
        if (name == kShapes[i].name) return static_cast<Formula>(i);
    throw std::invalid_argument("no formula '" + name + "'");
}

Op operation_named(const std::string& name) {
    for (size_t i = 0; i < std::size(kArities); ++i)
        if (name == kArities[i].name) return static_cast<Op>(i);
    throw std::invalid_argument("no operation '" + name + "'");
}

Pointwise::Pointwise(Formula kind, std::vector<Span> inputs, const Span& base,
                     std::vector<float> numbers, const std::optional<Selection>& selection,
                     std::vector<float> factors, std::vector<Operation> operations)
    : kind_(kind),
      inputs_(std::move(inputs)),
      base_(base),
      numbers_(std::move(numbers)),
      factors_(std::move(factors)),
      selection_(selection.value_or(Selection())),
      keys_(round_keys(selection_.key)),
      operations_(std::move(operations)) {
    const Shape& shape = kShapes[static_cast<size_t>(kind)];
    const size_t k = inputs_.size();
    check_inputs(inputs_, &base_, base_.count);
    if (shape.inputs != kAny && k != shape.inputs)
        throw std::invalid_argument("another number of inputs than the formula has");
    if (shape.numbers != kAny && numbers_.size() != shape.numbers + k * shape.numbers_per_input)
        throw std::invalid_argument("other numbers than the formula has");
    if (kind == Formula::kVariedDelta && !(numbers_[0] >= 0 && numbers_[0] < static_cast<float>(k)))
        throw std::invalid_argument("no input of that number");
    if (selection_.kind == Sparsity::kRandom || selection_.ceiling_bits != Selection().ceiling_bits)
        throw std::invalid_argument("a formula's selection is by size");
    check_operations();
    const auto rows = static_cast<int64_t>(factors_.size());
    if (shape.factors != !factors_.empty() || (rows > 0 && base_.count % rows != 0))
        throw std::invalid_argument("one factor for each row is needed, where the formula has any");
}

// Every place is written before it is read, and none by what reads it.
void Pointwise::check_operations() {
    if ((kind_ == Formula::kExpression) == operations_.empty())
        throw std::invalid_argument("an expression has operations, and no other formula");
    const auto leaves = static_cast<int>(inputs_.size()) + 1;
    std::vector<bool> written(inputs_.size() + 1, true);
    for (Operation& own : operations_) {
        if (own.to < leaves || own.to > leaves + kMostResults)
            throw std::invalid_argument("no place for a result of that number");
        int* const operands[] = {&own.a, &own.b, &own.c};
        const int used = kArities[static_cast<size_t>(own.op)].operands;
        for (int i = 0; i < 3; ++i) {
            if (i >= used) {
                if (own.op != Op::kConstant || i > 0) *operands[i] = 0;
            } else if (*operands[i] < 0 || *operands[i] >= static_cast<int>(written.size()) ||
                       !written[static_cast<size_t>(*operands[i])] || *operands[i] == own.to) {
                throw std::invalid_argument("an operation reads what is not there");
            }
        }
        if (own.op == Op::kConstant && (own.a < 0 || static_cast<size_t>(own.a) >= numbers_.size()))
            throw std::invalid_argument("no constant of that number");
        written.resize(std::max(written.size(), static_cast<size_t>(own.to) + 1));
        written[static_cast<size_t>(own.to)] = true;
        results_ = std::max<int64_t>(results_, own.to - leaves + 1);
    }
}

// What one read needs: a step in fp32 of each input and the base, one as it is stored, the factors,
// and an expression's results.
class Pointwise::Reading {
   public:
    explicit Reading(const Pointwise& of)
        : of_(of),
          inputs_(of.inputs_.size()),
          room_(new float[(inputs_ + 3 + static_cast<size_t>(of.results_)) * kStep]),
          stored_(room_.get() + (inputs_ + 1) * kStep),
          factors_(stored_ + kStep),
          pointers_(inputs_) {
        args_.kind = of.kind_;
        args_.inputs = pointers_.data();
        args_.inputs_count = static_cast<int>(inputs_);
        args_.numbers = of.numbers_.data();
        args_.factors = factors_;
        args_.operations = of.operations_.data();
        args_.operations_count = static_cast<int>(of.operations_.size());
        args_.results = factors_ + kStep;
        args_.results_step = kStep;
    }

    void keep_at(int64_t tile) {
        args_.keep = keep_in_tile(of_.selection_, of_.keys_, static_cast<uint64_t>(tile));
    }

    void fill(int64_t begin, int64_t end, float* out) {
        for (size_t j = 0; j < inputs_; ++j) pointers_[j] = widened(of_.inputs_[j], begin, end, j);
        args_.base = widened(of_.base_, begin, end, inputs_);
        if (!of_.factors_.empty()) spread_factors(begin, end);
        args_.index = static_cast<uint64_t>(begin);
        args_.count = end - begin;
        args_.out = out;
        table_.pointwise(args_);
    }

   private:
    const float* widened(const Span& span, int64_t begin, int64_t end, size_t slot) {
        float* to = room_.get() + slot * kStep;
        const void* from = span.read(begin, end - begin, stored_);
        if (span.dtype == DType::kF32 && from != stored_ &&
            reinterpret_cast<uintptr_t>(from) % alignof(float) == 0)
            return static_cast<const float*>(from);
        table_.widen[static_cast<size_t>(span.dtype)](from, to, end - begin);
        return to;
    }

    void spread_factors(int64_t begin, int64_t end) {
        const int64_t cols = of_.base_.count / static_cast<int64_t>(of_.factors_.size());
        for (int64_t at = begin; at < end;) {
            const int64_t row = at / cols, next = std::min(end, (row + 1) * cols);
            const bool whole = next - at == kStep;
            if (whole && row == row_) return;  // as they are
            std::fill(factors_ + (at - begin), factors_ + (next - begin),
                      of_.factors_[static_cast<size_t>(row)]);
            row_ = whole ? row : -1;
            at = next;
        }
    }

    const Pointwise& of_;
    const size_t inputs_;
    const Kernels& table_ = kernels();
    const std::unique_ptr<float[]> room_;
    float* const stored_;
    float* const factors_;
    int64_t row_ = -1;  // whose factor all of them are
    std::vector<const float*> pointers_;
    PointwiseArgs args_ = {};
};

const void* Pointwise::read(int64_t first, int64_t count, DType, void* buffer) const {
    static const float kZeros[kTile] = {};
    if (kind_ == Formula::kZero && count <= kTile) return kZeros;
    Reading reading(*this);
    for_each_tile(first, first + count, [&](int64_t tile, int64_t tile_end) {
        reading.keep_at(tile);
        for (int64_t begin = tile; begin < tile_end; begin += kStep)
            reading.fill(begin, std::min(tile_end, begin + kStep),
                         static_cast<float*>(buffer) + (begin - first));
    });
    return buffer;
}

}  // namespace fastmerge
