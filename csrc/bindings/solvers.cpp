#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "common/check.h"
#include "solvers/microbatch.h"
#include "solvers/schedule.h"
#include "solvers/table.h"
#include "solvers/tour.h"

namespace nb = nanobind;

namespace {

using namespace llmsys;

using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IntegerMatrix = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename Array>
auto to_vector(const Array& array) {
    return std::vector<std::remove_const_t<typename Array::Scalar>>(array.data(), array.data() + array.size());
}

template <typename Value>
nb::object to_numpy(std::vector<Value> values, std::vector<std::size_t> shape) {
    auto* owned = new std::vector<Value>(std::move(values));
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<Value>*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, Value>(owned->data(), shape.size(), shape.data(), owner));
}

template <typename Value>
nb::object to_numpy(std::vector<Value> values) {
    const std::size_t size = values.size();
    return to_numpy(std::move(values), {size});
}

MicroBatchCost make_cost(std::shared_ptr<CostTable> encoder, std::shared_ptr<CostTable> decoder,
                         std::shared_ptr<CostTable> head, const Matrix& devices) {
    LLMSYS_CHECK(devices.shape(1) == 5,
                 "each device has 5 values (encoder layers, decoder layers, head, micro-batches in flight, available "
                 "memory), got "
                     << devices.shape(1));
    std::vector<DeviceLoad> loads;
    for (std::size_t d = 0; d < devices.shape(0); ++d) {
        const double* row = devices.data() + d * 5;
        loads.push_back({row[0], row[1], row[2] != 0.0, row[3], row[4]});
    }
    return MicroBatchCost({std::move(encoder), std::move(decoder), std::move(head)}, std::move(loads));
}

nb::dict partition_to_python(Partition found) {
    nb::dict result;
    result["feasible"] = found.feasible;
    result["ends"] = to_numpy(std::move(found.ends));
    result["times_ms"] = to_numpy(std::move(found.times_ms));
    result["objective_ms"] = found.objective_ms;
    result["t_max_ms"] = found.t_max_ms;
    result["num_evaluations"] = found.num_evaluations;
    return result;
}

// The best partition, and under "others" those that are best when the longest micro-batch counts more by each of
// extra_factors; every objective is stated for pipeline_factor. Others are not worth it when the best partition itself
// is beyond extra_cutoff_ms.
nb::dict partition_runs(const RunTimes& runs, double pipeline_factor, double num_replicas,
                        const std::vector<double>& extra_factors, double extra_cutoff_ms) {
    std::vector<Partition> found;
    {
        nb::gil_scoped_release release;
        found.push_back(partition_samples(runs, pipeline_factor, num_replicas));
        const bool competitive = found[0].objective_ms <= extra_cutoff_ms;
        for (const double extra : competitive ? extra_factors : std::vector<double>{}) {
            Partition other = partition_samples(runs, pipeline_factor + extra, num_replicas);
            other.objective_ms -= extra * other.t_max_ms;
            found.push_back(std::move(other));
        }
    }
    nb::list others;
    for (std::size_t i = 1; i < found.size(); ++i) others.append(partition_to_python(std::move(found[i])));
    nb::dict result = partition_to_python(std::move(found[0]));
    result["num_runs"] = runs.num_runs();
    result["others"] = others;
    return result;
}

nb::dict partition(std::shared_ptr<CostTable> encoder, std::shared_ptr<CostTable> decoder,
                   std::shared_ptr<CostTable> head, const Matrix& devices, const Integers& encoder_len,
                   const Integers& decoder_len, double pipeline_factor, double num_replicas, std::int64_t max_size,
                   const std::vector<double>& extra_factors, double extra_cutoff_ms) {
    MicroBatchCost cost = make_cost(std::move(encoder), std::move(decoder), std::move(head), devices);
    const auto encoders = to_vector(encoder_len), decoders = to_vector(decoder_len);
    std::optional<RunTimes> runs;
    {
        nb::gil_scoped_release release;
        runs.emplace(cost, encoders, decoders, max_size);
    }
    return partition_runs(*runs, pipeline_factor, num_replicas, extra_factors, extra_cutoff_ms);
}

nb::dict partition_given(const Integers& offset, const Doubles& times_ms, double pipeline_factor, double num_replicas,
                         const std::vector<double>& extra_factors, double extra_cutoff_ms) {
    const auto begins = to_vector(offset);
    const RunTimes runs(std::vector<std::size_t>(begins.begin(), begins.end()), to_vector(times_ms));
    return partition_runs(runs, pipeline_factor, num_replicas, extra_factors, extra_cutoff_ms);
}

