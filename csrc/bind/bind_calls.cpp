// What repeated calls of fastmerge.ops need not do again in Python: checks take it 2 us a tensor
// and what comes between the kernels 10, where the kernels of 4 Ki entries take 1.
#include <pybind11/functional.h>
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/selection.h"
#include "pool.h"
#include "primitives/combine.h"
#include "primitives/consensus.h"
#include "primitives/gram.h"
#include "primitives/select.h"
#include "sink.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

// torch's attributes and methods, as Python looks them up.
struct Names {
    py::str dtype = name("dtype"), shape = name("shape"), is_cpu = name("is_cpu"),
            is_neg = name("is_neg"), is_contiguous = name("is_contiguous"),
            data_ptr = name("data_ptr"), untyped_storage = name("untyped_storage"),
            nbytes = name("nbytes"), storage_offset = name("storage_offset");

   private:
    static py::str name(const char* text) {
        return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text));
    }
};

const Names& names() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> stored;
    return stored.call_once_and_store_result([] { return Names(); }).get_stored();
}

py::object attribute(py::handle of, const py::str& name) {
    PyObject* found = PyObject_GetAttr(of.ptr(), name.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

py::object asked(py::handle of, const py::str& name) {
    PyObject* found = PyObject_CallMethodNoArgs(of.ptr(), name.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

uint64_t number(py::handle of, const py::str& name) {
    const uint64_t found = PyLong_AsUnsignedLongLong(asked(of, name).ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return found;
}

// The GIL is let go of where others can use the time: not for kernels of a few microseconds, after
// which a caller among many threads would wait for its turn.
class Unlocked {
   public:
    explicit Unlocked(int64_t count) {
        if (count > kHeld) released_.emplace();
    }

   private:
    static constexpr int64_t kHeld = 4096;
    std::optional<Released> released_;
};

// What a merge does with its tensors, all of one element type and count, once Python has decided
// everything that does not depend on their numbers.
class Program {
   public:
    virtual ~Program() = default;
    virtual void run(Pool& pool, const std::vector<Span>& tensors, Sink& out) const = 0;
};

// sum_i c_i x_i / divisor; with a rule, of coefficients that it makes of the Gram matrix.
class Sum : public Program {
   public:
    // Coefficients, and whether they are summed in fp64, of the matrix's rows: Python takes lists
    // of a few numbers in less time than it takes to make an array.
    using Rows = std::vector<std::vector<double>>;
    using Rule = std::function<std::pair<std::vector<double>, bool>(const Rows&)>;

    Sum(std::vector<size_t> parts, std::vector<double> coefficients, std::optional<double> divisor,
        std::optional<Rule> rule, std::optional<size_t> reference)
        : parts_(std::move(parts)),
          coefficients_(std::move(coefficients)),
          divisor_(divisor),
          rule_(std::move(rule)),
          reference_(reference) {}

    void run(Pool& pool, const std::vector<Span>& tensors, Sink& out) const override {
        std::vector<Span> taken;
        for (const size_t part : parts_) taken.push_back(tensors.at(part));
        if (!rule_) return add(pool, taken, coefficients_, out, false);
        const auto [coefficients, wide] = (*rule_)(products(pool, taken));
        add(pool, taken, coefficients, out, wide);
    }

   private:
    void add(Pool& pool, const std::vector<Span>& taken, const std::vector<double>& coefficients,
             Sink& out, bool wide) const {
        const Unlocked unlocked(out.count());
        combine(pool, taken, coefficients, out, divisor_ ? &*divisor_ : nullptr, {}, wide);
    }

    // Of the parts, or of the reference and what the others differ by from it.
    Rows products(Pool& pool, std::vector<Span> taken) const {
        const auto size = static_cast<std::ptrdiff_t>(taken.size());
        std::optional<Span> base;
        if (reference_) {
            base = taken.at(*reference_);
            taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(*reference_));
        }
        std::vector<double> found;
        {
            const Unlocked unlocked(taken.front().count);
            found = gram(pool, taken, base ? &*base : nullptr, {});
        }
        Rows rows;
        for (auto row = found.begin(); row != found.end(); row += size)
            rows.emplace_back(row, row + size);
        return rows;
    }

    const std::vector<size_t> parts_;
    const std::vector<double> coefficients_;
    const std::optional<double> divisor_;
    const std::optional<Rule> rule_;
    const std::optional<size_t> reference_;
};

// What survives of the deltas to the last tensor, or of tensors that are deltas, merged.
class Vote : public Program {
   public:
    // factors: what survives of each delta is multiplied by, where that is not 1.
    Vote(std::vector<Sparsify> specs, std::vector<float> weights, std::vector<float> factors,
         const Agreement& agreement)
        : specs_(std::move(specs)),
          weights_(std::move(weights)),
          factors_(std::move(factors)),
          agreement_(agreement) {
        if (factors_.size() != specs_.size())
            throw std::invalid_argument("one factor per request is needed");
    }

    void run(Pool& pool, const std::vector<Span>& tensors, Sink& out) const override {
        static const Zeros zeros;
        std::vector<Part> parts = {{tensors, {nullptr, out.count(), out.dtype(), &zeros}, 0}};
        Part& part = parts.front();
        if (tensors.size() > specs_.size()) {
            part.base = tensors.back();
            part.inputs.pop_back();
        }
        const Unlocked unlocked(out.count());
        std::vector<std::vector<uint32_t>> drawn(specs_.size());
        std::vector<Selection> kept = chosen(pool, parts, drawn);
        for (size_t j = 0; j < kept.size(); ++j)
            if (factors_[j] != 1.0f) kept[j].rescale = factors_[j];
        consensus(pool, part.inputs, part.base, weights_, kept, out, agreement_);
    }

   private:
    // What is drawn at random to be measured is kept, up to so many entries in all (32 MiB):
    // drawing it again takes half of DARE's time.
    static constexpr int64_t kMostDrawn = int64_t{1} << 28;

    std::vector<Selection> chosen(Pool& pool, const std::vector<Part>& parts,
                                  std::vector<std::vector<uint32_t>>& drawn) const {
        const int64_t count = parts.front().base.count;
        if (std::all_of(specs_.begin(), specs_.end(), is_settled)) {
            std::vector<Selection> kept;
            for (const Sparsify& spec : specs_) kept.push_back(asked(spec, count));
            return kept;
        }
        std::vector<uint32_t*> masks(specs_.size());
        if (agreement_.origin == 0 && count <= kMostDrawn / static_cast<int64_t>(specs_.size()))
            for (size_t j = 0; j < specs_.size(); ++j) {
                if (specs_[j].kind != Sparsity::kRandom) continue;
                drawn[j].resize(static_cast<size_t>(blocks_of(count, 32)));
                masks[j] = drawn[j].data();
            }
        return select(pool, parts, specs_, masks);
    }

    const std::vector<Sparsify> specs_;
    const std::vector<float> weights_, factors_;
    const Agreement agreement_;
};

// Tensors of one shape in the CPU's memory that a call has taken: whatever is like them, in all
// that was checked, is taken again by a comparison.
class Alike {
   public:
    Alike(const py::list& tensors, const std::vector<std::string>& codes) {
        if (tensors.empty() || tensors.size() != codes.size())
            throw std::invalid_argument("one dtype per tensor is needed");
        shape_ = tensors[0].attr("shape");
        for (const py::handle length : shape_) {
            lengths_.push_back(length.cast<int64_t>());
            count_ *= lengths_.back();
        }
        for (size_t i = 0; i < codes.size(); ++i) {
            const py::handle tensor = tensors[i];
            One one;
            one.type = py::type::of(tensor);
            one.dtype = attribute(tensor, names().dtype);
            one.code = parse_dtype(codes[i]);
            one.is_array = py::isinstance<py::array>(tensor);
            each_.push_back(std::move(one));
        }
    }

    // A view of each, or None where one is not as it was.
    py::object views(const py::list& tensors) const {
        const std::optional<std::vector<Span>> spans = all_taken(tensors);
        if (!spans) return py::none();
        py::list found(each_.size());
        for (size_t i = 0; i < each_.size(); ++i)
            found[i] = View{(*spans)[i], py::reinterpret_borrow<py::object>(tensors[i])};
        return found;
    }

    // Where a tensor like the first is written, or None where it is another, is not to be written,
    // or shares a part of a view's memory; all of it may be shared.
    py::object sink(const py::handle& tensor, const std::vector<View>& views) const {
        std::vector<Span> spans;
        for (const View& view : views)
            if (!view.elements) spans.push_back(view.span);
        const std::optional<Span> span = written(tensor, spans);
        if (!span) return py::none();
        auto made = std::make_shared<HeldSink>(
            View{*span, py::reinterpret_borrow<py::object>(tensor)}, false);
        return shared(std::shared_ptr<MemorySink>(made, &made->sink));
    }

    // A program's result for tensors like these, in `out` or in what `make` gives for the first;
    // None where one of them, or `out`, is not as it was. Where `keeps_equal` is given, tensors
    // that are all equal give the first, if it says so.
    py::object run(const Program& program, Pool& pool, const py::list& tensors, py::object out,
                   const py::object& make, const py::object& keeps_equal) const {
        const std::optional<std::vector<Span>> spans = all_taken(tensors);
        if (!spans) return py::none();
        const bool given = !out.is_none();
        if (!given) out = make(tensors[0]);
        const std::optional<Span> to = written(out, given ? *spans : std::vector<Span>());
        if (!to) return py::none();
        MemorySink sink(const_cast<void*>(to->data), to->count, to->dtype, false, pool.threads());
        if (!keeps_equal.is_none() && all_equal(pool, *spans) && keeps_equal().cast<bool>()) {
            const Unlocked unlocked(count_);
            combine(pool, {spans->front()}, {1.0}, sink, nullptr, {});
        } else {
            program.run(pool, *spans, sink);
        }
        return out;
    }

   private:
    struct One {
        py::object type, dtype;
        DType code;
        bool is_array;
    };

    std::optional<std::vector<Span>> all_taken(const py::list& tensors) const {
        if (tensors.size() != each_.size()) return {};
        std::vector<Span> found;
        found.reserve(each_.size());
        for (size_t i = 0; i < each_.size(); ++i) {
            const std::optional<Span> span = taken(tensors[i], each_[i], false);
            if (!span) return {};
            found.push_back(*span);
        }
        return found;
    }

    std::optional<Span> written(py::handle tensor, const std::vector<Span>& inputs) const {
        const std::optional<Span> span = taken(tensor, each_[0], true);
        if (!span) return {};
        const auto end = [](const Span& s) { return s.at(s.count); };
        for (const Span& input : inputs) {
            const bool same = span->at(0) == input.at(0) && end(*span) == end(input);
            if (!same && span->at(0) < end(input) && input.at(0) < end(*span)) return {};
        }
        return span;
    }

    static bool all_equal(Pool& pool, const std::vector<Span>& spans) {
        if (spans.size() < 2) return false;
        const Unlocked unlocked(spans[0].count);
        for (size_t i = 1; i < spans.size(); ++i)
            if (!equal(pool, spans[0], spans[i])) return false;
        return true;
    }

    std::optional<Span> taken(py::handle tensor, const One& one, bool written) const {
        if (py::type::handle_of(tensor).ptr() != one.type.ptr()) return {};
        const void* data = nullptr;
        if (one.is_array) {
            const auto array = py::reinterpret_borrow<py::array>(tensor);
            if (array.dtype().ptr() != one.dtype.ptr() || !(array.flags() & py::array::c_style) ||
                (written && !array.writeable()) ||
                array.ndim() != static_cast<py::ssize_t>(lengths_.size()) ||
                !std::equal(lengths_.begin(), lengths_.end(), array.shape()))
                return {};
            data = array.data();
        } else {
            try {
                data = memory(tensor, one);
            } catch (py::error_already_set& error) {  // inside vmap, grad and functionalize
                if (!error.matches(PyExc_Exception)) throw;
            }
        }
        if (!data) return {};
        return Span{data, count_, one.code};
    }

    // Of a torch tensor: what models/memory.py's check_torch and view_of ask for. A sparse or
    // packed one has no storage, a nested one no shape: torch raises.
    const void* memory(py::handle tensor, const One& one) const {
        const Names& n = names();
        if (!attribute(tensor, n.dtype).is(one.dtype) ||
            !attribute(tensor, n.is_cpu).is(py::handle(Py_True)) ||
            !asked(tensor, n.is_neg).is(py::handle(Py_False)) ||
            !asked(tensor, n.is_contiguous).is(py::handle(Py_True)))
            return nullptr;
        const int same =
            PyObject_RichCompareBool(attribute(tensor, n.shape).ptr(), shape_.ptr(), Py_EQ);
        if (same < 0) throw py::error_already_set();
        const uint64_t held = number(asked(tensor, n.untyped_storage), n.nbytes);
        const uint64_t end = number(tensor, n.storage_offset) + static_cast<uint64_t>(count_);
        if (!same || held < end * item_bytes(one.code)) return nullptr;
        return reinterpret_cast<const void*>(number(tensor, n.data_ptr));
    }

    std::vector<One> each_;
    py::object shape_;
    std::vector<int64_t> lengths_;
    int64_t count_ = 1;
};

// How many CPUs this process may use; 0 where FASTMERGE_NUM_THREADS or nobody says how many.
int usual_threads() {
    const char* said = std::getenv("FASTMERGE_NUM_THREADS");
    if (said && *said) return 0;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return 0;
}

}  // namespace

void bind_calls(py::module_& m) {
    using namespace pybind11::literals;

    py::class_<Program>(m, "Program");
    def_init(
        py::class_<Sum, Program>(m, "Sum"),
        +[](const std::vector<size_t>& parts, const std::vector<double>& coefficients,
            std::optional<double> divisor, const std::optional<Sum::Rule>& rule,
            std::optional<size_t> reference) {
            return std::make_unique<Sum>(parts, coefficients, divisor, rule, reference);
        },
        "parts"_a, "coefficients"_a = py::tuple(), py::kw_only(), "divisor"_a = py::none(),
        "rule"_a = py::none(), "reference"_a = py::none());
    def_init(
        py::class_<Vote, Program>(m, "Vote"),
        +[](const std::vector<Sparsify>& specs, const std::vector<float>& weights,
            const std::vector<float>& factors, bool elect, bool normalize, float scale,
            int64_t origin, int votes, bool counted) {
            const Agreement agreement = {elect, normalize, scale, origin, votes_of(votes), counted};
            return std::make_unique<Vote>(specs, weights, factors, agreement);
        },
        "specs"_a, "weights"_a, "factors"_a, py::kw_only(), "elect"_a, "normalize"_a, "scale"_a,
        "origin"_a, "votes"_a, "counted"_a);

    def_init(
        py::class_<Alike>(m, "Alike"),
        +[](const py::list& tensors, const std::vector<std::string>& codes) {
            return std::make_unique<Alike>(tensors, codes);
        },
        "tensors"_a, "dtypes"_a)
        .def("views", &Alike::views, "tensors"_a)
        .def("sink", &Alike::sink, "tensor"_a, "views"_a)
        .def("run", &Alike::run, "program"_a, "pool"_a, "tensors"_a, "out"_a, "make"_a,
             "keeps_equal"_a);
    m.def("usual_threads", &usual_threads);
}
