#include "solvers/adaptive.h"

#include <algorithm>

namespace llmsys {

AdaptiveScheduler::AdaptiveScheduler(const PipelineCosts& costs, const std::vector<double>& memory_limit_mb,
                                     std::int64_t max_in_flight)
    : costs_(costs),
      memory_limit_mb_(memory_limit_mb),
      max_in_flight_(max_in_flight),
      orders_(static_cast<std::size_t>(costs.num_devices)) {
    for (auto& order : orders_)
        order.reserve(static_cast<std::size_t>(2 * costs.num_micro_batches * costs.num_stages / costs.num_devices));
}

const DeviceOrders* AdaptiveScheduler::schedule(const std::int32_t* permutation) {
    reset(permutation);
    for (bool progress = true; progress;) {
        progress = false;
        for (std::int64_t device = 0; device < costs_.num_devices; ++device)
            if (run_cycle(device)) progress = true;
        for (auto* queues : {&forward_, &backward_}) {
            for (Queue& queue : *queues) {
                queue.arrived += queue.arriving;
                queue.arriving = 0;
            }
        }
    }
    return backward_[0].done == costs_.num_micro_batches ? &orders_ : nullptr;
}

void AdaptiveScheduler::reset(const std::int32_t* permutation) {
    permutation_ = permutation;
    forward_.assign(static_cast<std::size_t>(costs_.num_stages), {});
    backward_.assign(static_cast<std::size_t>(costs_.num_stages), {});
    devices_.assign(static_cast<std::size_t>(costs_.num_devices), {});
    for (auto& order : orders_) order.clear();
    forward_[0].arrived = costs_.num_micro_batches;
}

// Backward and forward passes take turns, each kind by micro-batch, then stage.
bool AdaptiveScheduler::run_cycle(std::int64_t device) {
    backward_heads_.clear();
    forward_heads_.clear();
    for (std::int64_t stage = device; stage < costs_.num_stages; stage += costs_.num_devices) {
        const Queue& b = backward_[static_cast<std::size_t>(stage)];
        const Queue& f = forward_[static_cast<std::size_t>(stage)];
        if (b.done < b.arrived) backward_heads_.push_back({b.done, stage});
        if (f.done < f.arrived) forward_heads_.push_back({f.done, stage});
    }
    if (costs_.num_stages > costs_.num_devices) {
        std::sort(backward_heads_.begin(), backward_heads_.end());
        std::sort(forward_heads_.begin(), forward_heads_.end());
    }
    bool progress = false;
    for (std::size_t i = 0; i < std::max(backward_heads_.size(), forward_heads_.size()); ++i) {
        if (i < backward_heads_.size()) {
            run_backward(device, backward_heads_[i].stage);
            progress = true;
        }
        if (i < forward_heads_.size() && run_forward(device, forward_heads_[i].stage)) progress = true;
    }
    return progress;
}

void AdaptiveScheduler::run_backward(std::int64_t device, std::int64_t stage) {
    Device& state = devices_[static_cast<std::size_t>(device)];
    const std::int64_t position = backward_[static_cast<std::size_t>(stage)].done++;
    state.memory_mb -= at(costs_.stored_mb, position, stage);
    state.newest_backward = std::max(state.newest_backward, position + 1);
    if (stage > 0) ++backward_[static_cast<std::size_t>(stage - 1)].arriving;
    add(device, position, stage, true);
}

bool AdaptiveScheduler::run_forward(std::int64_t device, std::int64_t stage) {
    Device& state = devices_[static_cast<std::size_t>(device)];
    Queue& queue = forward_[static_cast<std::size_t>(stage)];
    const std::int64_t position = queue.done;
    if (position >= state.newest_forward) {
        if (state.newest_forward - state.newest_backward >= max_in_flight_ || !has_room(device, position, stage))
            return false;
        state.newest_forward = position + 1;
    }
    state.memory_mb += at(costs_.stored_mb, position, stage);
    ++queue.done;
    if (stage + 1 < costs_.num_stages) {
        ++forward_[static_cast<std::size_t>(stage + 1)].arriving;
    } else {
        ++backward_[static_cast<std::size_t>(stage)].arriving;
    }
    add(device, position, stage, false);
    return true;
}

bool AdaptiveScheduler::has_room(std::int64_t device, std::int64_t position, std::int64_t stage) const {
    const double limit = memory_limit_mb_[static_cast<std::size_t>(device)];
    const double held = devices_[static_cast<std::size_t>(device)].memory_mb;
    if (held + at(costs_.forward_peak_mb, position, stage) > limit) return false;
    // A backward pass cannot be put off later, so what it needs counts when a micro-batch enters.
    double extra = at(costs_.backward_extra_mb, position, stage);
    for (std::int64_t v = device; v < costs_.num_stages; v += costs_.num_devices) {
        const auto s = static_cast<std::size_t>(v);
        for (std::int64_t p = backward_[s].done; p < forward_[s].done; ++p)
            extra = std::max(extra, at(costs_.backward_extra_mb, p, v));
    }
    return held + at(costs_.stored_mb, position, stage) + extra <= limit;
}

}  // namespace llmsys
