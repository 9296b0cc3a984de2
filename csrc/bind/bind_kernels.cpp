// fastmerge._C's kernels: arguments in, the GIL released, numbers out.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bind/bind.h"
#include "bind/selection.h"
#include "pool.h"
#include "primitives/combine.h"
#include "primitives/consensus.h"
#include "primitives/dequantised.h"
#include "primitives/divergence.h"
#include "primitives/gram.h"
#include "primitives/low_rank.h"
#include "primitives/narrowed.h"
#include "primitives/pointwise.h"
#include "primitives/quantised.h"
#include "primitives/select.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

using Numbers = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::vector<Span> spans(const std::vector<View>& views) {
    std::vector<Span> found;
    for (const View& view : views) found.push_back(view.span);
    return found;
}

Vectors vectors_of(std::optional<int> axis, int64_t rows, int64_t cols) {
    if (!axis) return {};
    if (*axis != 0 && *axis != 1) throw std::invalid_argument("axis must be None, 0 or 1");
    return {*axis == 1 ? Axis::kRows : Axis::kColumns, rows, cols};
}

py::array_t<double> bound_gram(Pool& pool, const std::vector<View>& inputs,
                               std::optional<View> base, std::optional<int> axis, int64_t rows,
                               int64_t cols) {
    const std::vector<Span> tensors = spans(inputs);
    const Vectors vectors = vectors_of(axis, rows, cols);
    auto result = std::make_unique<std::vector<double>>();
    {
        Released release;
        *result = gram(pool, tensors, base ? &base->span : nullptr, vectors);
    }
    const auto m = static_cast<py::ssize_t>(inputs.size() + (base ? 1 : 0));
    std::vector<py::ssize_t> dimensions = {m, m};
    if (axis) dimensions.insert(dimensions.begin(), vectors.count());
    const double* data = result->data();
    py::capsule owner(result.release(),
                      [](void* p) { delete static_cast<std::vector<double>*>(p); });
    return py::array_t<double>(dimensions, data, owner);
}

int64_t bound_combine(Pool& pool, const std::vector<View>& inputs, const Numbers& coefficients,
                      Sink& out, std::optional<double> divisor, std::optional<int> axis,
                      int64_t rows, int64_t cols, bool wide) {
    const std::vector<Span> tensors = spans(inputs);
    const Vectors vectors = vectors_of(axis, rows, cols);
    const std::vector<double> numbers(coefficients.data(),
                                      coefficients.data() + coefficients.size());
    Released release;
    return combine(pool, tensors, numbers, out, divisor ? &*divisor : nullptr, vectors, wide);
}

// Where the bits of `count` elements lie, of each input that has a mask.
std::vector<uint32_t*> bits_of(const std::vector<std::optional<View>>& masks, int64_t count) {
    std::vector<uint32_t*> found;
    for (const std::optional<View>& mask : masks) {
        if (mask && (mask->span.dtype != DType::kF32 || mask->span.count < (count + 31) / 32))
            throw std::invalid_argument("a mask is F32 memory of 32 elements a word");
        found.push_back(mask ? reinterpret_cast<uint32_t*>(const_cast<char*>(mask->span.at(0)))
                             : nullptr);
    }
    return found;
}

std::vector<Selection> bound_select(Pool& pool, const std::vector<View>& inputs, const View& base,
                                    const std::vector<Sparsify>& specs,
                                    const std::vector<std::optional<View>>& masks) {
    const std::vector<Part> parts = {{spans(inputs), base.span, 0}};
    const std::vector<uint32_t*> bits = bits_of(masks, base.span.count);
    Released release;
    return select(pool, parts, specs, bits);
}

