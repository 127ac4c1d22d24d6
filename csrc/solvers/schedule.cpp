#include "solvers/schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"

namespace llmsys {

void PipelineCosts::check() const {
    LLMSYS_CHECK(num_micro_batches > 0, "a schedule needs at least one micro-batch, got " << num_micro_batches);
    LLMSYS_CHECK(num_devices > 0 && num_stages > 0 && num_stages % num_devices == 0,
                 "the number of stages must be a positive multiple of the number of devices, got "
                     << num_stages << " stages and " << num_devices << " devices");
    for (std::int64_t i = 0; i < num_micro_batches * num_stages; ++i) {
        for (const double* column : {forward_ms, backward_ms, stored_mb, forward_peak_mb, backward_extra_mb,
                                     send_forward_ms, send_backward_ms}) {
            LLMSYS_CHECK(std::isfinite(column[i]) && column[i] >= 0.0,
                         "costs must be finite and not negative, got "
                             << column[i] << " for micro-batch " << i / num_stages << " on stage " << i % num_stages);
        }
    }
}

namespace {

// The order of the k-th virtual micro-batch: groups of num_devices micro-batches pass all chunks before the next.
std::vector<Op> interleaved_passes(std::int64_t num_micro_batches, std::int64_t num_chunks, std::int64_t num_devices,
                                   std::int64_t device, bool backward) {
    std::vector<Op> passes;
    passes.reserve(static_cast<std::size_t>(num_micro_batches * num_chunks));
    for (std::int64_t group = 0; group < num_micro_batches; group += num_devices) {
        const std::int64_t group_end = std::min(group + num_devices, num_micro_batches);
        for (std::int64_t step = 0; step < num_chunks; ++step) {
            const std::int64_t chunk = backward ? num_chunks - 1 - step : step;
            for (std::int64_t m = group; m < group_end; ++m) {
                passes.push_back(
                    {static_cast<std::int32_t>(m), static_cast<std::int32_t>(chunk * num_devices + device), backward});
            }
        }
    }
    return passes;
}

DeviceOrders interleave(std::int64_t num_micro_batches, std::int64_t num_stages, std::int64_t num_devices,
                        std::int64_t extra_warm_up) {
    const std::int64_t num_chunks = num_stages / num_devices;
    const std::int64_t num_passes = num_micro_batches * num_chunks;
    DeviceOrders orders(static_cast<std::size_t>(num_devices));
    for (std::int64_t device = 0; device < num_devices; ++device) {
        const auto forward = interleaved_passes(num_micro_batches, num_chunks, num_devices, device, false);
        const auto backward = interleaved_passes(num_micro_batches, num_chunks, num_devices, device, true);
        const std::int64_t behind = num_devices - device - 1;
        const std::int64_t warm_up = num_chunks == 1 ? behind : 2 * behind + (num_chunks - 1) * num_devices;
        std::int64_t next = std::min(warm_up + extra_warm_up, num_passes);
        auto& order = orders[static_cast<std::size_t>(device)];
        order.assign(forward.begin(), forward.begin() + next);
        for (std::int64_t done = 0; done < num_passes; ++done, ++next) {
            if (next < num_passes) order.push_back(forward[static_cast<std::size_t>(next)]);
            order.push_back(backward[static_cast<std::size_t>(done)]);
        }
    }
    return orders;
}

}  // namespace

DeviceOrders one_f_one_b_order(std::int64_t num_micro_batches, std::int64_t num_stages, std::int64_t num_devices) {
    LLMSYS_CHECK(
        num_micro_batches > 0 && num_devices > 0 && num_stages > 0 && num_stages % num_devices == 0,
        "got " << num_micro_batches << " micro-batches, " << num_stages << " stages, " << num_devices << " devices");
    if (num_stages == num_devices) return interleave(num_micro_batches, num_stages, num_devices, 0);
    // An incomplete last group can make the interleaved order wait for itself; warming up longer ends that, since
    // all forwards before all backwards always completes.
    const std::vector<double> ones(static_cast<std::size_t>(num_micro_batches * num_stages), 1.0);
    const double* one = ones.data();
    const PipelineCosts unit{num_micro_batches, num_stages, num_devices, one, one, one, one, one, one, one};
    std::vector<std::int32_t> identity(static_cast<std::size_t>(num_micro_batches));
    for (std::size_t i = 0; i < identity.size(); ++i) identity[i] = static_cast<std::int32_t>(i);
    Replay replay(unit);
    for (std::int64_t extra = 0;; ++extra) {
        DeviceOrders orders = interleave(num_micro_batches, num_stages, num_devices, extra);
        if (replay.run(orders, identity.data()).complete) return orders;
    }
}

Replay::Replay(const PipelineCosts& costs)
    : costs_(costs),
      compute_free_ms_(static_cast<std::size_t>(costs.num_devices)),
      send_free_ms_(static_cast<std::size_t>(costs.num_devices)),
      memory_mb_(static_cast<std::size_t>(costs.num_devices)),
      work_ms_(static_cast<std::size_t>(costs.num_devices)),
      next_(static_cast<std::size_t>(costs.num_devices)) {
    const auto size = static_cast<std::size_t>(costs.num_micro_batches * costs.num_stages * 2);
    arrival_ms_.resize(size);
    start_ms_.resize(size);
    send_start_ms_.resize(size);
    for (std::int64_t cell = 0; cell < costs.num_micro_batches * costs.num_stages; ++cell) {
        const auto d = static_cast<std::size_t>(costs.device(cell % costs.num_stages));
        work_ms_[d] += costs.forward_ms[cell] + costs.backward_ms[cell];
    }
}

Outcome Replay::run(const DeviceOrders& orders, const std::int32_t* permutation, double give_up_ms) {
    constexpr double kNotYet = -1.0;
    const std::int64_t num_stages = costs_.num_stages;
    std::fill(arrival_ms_.begin(), arrival_ms_.end(), kNotYet);
    for (std::int64_t m = 0; m < costs_.num_micro_batches; ++m)
        arrival_ms_[static_cast<std::size_t>(m * num_stages * 2)] = 0.0;
    for (auto* column : {&compute_free_ms_, &send_free_ms_, &memory_mb_})
        std::fill(column->begin(), column->end(), 0.0);
    std::fill(next_.begin(), next_.end(), std::size_t{0});
    least_end_ms_ = work_ms_;
    runnable_.clear();
    for (std::int64_t d = costs_.num_devices; d-- > 0;) runnable_.push_back(d);

    Outcome outcome;
    outcome.peak_mb.assign(static_cast<std::size_t>(costs_.num_devices), 0.0);
    std::size_t num_left = 0;
    for (const auto& order : orders) num_left += order.size();

    while (!runnable_.empty()) {
        const auto d = static_cast<std::size_t>(runnable_.back());
        runnable_.pop_back();
        const auto& order = orders[d];
        for (; next_[d] < order.size(); ++next_[d], --num_left) {
            const Op op = order[next_[d]];
            const std::int64_t cell = permutation[op.micro_batch] * num_stages + op.stage;
            const auto slot = static_cast<std::size_t>(cell * 2 + op.backward);
            if (arrival_ms_[slot] == kNotYet) break;
            const double start = std::max(compute_free_ms_[d], arrival_ms_[slot]);
            const double end = start + (op.backward ? costs_.backward_ms[cell] : costs_.forward_ms[cell]);
            start_ms_[slot] = start;
            least_end_ms_[d] += start - compute_free_ms_[d];
            // A device's work and waits may round to a little more than its real end.
            if (least_end_ms_[d] > give_up_ms * (1 + 1e-9)) return outcome;
            compute_free_ms_[d] = end;
            outcome.makespan_ms = std::max(outcome.makespan_ms, end);
            const double needed = op.backward ? costs_.backward_extra_mb[cell] : costs_.forward_peak_mb[cell];
            outcome.peak_mb[d] = std::max(outcome.peak_mb[d], memory_mb_[d] + needed);
            memory_mb_[d] += op.backward ? -costs_.stored_mb[cell] : costs_.stored_mb[cell];

            const std::int64_t to_stage = op.backward ? op.stage - 1 : op.stage + 1;
            if (to_stage < 0) continue;
            if (to_stage == num_stages) {  // the last stage turns around: its backward pass follows its forward
                arrival_ms_[slot + 1] = end;
                continue;
            }
            const std::size_t to_slot = op.backward ? slot - 2 : slot + 2;
            const std::int64_t to_device = costs_.device(to_stage);
            if (to_device == static_cast<std::int64_t>(d)) {
                arrival_ms_[to_slot] = end;
                continue;
            }
            const double send_start = std::max(send_free_ms_[d], end);
            send_start_ms_[slot] = send_start;
            send_free_ms_[d] =
                send_start + (op.backward ? costs_.send_backward_ms[cell] : costs_.send_forward_ms[cell]);
            arrival_ms_[to_slot] = send_free_ms_[d];
            runnable_.push_back(to_device);
        }
    }
    outcome.complete = num_left == 0;
    return outcome;
}

}  // namespace llmsys
