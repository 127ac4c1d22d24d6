#include "solvers/microbatch.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace llmsys {
namespace {

constexpr std::int64_t kMaxTabled = 4096;  // counts beyond are looked up each time

std::vector<Bracket> find_brackets(const CostTable& table) {
    const auto& axis = table.batch_axis();
    const auto size = std::min(kMaxTabled, static_cast<std::int64_t>(axis.back()) + 1);
    std::vector<Bracket> brackets;
    for (std::int64_t count = 0; count <= size; ++count) brackets.push_back(locate(axis, static_cast<double>(count)));
    return brackets;
}

}  // namespace

MicroBatchCost::MicroBatchCost(LayerTables tables, std::vector<DeviceLoad> devices)
    : tables_(std::move(tables)), devices_(std::move(devices)), cuts_(256) {
    LLMSYS_CHECK(tables_.decoder && tables_.head, "the decoder and head tables are required");
    LLMSYS_CHECK(tables_.decoder->num_lengths() == (tables_.encoder ? 2u : 1u),
                 "the decoder table has axes (encoder length, decoder length, micro-batch size) in an "
                 "encoder-decoder model and (length, micro-batch size) in a decoder-only one");
    LLMSYS_CHECK(!devices_.empty(), "at least one device is required");
    if (tables_.encoder) encoder_brackets_ = find_brackets(*tables_.encoder);
    decoder_brackets_ = find_brackets(*tables_.decoder);
    head_brackets_ = find_brackets(*tables_.head);
}

const MicroBatchCost::Cut& MicroBatchCost::cut(std::int64_t encoder_len, std::int64_t decoder_len) {
    const std::uint64_t key = (static_cast<std::uint64_t>(encoder_len) << 32) | static_cast<std::uint64_t>(decoder_len);
    if (last_cut_ && key == last_key_) return *last_cut_;
    LLMSYS_CHECK(encoder_len >= 0 && decoder_len >= 0,
                 "lengths must not be negative, got " << encoder_len << " and " << decoder_len);
    if (2 * num_cuts_ >= cuts_.size()) {
        std::vector<std::pair<std::uint64_t, std::unique_ptr<Cut>>> larger(2 * cuts_.size());
        for (auto& [old_key, value] : cuts_) {
            if (!value) continue;
            std::size_t slot = old_key * 0x9E3779B97F4A7C15ull % larger.size();
            while (larger[slot].second) slot = (slot + 1) % larger.size();
            larger[slot] = {old_key, std::move(value)};
        }
        cuts_ = std::move(larger);
    }
    std::size_t slot = key * 0x9E3779B97F4A7C15ull % cuts_.size();
    while (cuts_[slot].second && cuts_[slot].first != key) slot = (slot + 1) % cuts_.size();
    if (!cuts_[slot].second) {
        const double lengths[2] = {static_cast<double>(encoder_len), static_cast<double>(decoder_len)};
        auto made = std::make_unique<Cut>();
        if (tables_.encoder) made->encoder = tables_.encoder->cut(&lengths[0]);
        made->decoder = tables_.decoder->cut(tables_.encoder ? &lengths[0] : &lengths[1]);
        made->head = tables_.head->cut(&lengths[1]);
        cuts_[slot] = {key, std::move(made)};
        ++num_cuts_;
    }
    last_key_ = key;
    last_cut_ = cuts_[slot].second.get();
    return *last_cut_;
}

Cell MicroBatchCost::operator()(std::int64_t encoder_len, std::int64_t decoder_len, std::int64_t count) {
    const Cut& cut = this->cut(encoder_len, decoder_len);
    struct Layer {
        double time = 0, stored = 0, peak = 0, floor = 0;
    };
    const auto read = [&](const CostTable& table, const Brackets& brackets, const CostLine& line) -> Layer {
        const auto index = static_cast<std::size_t>(count);
        const Bracket b =
            index < brackets.size() ? brackets[index] : locate(table.batch_axis(), static_cast<double>(count));
        if (!b.inside) return {kInfinity, kInfinity, kInfinity, kInfinity};
        const std::size_t high = table.batch_axis().size() > 1 ? b.low + 1 : b.low;
        // Below the grid extrapolation may pass 0.
        const auto value = [&](const std::vector<double>& v) {
            return std::max(0.0, interpolate(v[b.low], v[high], b.weight));
        };
        return {value(line.forward) + value(line.backward), value(line.stored), value(line.peak),
                b.weight < 0.0 ? 0.0 : value(line.stored_floor)};
    };
    const Layer encoder = tables_.encoder ? read(*tables_.encoder, encoder_brackets_, cut.encoder) : Layer{};
    const Layer decoder = read(*tables_.decoder, decoder_brackets_, cut.decoder);
    const Layer head = read(*tables_.head, head_brackets_, cut.head);

    Cell cell{0.0, false};
    for (const DeviceLoad& device : devices_) {
        const double ne = device.num_encoder_layers, nd = device.num_decoder_layers;
        // 0 * infinity is not a number: a device without such layers must not read their cost.
        const double encoder_stored = ne > 0 ? ne * encoder.stored : 0.0;
        double time = 0.0, stored = encoder_stored, peak = 0.0, floor = 0.0;
        if (ne > 0) {
            time += ne * encoder.time;
            peak = (ne - 1) * encoder.stored + encoder.peak;
            floor += ne * encoder.floor;
        }
        if (nd > 0) {
            time += nd * decoder.time;
            stored += nd * decoder.stored;
            peak = std::max(peak, encoder_stored + (nd - 1) * decoder.stored + decoder.peak);
            floor += nd * decoder.floor;
        }
        if (device.head) time += head.time;
        if (floor > device.stored_limit_mb) cell.stop = true;
        if (!(time < kInfinity) || stored > device.stored_limit_mb || peak > device.peak_limit_mb) {
            cell.time_ms = kInfinity;
        } else {
            cell.time_ms = std::max(cell.time_ms, time);
        }
    }
    return cell;
}