std::vector<Selection> bound_select_across(Pool& pool, const std::vector<std::vector<View>>& inputs,
                                           const std::vector<View>& bases,
                                           const std::vector<int64_t>& origins,
                                           const std::vector<Sparsify>& specs,
                                           const std::vector<size_t>& ends,
                                           const py::object& passes) {
    if (bases.size() != inputs.size() || origins.size() != inputs.size())
        throw std::invalid_argument("one base and one origin per tensor are needed");
    std::vector<Part> parts;
    for (size_t i = 0; i < inputs.size(); ++i)
        parts.push_back({spans(inputs[i]), bases[i].span, origins[i]});
    if (passes.is_none()) {
        Released release;
        return select(pool, parts, specs);
    }
    if (ends.empty() || ends.back() != parts.size() || !std::is_sorted(ends.begin(), ends.end()))
        throw std::invalid_argument("pieces end in order, the last with the tensors");
    Pieces pieces;
    pieces.ends = ends;
    pieces.pass = [&](size_t number, const std::function<std::string(size_t)>& count) {
        py::gil_scoped_acquire acquire;
        const auto counted = [&](size_t piece) {
            if (piece >= number) throw std::invalid_argument("no such piece");
            std::string found;
            {
                Released release;
                found = count(piece);
            }
            return py::bytes(found);
        };
        std::vector<std::string> found;
        for (const py::handle one : passes(number, py::cpp_function(counted)))
            found.push_back(py::cast<std::string>(one));
        if (found.size() != number) throw std::invalid_argument("one result per piece is needed");
        return found;
    };
    Released release;
    return select(pool, parts, specs, {}, &pieces);
}

int64_t bound_consensus(Pool& pool, const std::vector<View>& inputs, const View& base,
                        const std::vector<float>& weights, std::vector<Selection> selections,
                        Sink& out, const std::vector<std::optional<View>>& masks, bool elect,
                        bool normalize, float scale, int64_t origin, int votes, bool counted) {
    const std::vector<Span> tensors = spans(inputs);
    const std::vector<uint32_t*> bits = bits_of(masks, origin + base.span.count);
    for (size_t j = 0; j < selections.size(); ++j) {
        if (j < bits.size()) selections[j].mask = bits[j];
        if (selections[j].kind == Sparsity::kRanked && !selections[j].mask)
            throw std::invalid_argument("what is drawn by rank needs its mask");
    }
    Released release;
    const Agreement agreement = {elect, normalize, scale, origin, votes_of(votes), counted};
    return consensus(pool, tensors, base.span, weights, selections, out, agreement);
}

View bound_pointwise(const std::string& formula, const std::vector<View>& inputs, const View& base,
                     const std::vector<float>& numbers, const std::optional<Selection>& selection,
                     const std::optional<py::array_t<float, py::array::c_style>>& factors,
                     const std::vector<std::tuple<std::string, int, int, int, int>>& operations) {
    std::vector<float> each;
    std::vector<Operation> steps;
    for (const auto& [name, to, a, b, c] : operations)
        steps.push_back({operation_named(name), to, a, b, c});
    if (factors) each.assign(factors->data(), factors->data() + factors->size());
    auto made = std::make_shared<Pointwise>(formula_named(formula), spans(inputs), base.span,
                                            numbers, selection, std::move(each), std::move(steps));
    py::list owners;
    owners.append(base);
    for (const View& view : inputs) owners.append(view);
    return View{{nullptr, base.span.count, DType::kF32, made.get()}, std::move(owners), made};
}

View bound_dequantised(const std::string& coding, const View& codes, const View& scales,
                       int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols) {
    auto made = std::make_shared<Dequantised>(coding_named(coding), codes.span, scales.span, rows,
                                              cols, block_rows, block_cols);
    return View{
        {nullptr, made->count(), DType::kF32, made.get()}, py::make_tuple(codes, scales), made};
}

View bound_narrowed(const View& numbers) {
    auto made = std::make_shared<Narrowed>(numbers.span);
    return View{{nullptr, made->count(), DType::kF32, made.get()}, py::make_tuple(numbers), made};
}

View bound_low_rank(const View& base, const View& left, const View& right, int64_t rank,
                    float scale,
                    const std::optional<py::array_t<float, py::array::c_style>>& factors,
                    bool by_column, int64_t matrices) {
    std::vector<float> each;
    if (factors) each.assign(factors->data(), factors->data() + factors->size());
    auto made = std::make_shared<LowRank>(base.span, left.span, right.span, rank, scale,
                                          std::move(each), by_column, matrices);
    return View{
        {nullptr, made->count(), DType::kF32, made.get()}, py::make_tuple(base, left, right), made};
}

