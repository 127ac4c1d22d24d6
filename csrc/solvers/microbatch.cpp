#include "solvers/microbatch.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace llmsys {
namespace {

// From so many counts on it pays to sum the layers up once, instead of for each count.
constexpr std::int64_t kManyCounts = 12;

}  // namespace

MicroBatchCost::MicroBatchCost(LayerTables tables, std::vector<DeviceLoad> devices)
    : tables_(std::move(tables)), devices_(std::move(devices)) {
    LLMSYS_CHECK(tables_.decoder && tables_.head, "the decoder and head tables are required");
    LLMSYS_CHECK(tables_.decoder->num_lengths() == (tables_.encoder ? 2u : 1u),
                 "the decoder table has axes (encoder length, decoder length, micro-batch size) in an "
                 "encoder-decoder model and (length, micro-batch size) in a decoder-only one");
    LLMSYS_CHECK(!devices_.empty(), "at least one device is required");
    for (const CostTable* table : {tables_.encoder.get(), tables_.decoder.get(), tables_.head.get()})
        if (table) counts_.insert(counts_.end(), table->batch_axis().begin(), table->batch_axis().end());
    std::sort(counts_.begin(), counts_.end());
    counts_.erase(std::unique(counts_.begin(), counts_.end()), counts_.end());
}

MicroBatchCost::Cut& MicroBatchCost::cut(std::int64_t encoder_len, std::int64_t decoder_len) {
    LLMSYS_CHECK(encoder_len >= 0 && decoder_len >= 0,
                 "lengths must not be negative, got " << encoder_len << " and " << decoder_len);
    const std::uint64_t key = (static_cast<std::uint64_t>(encoder_len) << 32) | static_cast<std::uint64_t>(decoder_len);
    if (last_cut_ && key == last_key_) return *last_cut_;
    const auto [found, is_new] = cuts_.try_emplace(key);
    last_key_ = key;
    last_cut_ = &found->second;
    if (is_new) {
        const double lengths[2] = {static_cast<double>(encoder_len), static_cast<double>(decoder_len)};
        if (tables_.encoder) last_cut_->encoder = tables_.encoder->cut(&lengths[0]);
        last_cut_->decoder = tables_.decoder->cut(tables_.encoder ? &lengths[0] : &lengths[1]);
        last_cut_->head = tables_.head->cut(&lengths[1]);
    }
    return *last_cut_;
}

MicroBatchCost::Layer MicroBatchCost::layer_at(const CostTable& table, const CostLine& line, double count) {
    const auto& axis = table.batch_axis();
    const Bracket b = locate(axis, count);
    if (!b.inside) return {kInfinity, kInfinity, kInfinity, kInfinity, true};
    const std::size_t high = axis.size() > 1 ? b.low + 1 : b.low;
    bool straight = b.weight >= 0.0;
    const auto value = [&](const std::vector<double>& v) {
        const double cost = interpolate(v[b.low], v[high], b.weight);
        if (cost < 0.0) straight = false;
        return std::max(0.0, cost);
    };
    Layer layer{value(line.forward) + value(line.backward), value(line.stored), value(line.peak), 0.0, true};
    if (b.weight >= 0.0) layer.floor = value(line.stored_floor);
    layer.straight = straight;
    return layer;
}

std::array<double, 5> MicroBatchCost::device_at(const DeviceLoad& device, const Layer& encoder, const Layer& decoder,
                                                const Layer& head) {
    // 0 * infinity is not a number: a device without such layers must not read their cost.
    const auto times = [](double number, double value) { return number > 0 ? number * value : 0.0; };
    const double ne = device.num_encoder_layers, nd = device.num_decoder_layers;
    const double encoder_stored = times(ne, encoder.stored);
    const double stored = encoder_stored + times(nd, decoder.stored);
    const double others = times(device.in_flight - 1, stored);
    // The last of equal layers peaks highest: it runs on top of all the others' stored activations.
    return {times(ne, encoder.time) + times(nd, decoder.time) + (device.head ? head.time : 0.0), others + stored,
            ne > 0 ? others + times(ne - 1, encoder.stored) + encoder.peak : 0.0,
            nd > 0 ? others + encoder_stored + times(nd - 1, decoder.stored) + decoder.peak : 0.0,
            device.in_flight * (times(ne, encoder.floor) + times(nd, decoder.floor))};
}