nb::object run_times(std::shared_ptr<CostTable> encoder, std::shared_ptr<CostTable> decoder,
                     std::shared_ptr<CostTable> head, const Matrix& devices, const Integers& encoder_len,
                     const Integers& decoder_len, const Integers& counts) {
    LLMSYS_CHECK(encoder_len.size() == counts.size() && decoder_len.size() == counts.size(),
                 "lengths and counts must have one entry a micro-batch");
    MicroBatchCost cost = make_cost(std::move(encoder), std::move(decoder), std::move(head), devices);
    std::vector<double> times;
    for (std::size_t i = 0; i < counts.size(); ++i) {
        const std::int64_t count = counts.data()[i];
        if (!cost.append(encoder_len.data()[i], decoder_len.data()[i], count, count, times)) times.push_back(kInfinity);
    }
    return to_numpy(std::move(times));
}

// Owns nothing: the arrays must outlive it, which they do for the length of one call.
PipelineCosts view_costs(const std::vector<Matrix>& columns, std::int64_t num_devices) {
    LLMSYS_CHECK(columns.size() == 7, "a pipeline has 7 cost columns, got " << columns.size());
    for (const Matrix& column : columns) {
        LLMSYS_CHECK(column.shape(0) == columns[0].shape(0) && column.shape(1) == columns[0].shape(1),
                     "all cost columns must have the shape (micro-batches, stages)");
    }
    PipelineCosts costs;
    costs.num_micro_batches = static_cast<std::int64_t>(columns[0].shape(0));
    costs.num_stages = static_cast<std::int64_t>(columns[0].shape(1));
    costs.num_devices = num_devices;
    costs.forward_ms = columns[0].data();
    costs.backward_ms = columns[1].data();
    costs.stored_mb = columns[2].data();
    costs.forward_peak_mb = columns[3].data();
    costs.backward_extra_mb = columns[4].data();
    costs.send_forward_ms = columns[5].data();
    costs.send_backward_ms = columns[6].data();
    costs.check();
    return costs;
}

nb::list orders_to_python(const DeviceOrders& orders) {
    nb::list result;
    for (const auto& order : orders) {
        std::vector<std::int32_t> flat;
        flat.reserve(order.size() * 3);
        for (const Op& op : order) {
            flat.push_back(op.micro_batch);
            flat.push_back(op.stage);
            flat.push_back(op.backward ? 1 : 0);
        }
        result.append(to_numpy(std::move(flat), {order.size(), 3}));
    }
    return result;
}

nb::dict search(const std::vector<Matrix>& columns, std::int64_t num_devices, const std::vector<std::string>& kinds,
                const IntegerMatrix& permutations, const Doubles& memory_limit_mb, std::int64_t max_in_flight,
                std::int64_t max_moves, std::uint64_t seed) {
    const PipelineCosts costs = view_costs(columns, num_devices);
    std::vector<ScheduleKind> chosen;
    for (const std::string& kind : kinds) {
        LLMSYS_CHECK(kind == "1f1b" || kind == "adaptive", "a schedule kind is 1f1b or adaptive, got " << kind);
        chosen.push_back(kind == "1f1b" ? ScheduleKind::one_f_one_b : ScheduleKind::adaptive);
    }
    std::vector<std::vector<std::int32_t>> starts;
    for (std::size_t i = 0; i < permutations.shape(0); ++i) {
        const std::int64_t* row = permutations.data() + i * permutations.shape(1);
        starts.emplace_back(row, row + permutations.shape(1));
    }
    const auto limits = to_vector(memory_limit_mb);
    SearchResult found;
    {
        nb::gil_scoped_release release;
        found = search_schedule(costs, chosen, starts, limits, max_in_flight, max_moves, seed);
    }
    nb::dict result;
    result["feasible"] = found.feasible;
    result["kind"] = found.kind == ScheduleKind::one_f_one_b ? "1f1b" : "adaptive";
    result["permutation"] = to_numpy(std::move(found.permutation));
    result["orders"] = orders_to_python(found.orders);
    result["makespan_ms"] = found.outcome.makespan_ms;
    result["peak_mb"] = to_numpy(std::move(found.outcome.peak_mb));
    result["overflow_mb"] = found.overflow_mb;
    result["num_evaluations"] = found.num_evaluations;
    return result;
}