py::tuple bound_quantise(Pool& pool, const View& source, const std::string& coding, Sink& codes,
                         Sink& scales, int64_t rows, int64_t cols, int64_t block_rows,
                         int64_t block_cols, bool power_of_two) {
    Rounding made;
    {
        Released release;
        made = quantise(pool, source.span, coding_named(coding), rows, cols, block_rows, block_cols,
                        power_of_two, codes, scales);
    }
    return py::make_tuple(made.nonfinite, made.error, made.size);
}

py::array_t<double> bound_divergences(Pool& pool, const View& x, const View& base, int64_t cols) {
    std::vector<double> found;
    {
        Released release;
        found = divergences(pool, x.span, base.span, cols);
    }
    return py::array_t<double>(static_cast<py::ssize_t>(found.size()), found.data());
}

}  // namespace

void bind_kernels(py::module_& m) {
    using namespace pybind11::literals;

    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("isas", &supported_isas);
    m.def("set_isa", &set_isa, "name"_a);
    m.def("tile_entries", [] { return kTile; });

    def_init(
        py::class_<Pool>(m, "Pool"), +[](int threads) { return std::make_unique<Pool>(threads); },
        "threads"_a)
        .def_property_readonly("threads", &Pool::threads);

    m.def("gram", &bound_gram, "pool"_a, "inputs"_a, "base"_a = py::none(), py::kw_only(),
          "axis"_a = py::none(), "rows"_a = 1, "cols"_a = 0);
    m.def("combine", &bound_combine, "pool"_a, "inputs"_a, "coefficients"_a, "out"_a, py::kw_only(),
          "divisor"_a = py::none(), "axis"_a = py::none(), "rows"_a = 1, "cols"_a = 0,
          "wide"_a = false);
    m.def("select", &bound_select, "pool"_a, "inputs"_a, "base"_a, "specs"_a,
          "masks"_a = py::tuple());
    m.def("consensus", &bound_consensus, "pool"_a, "inputs"_a, "base"_a, "weights"_a,
          "selections"_a, "out"_a, "masks"_a = py::tuple(), py::kw_only(), "elect"_a, "normalize"_a,
          "scale"_a = 1.0f, "origin"_a = 0, "votes"_a = 0, "counted"_a = false);
    m.def("pointwise", &bound_pointwise, "formula"_a, "inputs"_a, "base"_a, "numbers"_a,
          py::kw_only(), "selection"_a = py::none(), "factors"_a = py::none(),
          "operations"_a = py::tuple());
    m.def("dequantised", &bound_dequantised, "coding"_a, "codes"_a, "scales"_a, py::kw_only(),
          "rows"_a, "cols"_a, "block_rows"_a, "block_cols"_a);
    m.def("quantise", &bound_quantise, "pool"_a, "source"_a, "coding"_a, "codes"_a, "scales"_a,
          py::kw_only(), "rows"_a, "cols"_a, "block_rows"_a, "block_cols"_a, "power_of_two"_a);
    m.def(
        "bad_scale", [](const View& scales) { return bad_scale(scales.span); }, "scales"_a,
        py::call_guard<Released>());
    m.def("narrowed", &bound_narrowed, "numbers"_a);
    m.def("low_rank", &bound_low_rank, "base"_a, "left"_a, "right"_a, "rank"_a, "scale"_a,
          py::kw_only(), "factors"_a = py::none(), "by_column"_a = false, "matrices"_a = 1);
    m.def("divergences", &bound_divergences, "pool"_a, "x"_a, "base"_a, "cols"_a);
    m.def("select_across", &bound_select_across, "pool"_a, "inputs"_a, "bases"_a, "origins"_a,
          "specs"_a, "ends"_a = py::tuple(), "passes"_a = py::none());
    m.def(
        "equal",
        [](Pool& pool, const View& a, const View& b) { return equal(pool, a.span, b.span); },
        "pool"_a, "a"_a, "b"_a, py::call_guard<Released>());
    m.def(
        "copy", [](Pool& pool, const View& source, Sink& out) { copy(pool, source.span, out); },
        "pool"_a, "source"_a, "out"_a, py::call_guard<Released>());
}