void MicroBatchCost::add_device_lines(Cut& cut) const {
    cut.devices.resize(devices_.size());
    cut.straight = counts_.front() <= 1.0;  // no count is extrapolated
    for (const double count : counts_) {
        const Layer encoder = tables_.encoder ? layer_at(*tables_.encoder, cut.encoder, count) : Layer{};
        const Layer decoder = layer_at(*tables_.decoder, cut.decoder, count);
        const Layer head = layer_at(*tables_.head, cut.head, count);
        cut.straight = cut.straight && encoder.straight && decoder.straight && head.straight;
        for (std::size_t d = 0; d < devices_.size(); ++d) {
            const auto point = device_at(devices_[d], encoder, decoder, head);
            DeviceLine& line = cut.devices[d];
            line.time.push_back(point[0]);
            line.all_stored.push_back(point[1]);
            line.encoder_peak.push_back(point[2]);
            line.decoder_peak.push_back(point[3]);
            line.stored_floor.push_back(point[4]);
        }
    }
}

template <typename Point>
double MicroBatchCost::slowest(const Point& point, bool& stop) const {
    double slowest = 0.0;
    for (std::size_t d = 0; d < devices_.size(); ++d) {
        const auto [time, stored, encoder_peak, decoder_peak, floor] = point(d);
        const double available = devices_[d].available_mb;
        if (floor > available) stop = true;
        if (!(time < kInfinity) || stored > available || encoder_peak > available || decoder_peak > available) {
            slowest = kInfinity;
        } else {
            slowest = std::max(slowest, time);
        }
    }
    return slowest;
}

bool MicroBatchCost::append(std::int64_t encoder_len, std::int64_t decoder_len, std::int64_t first, std::int64_t last,
                            std::vector<double>& time_ms) {
    Cut& lines = cut(encoder_len, decoder_len);
    if (lines.devices.empty() && last - first >= kManyCounts) add_device_lines(lines);
    std::size_t low = 0;
    for (std::int64_t count = first; count <= last; ++count) {
        const auto x = static_cast<double>(count);
        if (x > counts_.back()) return false;
        bool stop = false;
        double time = 0.0;
        if (lines.straight) {
            while (low + 2 < counts_.size() && counts_[low + 1] <= x) ++low;
            const std::size_t high = counts_.size() > 1 ? low + 1 : low;
            const double weight = high > low ? (x - counts_[low]) / (counts_[high] - counts_[low]) : 0.0;
            time = slowest(
                [&](std::size_t d) {
                    const DeviceLine& line = lines.devices[d];
                    const auto value = [&](const std::vector<double>& v) {
                        return interpolate(v[low], v[high], weight);
                    };
                    return std::array<double, 5>{value(line.time), value(line.all_stored), value(line.encoder_peak),
                                                 value(line.decoder_peak), value(line.stored_floor)};
                },
                stop);
        } else {
            const Layer encoder = tables_.encoder ? layer_at(*tables_.encoder, lines.encoder, x) : Layer{};
            const Layer decoder = layer_at(*tables_.decoder, lines.decoder, x);
            const Layer head = layer_at(*tables_.head, lines.head, x);
            time = slowest([&](std::size_t d) { return device_at(devices_[d], encoder, decoder, head); }, stop);
        }
        if (stop) return false;
        time_ms.push_back(time);
    }
    return true;
}

RunTimes::RunTimes(MicroBatchCost& cost, const std::vector<std::int64_t>& encoder_len,
                   const std::vector<std::int64_t>& decoder_len, std::int64_t max_size) {
    LLMSYS_CHECK(encoder_len.size() == decoder_len.size(),
                 "got " << encoder_len.size() << " encoder lengths and " << decoder_len.size() << " decoder lengths");
    LLMSYS_CHECK(max_size > 0, "the largest micro-batch size must be positive, got " << max_size);
    const std::size_t num_samples = encoder_len.size();
    offset_.assign(num_samples + 1, 0);
    for (std::size_t begin = 0; begin < num_samples; ++begin) {
        const std::size_t last = std::min(num_samples, begin + static_cast<std::size_t>(max_size));
        std::int64_t longest_encoder = 0, longest_decoder = 0;
        bool may_grow = true;
        for (std::size_t end = begin; end < last && may_grow;) {
            longest_encoder = std::max(longest_encoder, encoder_len[end]);
            longest_decoder = std::max(longest_decoder, decoder_len[end]);
            const std::size_t stretch = end;
            while (end < last && encoder_len[end] <= longest_encoder && decoder_len[end] <= longest_decoder) ++end;
            may_grow = cost.append(longest_encoder, longest_decoder, static_cast<std::int64_t>(stretch - begin) + 1,
                                   static_cast<std::int64_t>(end - begin), time_ms_);
        }
        while (time_ms_.size() > offset_[begin] && time_ms_.back() == kInfinity) time_ms_.pop_back();
        offset_[begin + 1] = time_ms_.size();
    }
    find_max_width();
}

