#include "solvers/partition.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "common/check.h"

namespace nb = nanobind;

namespace {

using namespace llmsys;

using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename Array>
auto to_vector(const Array& array) {
    return std::vector<std::remove_const_t<typename Array::Scalar>>(array.data(), array.data() + array.size());
}

template <typename Value>
nb::object to_numpy(std::vector<Value> values) {
    auto* owned = new std::vector<Value>(std::move(values));
    const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<Value>*>(p); });
    const std::size_t size = owned->size();
    return nb::cast(nb::ndarray<nb::numpy, Value>(owned->data(), 1, &size, owner));
}

Lists to_lists(const std::pair<Integers, Integers>& arrays) {
    return {to_vector(arrays.first), to_vector(arrays.second)};
}

void check_shape(const Matrix& times, const char* name, std::size_t rows, std::size_t columns) {
    LLMSYS_CHECK(times.shape(0) == rows && times.shape(1) == columns, name << " must have shape (" << rows << ", "
                                                                           << columns << "), got (" << times.shape(0)
                                                                           << ", " << times.shape(1) << ")");
}

nb::object pipeline_times(const Integers& roles, const Integers& lanes, const std::pair<Integers, Integers>& waits,
                          const std::pair<Integers, Integers>& slices, const Integers& joins,
                          const std::pair<Integers, Integers>& uses, const Integers& num_parts, const Matrix& ops_ms,
                          const Matrix& starts_ms, const Matrix& waits_ms, const Matrix& slices_ms,
                          const Matrix& joins_ms) {
    RangePipeline pipeline;
    for (const std::int64_t role : to_vector(roles)) pipeline.roles.push_back(static_cast<Role>(role));
    pipeline.lanes = to_vector(lanes);
    pipeline.waits = to_lists(waits);
    pipeline.slices = to_lists(slices);
    pipeline.joins = to_vector(joins);
    pipeline.uses = to_lists(uses);
    pipeline.check();
    const std::size_t rows = num_parts.size(), num_ops = pipeline.roles.size();
    check_shape(ops_ms, "ops_ms", rows, num_ops);
    check_shape(starts_ms, "starts_ms", rows, num_ops);
    check_shape(waits_ms, "waits_ms", rows, num_ops);
    check_shape(joins_ms, "joins_ms", rows, pipeline.joins.size());
    const std::size_t num_slices = slices_ms.shape(1);
    check_shape(slices_ms, "slices_ms", rows, num_slices);
    for (const std::int64_t slice : pipeline.slices.values)
        LLMSYS_CHECK(slice < static_cast<std::int64_t>(num_slices), "slice " << slice << " of " << num_slices);
    const std::vector<std::int64_t> counts = to_vector(num_parts);
    std::vector<double> times(rows);
    {
        const nb::gil_scoped_release release;
        for (std::size_t row = 0; row < rows; ++row)
            times[row] =
                pipeline_time(pipeline, {counts[row], ops_ms.data() + row * num_ops, starts_ms.data() + row * num_ops,
                                         waits_ms.data() + row * num_ops, slices_ms.data() + row * num_slices,
                                         joins_ms.data() + row * pipeline.joins.size()});
    }
    return to_numpy(std::move(times));
}

nb::tuple cover_ranges(std::int64_t num_groups, const Integers& firsts, const Integers& ends, const Doubles& costs_ms) {
    const auto first = to_vector(firsts), end = to_vector(ends);
    const auto cost = to_vector(costs_ms);
    Cover found;
    {
        const nb::gil_scoped_release release;
        found = cover(num_groups, first, end, cost);
    }
    return nb::make_tuple(found.total_ms, to_numpy(std::move(found.candidates)));
}

}  // namespace

void bind_partition(nb::module_& m) {
    m.def("pipeline_times", &pipeline_times, nb::arg("roles"), nb::arg("lanes"), nb::arg("waits"), nb::arg("slices"),
          nb::arg("joins"), nb::arg("uses"), nb::arg("num_parts"), nb::arg("ops_ms"), nb::arg("starts_ms"),
          nb::arg("waits_ms"), nb::arg("slices_ms"), nb::arg("joins_ms"),
          "Times of a range in each of num_parts parts, as llmsys.lancet.pipeline.walk gives them.");
    m.def("cover_ranges", &cover_ranges, nb::arg("num_groups"), nb::arg("firsts"), nb::arg("ends"), nb::arg("costs_ms"),
          "The cheapest cover of 0 .. num_groups by candidates: total, and which.");
}
