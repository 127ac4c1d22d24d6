#pragma once

#include <cstdint>
#include <vector>

#include "solvers/schedule.h"

namespace llmsys {

// DynaPipe's cyclic schedule. In each cycle a device runs at most one forward and one backward pass per stage; a
// micro-batch new to a device waits while it would pass memory_limit_mb (one entry a device) or max_in_flight. The
// costs and limits must outlive the object.
class AdaptiveScheduler {
  public:
    AdaptiveScheduler(const PipelineCosts& costs, const std::vector<double>& memory_limit_mb,
                      std::int64_t max_in_flight);

    // Pass orders for micro-batches in the order of `permutation`, by position; valid until the next call. Null when
    // the cycles stop before all work is done.
    const DeviceOrders* schedule(const std::int32_t* permutation);

  private:
    // Micro-batches reach and leave every stage in order, so a count stands for each queue.
    struct Queue {
        std::int64_t arrived = 0, done = 0, arriving = 0;
    };
    struct Device {
        double memory_mb = 0.0;
        std::int64_t newest_forward = 0, newest_backward = 0;
    };
    struct Head {
        std::int64_t position, stage;
        bool operator<(const Head& other) const {
            return position != other.position ? position < other.position : stage < other.stage;
        }
    };

    void reset(const std::int32_t* permutation);
    bool run_cycle(std::int64_t device);
    void run_backward(std::int64_t device, std::int64_t stage);
    bool run_forward(std::int64_t device, std::int64_t stage);
    bool has_room(std::int64_t device, std::int64_t position, std::int64_t stage) const;
    double at(const double* column, std::int64_t position, std::int64_t stage) const {
        return column[permutation_[position] * costs_.num_stages + stage];
    }
    void add(std::int64_t device, std::int64_t position, std::int64_t stage, bool backward) {
        orders_[static_cast<std::size_t>(device)].push_back(
            {static_cast<std::int32_t>(position), static_cast<std::int32_t>(stage), backward});
    }

    const PipelineCosts& costs_;
    const std::vector<double>& memory_limit_mb_;
    std::int64_t max_in_flight_;
    const std::int32_t* permutation_ = nullptr;
    std::vector<Queue> forward_, backward_;
    std::vector<Device> devices_;
    std::vector<Head> forward_heads_, backward_heads_;
    DeviceOrders orders_;
};

}  // namespace llmsys