void RunTimes::find_max_width() {
    for (std::size_t begin = 0; begin < num_samples(); ++begin) max_width_ = std::max(max_width_, width(begin));
}

RunTimes::RunTimes(std::vector<std::size_t> offset, std::vector<double> time_ms)
    : offset_(std::move(offset)), time_ms_(std::move(time_ms)) {
    LLMSYS_CHECK(!offset_.empty() && offset_.front() == 0 && offset_.back() == time_ms_.size(),
                 "the rows of the runs must cover all " << time_ms_.size() << " times");
    for (std::size_t begin = 0; begin < num_samples(); ++begin) {
        LLMSYS_CHECK(offset_[begin] <= offset_[begin + 1], "the rows of the runs must be in order");
        LLMSYS_CHECK(begin + width(begin) <= num_samples(), "row " << begin << " reaches past the last sample");
    }
    for (const double time : time_ms_) LLMSYS_CHECK(time >= 0.0, "times must not be negative, got " << time);
    find_max_width();
}

namespace {

// Cheapest total time of a partition whose micro-batches all take at most t_max.
class TotalTime {
  public:
    explicit TotalTime(const RunTimes& runs) : runs_(runs), best_(runs.num_samples() + 1) {
        for (std::size_t begin = 0; begin < runs.num_samples(); ++begin) {
            rows_.push_back(runs.row(begin));
            widths_.push_back(runs.width(begin));
        }
    }

    // From now on only t_max up to `limit` will be asked for: copies the runs that can matter, which lie together
    // then. Rows are often many times as wide as any good micro-batch.
    void trim(double limit) {
        std::vector<std::size_t> begins;
        for (std::size_t begin = 0; begin < runs_.num_samples(); ++begin) {
            while (widths_[begin] > 0 && rows_[begin][widths_[begin] - 1] > limit) --widths_[begin];
            begins.push_back(kept_.size());
            kept_.insert(kept_.end(), rows_[begin], rows_[begin] + widths_[begin]);
        }
        for (std::size_t begin = 0; begin < begins.size(); ++begin) rows_[begin] = kept_.data() + begins[begin];
    }

    double solve(double t_max) {
        ++num_evaluations;
        std::fill(best_.begin(), best_.end(), kInfinity);
        best_[0] = 0.0;
        for (std::size_t begin = 0; begin < runs_.num_samples(); ++begin) {
            const double before = best_[begin];
            if (before == kInfinity) continue;
            const double* time = rows_[begin];
            double* after = best_.data() + begin + 1;
            for (std::size_t k = 0; k < widths_[begin]; ++k) {
                const double total = time[k] <= t_max ? before + time[k] : kInfinity;
                after[k] = std::min(after[k], total);
            }
        }
        return best_.back();
    }

    // The partition behind the last solve(t_max); among equally cheap last micro-batches the shortest.
    Partition trace(double t_max) const {
        Partition result;
        result.feasible = true;
        for (std::size_t end = runs_.num_samples(); end > 0;) {
            std::size_t chosen = end;
            double chosen_time = kInfinity;
            const std::size_t lowest = end > runs_.max_width() ? end - runs_.max_width() : 0;
            for (std::size_t begin = end; begin-- > lowest;) {
                if (end - begin > widths_[begin]) continue;
                const double time = rows_[begin][end - begin - 1];
                if (time <= t_max && best_[begin] + time == best_[end] && time < chosen_time) {
                    chosen = begin;
                    chosen_time = time;
                }
            }
            result.ends.push_back(static_cast<std::int64_t>(end));
            result.times_ms.push_back(chosen_time);
            result.t_max_ms = std::max(result.t_max_ms, chosen_time);
            end = chosen;
        }
        std::reverse(result.ends.begin(), result.ends.end());
        std::reverse(result.times_ms.begin(), result.times_ms.end());
        return result;
    }

