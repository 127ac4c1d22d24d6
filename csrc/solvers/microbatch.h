#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "solvers/table.h"

namespace llmsys {

// What one device computes for a micro-batch, summed over its model chunks, and what it has room for.
struct DeviceLoad {
    double num_encoder_layers = 0;
    double num_decoder_layers = 0;
    bool head = false;
    double stored_limit_mb = 0;  // activations that stay until the backward pass
    double peak_limit_mb = 0;    // the same plus what one layer needs while it runs
};

struct LayerTables {
    std::shared_ptr<const CostTable> encoder;  // null: decoder-only
    std::shared_ptr<const CostTable> decoder;  // lengths (encoder, decoder), or (decoder) when decoder-only
    std::shared_ptr<const CostTable> head;     // lengths (decoder)
};

// Time of a micro-batch on its slowest device, or infinity when some device has no room for it.
struct Cell {
    double time_ms = kInfinity;
    bool stop = false;  // no micro-batch that contains this one can fit
};

// Costs of any micro-batch (count, padded lengths); cuts of the tables are kept per pair of lengths.
class MicroBatchCost {
  public:
    MicroBatchCost(LayerTables tables, std::vector<DeviceLoad> devices);

    Cell operator()(std::int64_t encoder_len, std::int64_t decoder_len, std::int64_t count);

  private:
    struct Cut {
        CostLine encoder, decoder, head;
    };
    // Brackets of small counts on one table's micro-batch axis, found once.
    using Brackets = std::vector<Bracket>;
    const Cut& cut(std::int64_t encoder_len, std::int64_t decoder_len);

    LayerTables tables_;
    std::vector<DeviceLoad> devices_;
    Brackets encoder_brackets_, decoder_brackets_, head_brackets_;
    std::vector<std::pair<std::uint64_t, std::unique_ptr<Cut>>> cuts_;  // open addressing, see cut()
    std::size_t num_cuts_ = 0;
    std::uint64_t last_key_ = ~std::uint64_t{0};
    const Cut* last_cut_ = nullptr;
};

// All feasible runs of consecutive samples with their times, row i: micro-batches that begin at sample i.
class RunTimes {
  public:
    RunTimes(MicroBatchCost& cost, const std::vector<std::int64_t>& encoder_len,
             const std::vector<std::int64_t>& decoder_len, std::int64_t max_size);

    // Row i is time_ms[offset[i]] to time_ms[offset[i + 1]].
    RunTimes(std::vector<std::size_t> offset, std::vector<double> time_ms);

    std::size_t num_samples() const { return offset_.size() - 1; }
    std::size_t width(std::size_t begin) const { return offset_[begin + 1] - offset_[begin]; }
    const double* row(std::size_t begin) const { return time_ms_.data() + offset_[begin]; }
    double at(std::size_t begin, std::size_t end) const {
        return end - begin <= width(begin) ? row(begin)[end - begin - 1] : kInfinity;
    }
    std::size_t max_width() const { return max_width_; }
    std::size_t num_runs() const { return time_ms_.size(); }

  private:
    std::vector<std::size_t> offset_;
    std::vector<double> time_ms_;
    std::size_t max_width_ = 0;
};

struct Partition {
    bool feasible = false;
    std::vector<std::int64_t> ends;  // one past the last sample of each micro-batch
    std::vector<double> times_ms;
    double objective_ms = kInfinity;
    double t_max_ms = 0.0;
    std::int64_t num_evaluations = 0;
};

// min over partitions of  pipeline_factor * max_m t_m + sum_m t_m / num_replicas  (DynaPipe's objective),
// exact over every possible maximum.
Partition partition_samples(const RunTimes& runs, double pipeline_factor, double num_replicas);

}  // namespace llmsys
