#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace llmsys {

// Costs of one replica's micro-batches on every pipeline stage; arrays are row-major (micro-batch, stage).
// Stage v runs on device v % num_devices, so more stages than devices means several model chunks a device.
struct PipelineCosts {
    std::int64_t num_micro_batches = 0;
    std::int64_t num_stages = 0;
    std::int64_t num_devices = 0;
    const double* forward_ms = nullptr;
    const double* backward_ms = nullptr;
    const double* stored_mb = nullptr;          // kept from the end of the forward to the end of the backward pass
    const double* forward_peak_mb = nullptr;    // needed while the forward pass runs, stored_mb included
    const double* backward_extra_mb = nullptr;  // needed while the backward pass runs, beyond stored_mb
    const double* send_forward_ms = nullptr;    // stage v to v + 1
    const double* send_backward_ms = nullptr;   // stage v to v - 1

    std::int64_t device(std::int64_t stage) const { return stage % num_devices; }
    void check() const;
};

// One forward or backward pass. Until a schedule is final, micro_batch is a position in a permutation.
struct Op {
    std::int32_t micro_batch;
    std::int32_t stage;
    bool backward;
};
using DeviceOrders = std::vector<std::vector<Op>>;

enum class ScheduleKind { one_f_one_b, adaptive };

// 1F1B; with several chunks a device, interleaved 1F1B, whose last group of micro-batches may be incomplete.
DeviceOrders one_f_one_b_order(std::int64_t num_micro_batches, std::int64_t num_stages, std::int64_t num_devices);

struct Outcome {
    bool complete = false;  // false: the orders wait for each other
    double makespan_ms = 0.0;
    std::vector<double> peak_mb;  // one entry a device
};

// Runs device orders with real durations: a pass starts when its device is free and its input has arrived; each
// device sends its results one after the other while it computes.
class Replay {
  public:
    explicit Replay(const PipelineCosts& costs);

    // Gives up, with an incomplete outcome, once the makespan is sure to pass give_up_ms.
    Outcome run(const DeviceOrders& orders, const std::int32_t* permutation, double give_up_ms = kNever);

    static constexpr double kNever = std::numeric_limits<double>::infinity();

    // Of the last run, indexed [(micro-batch * num_stages + stage) * 2 + backward], original micro-batch numbers.
    const std::vector<double>& start_ms() const { return start_ms_; }
    const std::vector<double>& send_start_ms() const { return send_start_ms_; }

  private:
    PipelineCosts costs_;
    std::vector<double> arrival_ms_, start_ms_, send_start_ms_, compute_free_ms_, send_free_ms_, memory_mb_;
    std::vector<double> work_ms_, least_end_ms_;  // of each device: all its passes; that plus its waits so far
    std::vector<std::size_t> next_;
    std::vector<std::int64_t> runnable_;
};

struct SearchResult {
    bool feasible = false;
    ScheduleKind kind = ScheduleKind::one_f_one_b;
    std::vector<std::int32_t> permutation;
    DeviceOrders orders;  // micro-batches by original number
    Outcome outcome;
    double overflow_mb = 0.0;  // by how much the best infeasible schedule passes its limit
    std::int64_t num_evaluations = 0;
};

// Tries every kind on every starting permutation, then improves the best by seeded swaps and moves of micro-batches,
// max_moves tries long. The same arguments give the same schedule.
SearchResult search_schedule(const PipelineCosts& costs, const std::vector<ScheduleKind>& kinds,
                             const std::vector<std::vector<std::int32_t>>& permutations,
                             const std::vector<double>& memory_limit_mb, std::int64_t max_in_flight,
                             std::int64_t max_moves, std::uint64_t seed);

}  // namespace llmsys