    // All different times in (above, below), ascending.
    std::vector<double> times_between(double above, double below) const {
        std::vector<double> times;
        for (std::size_t begin = 0; begin < runs_.num_samples(); ++begin)
            for (std::size_t k = 0; k < widths_[begin]; ++k)
                if (rows_[begin][k] > above && rows_[begin][k] < below) times.push_back(rows_[begin][k]);
        std::sort(times.begin(), times.end());
        times.erase(std::unique(times.begin(), times.end()), times.end());
        return times;
    }

    std::int64_t num_evaluations = 0;

  private:
    const RunTimes& runs_;
    std::vector<double> best_;
    std::vector<const double*> rows_;
    std::vector<std::size_t> widths_;
    std::vector<double> kept_;
};

// The total f(t_max) is a falling step function whose steps lie at times of runs: the candidates. An open interval
// between two evaluated candidates is dropped when both ends have the same total (the lower end dominates) or when
// not even its lowest candidate with its upper end's total would improve; otherwise it is halved. So every candidate
// is either evaluated or proved useless.
class StepSearch {
  public:
    StepSearch(const RunTimes& runs, double pipeline_factor, double num_replicas)
        : total_(runs), factor_(pipeline_factor), replicas_(num_replicas) {}

    Partition run() {
        const double least_total = evaluate(kInfinity);
        if (least_total < kInfinity && factor_ > 0) {
            // A few coarse steps first: a good partition bounds the candidates that have to be sorted.
            double t_max = last_t_max_ / 2;
            while (t_max > 0 && evaluate(t_max) < kInfinity) t_max /= 2;
            const double infeasible = t_max;
            const double useless = (best_.objective_ms - least_total / replicas_) / factor_;
            total_.trim(useless);
            candidates_ = total_.times_between(infeasible, useless);
            if (!candidates_.empty()) {
                const std::size_t last = candidates_.size() - 1;
                const double last_total = evaluate(candidates_[last]);
                search(-1, kInfinity, position_of_last(), last_total);
            }
        }
        best_.num_evaluations = total_.num_evaluations;
        return best_;
    }

  private:
    // Total at t_max. A feasible one also updates the best partition and last_t_max_, the real maximum.
    double evaluate(double t_max) {
        const double total = total_.solve(t_max);
        if (total == kInfinity) return total;
        Partition found = total_.trace(t_max);
        found.objective_ms = factor_ * found.t_max_ms + total / replicas_;
        last_t_max_ = found.t_max_ms;
        if (found.objective_ms < best_.objective_ms) best_ = std::move(found);
        return total;
    }

    // Index of the real maximum of the last feasible evaluation; -1 when it lies below all candidates.
    std::ptrdiff_t position_of_last() const {
        const auto it = std::upper_bound(candidates_.begin(), candidates_.end(), last_t_max_);
        return it - candidates_.begin() - 1;
    }

    // Candidates strictly between the positions low and high, whose totals are known.
    void search(std::ptrdiff_t low, double low_total, std::ptrdiff_t high, double high_total) {
        while (high - low > 1 && low_total != high_total) {
            const double lowest = candidates_[static_cast<std::size_t>(low + 1)];
            if (factor_ * lowest + high_total / replicas_ >= best_.objective_ms) return;
            const std::ptrdiff_t middle = low + (high - low) / 2;
            const double total = evaluate(candidates_[static_cast<std::size_t>(middle)]);
            const std::ptrdiff_t reached = total < kInfinity ? position_of_last() : middle;
            search(middle, total, high, high_total);
            if (total == kInfinity) return;  // everything lower is infeasible too
            high = reached;
            high_total = total;
        }
    }

    TotalTime total_;
    double factor_, replicas_;
    std::vector<double> candidates_;
    Partition best_;
    double last_t_max_ = 0.0;
};

}  // namespace

Partition partition_samples(const RunTimes& runs, double pipeline_factor, double num_replicas) {
    LLMSYS_CHECK(runs.num_samples() > 0, "there are no samples to partition");
    LLMSYS_CHECK(pipeline_factor >= 0, "the pipeline factor must not be negative, got " << pipeline_factor);
    LLMSYS_CHECK(num_replicas > 0, "the number of replicas must be positive, got " << num_replicas);
    return StepSearch(runs, pipeline_factor, num_replicas).run();
}

}  // namespace llmsys