RunTimes::RunTimes(MicroBatchCost& cost, const std::vector<std::int64_t>& encoder_len,
                   const std::vector<std::int64_t>& decoder_len, std::int64_t max_size) {
    LLMSYS_CHECK(encoder_len.size() == decoder_len.size(),
                 "got " << encoder_len.size() << " encoder lengths and " << decoder_len.size() << " decoder lengths");
    LLMSYS_CHECK(max_size > 0, "the largest micro-batch size must be positive, got " << max_size);
    const std::size_t num_samples = encoder_len.size();
    offset_.assign(num_samples + 1, 0);
    for (std::size_t begin = 0; begin < num_samples; ++begin) {
        std::int64_t longest_encoder = 0, longest_decoder = 0;
        std::size_t last_feasible = offset_[begin];
        for (std::size_t end = begin; end < num_samples; ++end) {
            const auto count = static_cast<std::int64_t>(end - begin) + 1;
            if (count > max_size) break;
            longest_encoder = std::max(longest_encoder, encoder_len[end]);
            longest_decoder = std::max(longest_decoder, decoder_len[end]);
            const Cell cell = cost(longest_encoder, longest_decoder, count);
            if (cell.stop) break;
            time_ms_.push_back(cell.time_ms);
            if (cell.time_ms < kInfinity) last_feasible = time_ms_.size();
        }
        time_ms_.resize(last_feasible);
        offset_[begin + 1] = last_feasible;
        max_width_ = std::max(max_width_, last_feasible - offset_[begin]);
    }
}

RunTimes::RunTimes(std::vector<std::size_t> offset, std::vector<double> time_ms)
    : offset_(std::move(offset)), time_ms_(std::move(time_ms)) {
    LLMSYS_CHECK(!offset_.empty() && offset_.front() == 0 && offset_.back() == time_ms_.size(),
                 "the rows of the runs must cover all " << time_ms_.size() << " times");
    for (std::size_t begin = 0; begin < num_samples(); ++begin) {
        LLMSYS_CHECK(offset_[begin] <= offset_[begin + 1], "the rows of the runs must be in order");
        LLMSYS_CHECK(begin + width(begin) <= num_samples(), "row " << begin << " reaches past the last sample");
        max_width_ = std::max(max_width_, width(begin));
    }
    for (const double time : time_ms_) LLMSYS_CHECK(time >= 0.0, "times must not be negative, got " << time);
}

namespace {

// Cheapest total time of a partition whose micro-batches all take at most t_max.
class TotalTime {
  public:
    explicit TotalTime(const RunTimes& runs) : runs_(runs), best_(runs.num_samples() + 1) {}

    double solve(double t_max) {
        ++num_evaluations;
        std::fill(best_.begin(), best_.end(), kInfinity);
        best_[0] = 0.0;
        for (std::size_t begin = 0; begin < runs_.num_samples(); ++begin) {
            const double before = best_[begin];
            if (before == kInfinity) continue;
            const double* time = runs_.row(begin);
            double* after = best_.data() + begin + 1;
            const std::size_t width = runs_.width(begin);
            for (std::size_t k = 0; k < width; ++k) {
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
                const double time = runs_.at(begin, end);
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

    std::int64_t num_evaluations = 0;

  private:
    const RunTimes& runs_;
    std::vector<double> best_;
};

// The total f(t_max) is a falling step function whose steps lie at times of runs: the candidates. An open interval
// between two evaluated candidates is dropped when both ends have the same total (the lower end dominates) or when
// not even its lowest candidate with its upper end's total would improve; otherwise it is halved. So every candidate
// is either evaluated or proved useless.
class StepSearch {
  public:
    StepSearch(const RunTimes& runs, double pipeline_factor, double num_replicas)
        : runs_(runs), total_(runs), factor_(pipeline_factor), replicas_(num_replicas) {}

    Partition run() {
        const double least_total = evaluate(kInfinity);
        if (least_total < kInfinity && factor_ > 0) {
            // A few coarse steps first: a good partition bounds the candidates that have to be sorted.
            double t_max = last_t_max_ / 2;
            while (t_max > 0 && evaluate(t_max) < kInfinity) t_max /= 2;
            const double infeasible = t_max;
            collect_candidates(infeasible, (best_.objective_ms - least_total / replicas_) / factor_);
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

    void collect_candidates(double above, double below) {
        for (std::size_t begin = 0; begin < runs_.num_samples(); ++begin) {
            const double* time = runs_.row(begin);
            for (std::size_t k = 0; k < runs_.width(begin); ++k)
                if (time[k] > above && time[k] < below) candidates_.push_back(time[k]);
        }
        std::sort(candidates_.begin(), candidates_.end());
        candidates_.erase(std::unique(candidates_.begin(), candidates_.end()), candidates_.end());
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

    const RunTimes& runs_;
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