nb::dict replay(
    const std::vector<Matrix>& columns, std::int64_t num_devices,
    const std::vector<nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>>& orders) {
    const PipelineCosts costs = view_costs(columns, num_devices);
    LLMSYS_CHECK(orders.size() == static_cast<std::size_t>(num_devices),
                 "expected one order for each of " << num_devices << " devices, got " << orders.size());
    DeviceOrders device_orders;
    for (std::size_t d = 0; d < orders.size(); ++d) {
        auto& order = device_orders.emplace_back();
        LLMSYS_CHECK(orders[d].shape(1) == 3, "an order has rows (micro-batch, stage, backward)");
        for (std::size_t i = 0; i < orders[d].shape(0); ++i) {
            const std::int32_t* row = orders[d].data() + i * 3;
            LLMSYS_CHECK(row[0] >= 0 && row[0] < costs.num_micro_batches && row[1] >= 0 && row[1] < costs.num_stages,
                         "device " << d << " lists micro-batch " << row[0] << " on stage " << row[1] << ", out of "
                                   << costs.num_micro_batches << " micro-batches and " << costs.num_stages
                                   << " stages");
            LLMSYS_CHECK(costs.device(row[1]) == static_cast<std::int64_t>(d),
                         "stage " << row[1] << " is listed on device " << d << " but belongs to device "
                                  << costs.device(row[1]));
            order.push_back({row[0], row[1], row[2] != 0});
        }
    }
    std::vector<std::int32_t> identity(static_cast<std::size_t>(costs.num_micro_batches));
    for (std::size_t i = 0; i < identity.size(); ++i) identity[i] = static_cast<std::int32_t>(i);
    Replay engine(costs);
    Outcome outcome = engine.run(device_orders, identity.data());
    nb::dict result;
    const std::vector<std::size_t> shape{static_cast<std::size_t>(costs.num_micro_batches),
                                         static_cast<std::size_t>(costs.num_stages), 2};
    result["complete"] = outcome.complete;
    result["makespan_ms"] = outcome.makespan_ms;
    result["peak_mb"] = to_numpy(std::move(outcome.peak_mb));
    result["start_ms"] = to_numpy(engine.start_ms(), shape);
    result["send_start_ms"] = to_numpy(engine.send_start_ms(), shape);
    return result;
}

}  // namespace

void bind_solvers(nb::module_& m) {
    nb::class_<CostTable>(m, "CostTable", "Costs of one layer on a grid of (lengths, micro-batch size).")
        .def(
            "__init__",
            [](CostTable* self, const std::vector<Doubles>& axes, const std::vector<Doubles>& columns) {
                std::vector<std::vector<double>> axis_values, column_values;
                for (const auto& axis : axes) axis_values.push_back(to_vector(axis));
                for (const auto& column : columns) column_values.push_back(to_vector(column));
                new (self) CostTable(std::move(axis_values), std::move(column_values));
            },
            nb::arg("axes"), nb::arg("columns"));
    m.def("partition_samples", &partition, nb::arg("encoder").none(), nb::arg("decoder"), nb::arg("head"),
          nb::arg("devices"), nb::arg("encoder_len"), nb::arg("decoder_len"), nb::arg("pipeline_factor"),
          nb::arg("num_replicas"), nb::arg("max_size"), nb::arg("extra_factors") = std::vector<double>{},
          nb::arg("extra_cutoff_ms") = kInfinity,
          "Splits an ordered sequence of samples into micro-batches; exact for DynaPipe's objective.");
    m.def("partition_runs", &partition_given, nb::arg("offset"), nb::arg("times_ms"), nb::arg("pipeline_factor"),
          nb::arg("num_replicas"), nb::arg("extra_factors") = std::vector<double>{},
          nb::arg("extra_cutoff_ms") = kInfinity,
          "The same from given times: row i of the runs, from offset[i], holds those that begin at sample i.");
    m.def("micro_batch_times", &run_times, nb::arg("encoder").none(), nb::arg("decoder"), nb::arg("head"),
          nb::arg("devices"), nb::arg("encoder_len"), nb::arg("decoder_len"), nb::arg("counts"),
          "Times of micro-batches on their slowest device, infinite where they do not fit.");
    m.def("search_schedule", &search, nb::arg("columns"), nb::arg("num_devices"), nb::arg("kinds"),
          nb::arg("permutations"), nb::arg("memory_limit_mb"), nb::arg("max_in_flight"), nb::arg("max_moves"),
          nb::arg("seed"), "Best schedule kind and micro-batch order found for one replica.");
    m.def("replay", &replay, nb::arg("columns"), nb::arg("num_devices"), nb::arg("orders"),
          "Runs device orders with real durations.");
    m.def(
        "open_path",
        [](const Integers& x, const Integers& y, std::int64_t max_kicks, std::uint64_t seed) {
            const auto xs = to_vector(x), ys = to_vector(y);
            std::vector<std::int32_t> path;
            {
                nb::gil_scoped_release release;
                path = open_path(xs, ys, max_kicks, seed);
            }
            return to_numpy(std::move(path));
        },
        nb::arg("x"), nb::arg("y"), nb::arg("max_kicks"), nb::arg("seed"), "A short open L1 path through points.");
}
