#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "solvers/table.h"

namespace llmsys {

// What one device computes for a micro-batch, summed over its model chunks, and what it has room for.
struct DeviceLoad {
    double num_encoder_layers = 0;
    double num_decoder_layers = 0;
    bool head = false;
    double in_flight = 1;     // equal micro-batches that must fit at once
    double available_mb = 0;  // memory for activations
};

struct LayerTables {
    std::shared_ptr<const CostTable> encoder;  // null: decoder-only
    std::shared_ptr<const CostTable> decoder;  // lengths (encoder, decoder), or (decoder) when decoder-only
    std::shared_ptr<const CostTable> head;     // lengths (decoder)
};

// Costs of any micro-batch (count, padded lengths): its time on the slowest device, infinite where some device has no
// room for it. The tables are cut once per pair of lengths; what remains is piecewise linear in the count.
class MicroBatchCost {
  public:
    MicroBatchCost(LayerTables tables, std::vector<DeviceLoad> devices);

    // Appends the times of counts first..last. Returns false, with fewer times appended, at the first count that proves
    // that no micro-batch which contains this one fits.
    bool append(std::int64_t encoder_len, std::int64_t decoder_len, std::int64_t first, std::int64_t last,
                std::vector<double>& time_ms);

  private:
    // One device's costs at the points of counts_, straight lines in between.
    struct DeviceLine {
        std::vector<double> time;
        // Needed by in_flight micro-batches: all stored, or the last of them in its highest encoder or decoder layer.
        std::vector<double> all_stored, encoder_peak, decoder_peak;
        std::vector<double> stored_floor;  // of all of them, see CostTable
    };
    struct Cut {
        CostLine encoder, decoder, head;
        // Made when many counts are asked for. Below a table's smallest length or count, costs are extrapolated and cut
        // off at 0; where that happens they are no straight lines, and each count is worked out from the layers.
        std::vector<DeviceLine> devices;
        bool straight = false;
    };
    struct Layer {
        double time = 0, stored = 0, peak = 0, floor = 0;
        bool straight = true;
    };

    Cut& cut(std::int64_t encoder_len, std::int64_t decoder_len);
    void add_device_lines(Cut& cut) const;
    static Layer layer_at(const CostTable& table, const CostLine& line, double count);
    // One point of a device's line: time, all stored, encoder peak, decoder peak, floor.
    static std::array<double, 5> device_at(const DeviceLoad& device, const Layer& encoder, const Layer& decoder,
                                           const Layer& head);
    // The time on the slowest device, given each device's point; sets stop when nothing larger can fit.
    template <typename Point>
    double slowest(const Point& point, bool& stop) const;

    LayerTables tables_;
    std::vector<DeviceLoad> devices_;
    std::vector<double> counts_;  // the micro-batch sizes of all tables together
    std::unordered_map<std::uint64_t, Cut> cuts_;
    std::uint64_t last_key_ = ~std::uint64_t{0};
    Cut* last_cut_ = nullptr;
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
    void find_max_width();

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
