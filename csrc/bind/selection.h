// fastmerge.selection's objects as C++'s and back. The fields of each are listed here, by name, and
// nowhere else in C++, but for a selection's mask: its last, which Python sets.
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "primitives/selection.h"

namespace fastmerge {

inline const char* python_name(const Sparsify&) { return "Sparsify"; }
inline const char* python_name(const Selection&) { return "Selection"; }

template <class Field>
void each_field(Sparsify& spec, const Field& field) {
    field("kind", spec.kind);
    field("keep", spec.keep);
    field("skip", spec.skip);
    field("keep_below_top", spec.keep_below_top);
    field("length", spec.length);
    field("stride", spec.stride);
    field("tie_rule", spec.tie_rule);
    field("keep_below", spec.keep_below);
    field("key", spec.key);
    field("rescale", spec.rescale);
}

template <class Field>
void each_field(Selection& selection, const Field& field) {
    field("kind", selection.kind);
    field("threshold_bits", selection.threshold_bits);
    field("tie_bound", selection.tie_bound);
    field("ceiling_bits", selection.ceiling_bits);
    field("ceiling_bound", selection.ceiling_bound);
    field("tie_rule", selection.tie_rule);
    field("keep_below", selection.keep_below);
    field("key", selection.key);
    field("rescale", selection.rescale);
    field("kept", selection.kept);
}

}  // namespace fastmerge

namespace pybind11::detail {

// The Python class and the place of each field in it, looked up by name at the first use.
struct Layout {
    object type;
    std::vector<size_t> places;
};

template <class Record>
const Layout& layout_of(Record& record) {
    PYBIND11_CONSTINIT static gil_safe_call_once_and_store<Layout> stored;
    const auto look_up = [&] {
        Layout layout = {module_::import("fastmerge.selection").attr(python_name(record)), {}};
        const object names = layout.type.attr("_fields");
        each_field(record, [&](const char* name, auto&) {
            layout.places.push_back(names.attr("index")(name).template cast<size_t>());
        });
        return layout;
    };
    return stored.call_once_and_store_result(look_up).get_stored();
}

template <class Record>
struct record_caster {
    PYBIND11_TYPE_CASTER(Record, const_name("object"));

    template <class Field>  // an enum is an int in Python
    using Number = conditional_t<std::is_enum<Field>::value, int, Field>;

    bool load(handle source, bool) {
        const Layout& layout = layout_of(value);
        if (!isinstance(source, layout.type))
            throw std::invalid_argument(std::string("not a ") + python_name(value));
        auto place = layout.places.begin();
        each_field(value, [&](const char* name, auto& field) {
            using Field = std::decay_t<decltype(field)>;
            make_caster<Number<Field>> number;
            bool good = number.load(PyTuple_GET_ITEM(source.ptr(), *place++), true);
            if (good) field = static_cast<Field>(cast_op<Number<Field>>(number));
            if constexpr (std::is_enum<Field>::value)
                good = good && field >= Field{} && field <= Field::kLast;
            if (!good) throw std::invalid_argument(std::string(name) + " is out of range");
        });
        return true;
    }

    static handle cast(Record source, return_value_policy, handle) {
        const Layout& layout = layout_of(source);
        tuple fields(layout.places.size());
        auto place = layout.places.begin();
        each_field(source, [&](const char*, const auto& field) {
            fields[*place++] = static_cast<Number<std::decay_t<decltype(field)>>>(field);
        });
        return layout.type(*fields).release();
    }
};

template <>
struct type_caster<fastmerge::Sparsify> : record_caster<fastmerge::Sparsify> {};
template <>
struct type_caster<fastmerge::Selection> : record_caster<fastmerge::Selection> {};

}  // namespace pybind11::detail
