#include "solvers/partition.h"

#include <algorithm>
#include <limits>
#include <string_view>

#include "common/check.h"

namespace llmsys {
namespace {

constexpr std::int64_t kCompute = -1;
constexpr std::int64_t kWhole = 0;  // the part by which a whole op is known

void check_lists(const Lists& lists, std::size_t num_owners, std::int64_t limit, std::string_view name) {
    LLMSYS_CHECK(lists.offsets.size() == num_owners + 1 && lists.offsets.front() == 0 &&
                     lists.offsets.back() == static_cast<std::int64_t>(lists.values.size()) &&
                     std::is_sorted(lists.offsets.begin(), lists.offsets.end()),
                 name << ": offsets must rise from 0 to the " << lists.values.size() << " values, one more than the "
                      << num_owners << " ops, got " << lists.offsets.size());
    for (const std::int64_t value : lists.values)
        LLMSYS_CHECK(value >= 0 && value < limit, name << " must be in [0, " << limit << "), got " << value);
}

class Walker {
  public:
    Walker(const RangePipeline& pipeline, const RangeDurations& durations)
        : pipeline_(pipeline),
          durations_(durations),
          num_parts_(durations.num_parts),
          num_done_(pipeline.roles.size(), 0),
          end_ms_(pipeline.roles.size() * static_cast<std::size_t>(num_parts_), kNone),
          is_pending_(pipeline.joins.size(), true) {
        std::int64_t num_lanes = 0;
        for (const std::int64_t lane : pipeline.lanes) num_lanes = std::max(num_lanes, lane + 1);
        free_ms_.assign(static_cast<std::size_t>(num_lanes), 0.0);
    }

    double run() {
        run_whole(Role::before);
        run_stages();
        run_whole(Role::after);
        for (std::size_t join = 0; join < is_pending_.size(); ++join) make(join);
        for (std::size_t op = 0; op < pipeline_.roles.size(); ++op)
            for (std::int64_t part = 0; part < num_parts_; ++part) wait(op, part);
        return now_ms_;
    }

  private:
    // Transfers end at times >= 0, so a negative one means: not in flight.
    static constexpr double kNone = -1.0;

    void run_whole(Role role) {
        for (std::size_t op = 0; op < pipeline_.roles.size(); ++op)
            if (pipeline_.roles[op] == role) issue(op, kWhole);
    }

    bool is_compute(std::size_t op) const { return pipeline_.lanes[op] == kCompute; }

    // Each round holds one stage of computation and the stage of communication that follows it; communication that
    // waits for other communication begins a new stage.
    void run_stages() {
        std::vector<std::size_t> round;
        for (std::size_t op = 0; op < pipeline_.roles.size(); ++op) {
            if (pipeline_.roles[op] != Role::split) continue;
            if (begins_round(op, round)) run_round(round);
            round.push_back(op);
        }
        run_round(round);
    }

    bool begins_round(std::size_t op, const std::vector<std::size_t>& round) const {
        if (is_compute(op)) return !round.empty() && !is_compute(round.back());
        bool has_producer = false;
        for_each(pipeline_.waits, op, [&](std::size_t producer) {
            has_producer |= std::find(round.begin(), round.end(), producer) != round.end();
        });
        return has_producer;
    }

    void run_round(std::vector<std::size_t>& round) {
        for (std::int64_t part = 0; part < num_parts_; ++part)
            for (const std::size_t op : round) issue(op, part);
        round.clear();
    }

    void issue(std::size_t op, std::int64_t part) {
        if (part == 0)
            for_each(pipeline_.slices, op, [&](std::size_t slice) { now_ms_ += durations_.slices_ms[slice]; });
        for_each(pipeline_.waits, op, [&](std::size_t producer) {
            wait(producer, pipeline_.roles[producer] == Role::split ? part : kWhole);
        });
        for_each(pipeline_.uses, op, [&](std::size_t join) { make(join); });
        if (is_compute(op)) {
            now_ms_ += durations_.ops_ms[op];
            ++num_done_[op];
            return;
        }
        now_ms_ += durations_.starts_ms[op];
        double& free_ms = free_ms_[static_cast<std::size_t>(pipeline_.lanes[op])];
        free_ms = std::max(now_ms_, free_ms) + durations_.ops_ms[op];
        end_of(op, part) = free_ms;
    }

    void wait(std::size_t op, std::int64_t part) {
        const double end_ms = end_of(op, part);
        if (end_ms == kNone) return;
        end_of(op, part) = kNone;
        for (std::size_t join = 0; join < is_pending_.size(); ++join) {
            const bool is_ready = is_pending_[join] && num_done_[producer_of(join)] == num_parts_;
            if (is_ready && now_ms_ + durations_.joins_ms[join] <= end_ms) make(join);
        }
        now_ms_ = std::max(now_ms_, end_ms) + durations_.waits_ms[op];
        ++num_done_[op];
    }

    void make(std::size_t join) {
        if (!is_pending_[join]) return;
        is_pending_[join] = false;
        for (std::int64_t part = 0; part < num_parts_; ++part) wait(producer_of(join), part);
        now_ms_ += durations_.joins_ms[join];
    }

    template <typename Action>
    static void for_each(const Lists& lists, std::size_t owner, Action action) {
        for (std::int64_t i = lists.offsets[owner]; i < lists.offsets[owner + 1]; ++i)
            action(static_cast<std::size_t>(lists.values[static_cast<std::size_t>(i)]));
    }

    std::size_t producer_of(std::size_t join) const { return static_cast<std::size_t>(pipeline_.joins[join]); }
    double& end_of(std::size_t op, std::int64_t part) {
        return end_ms_[op * static_cast<std::size_t>(num_parts_) + static_cast<std::size_t>(part)];
    }

    const RangePipeline& pipeline_;
    const RangeDurations& durations_;
    std::int64_t num_parts_;
    double now_ms_ = 0.0;
    std::vector<double> free_ms_;
    std::vector<std::int64_t> num_done_;
    std::vector<double> end_ms_;
    std::vector<bool> is_pending_;
};

}  // namespace

void RangePipeline::check() const {
    const std::size_t num_ops = roles.size();
    const auto limit = static_cast<std::int64_t>(num_ops);
    LLMSYS_CHECK(lanes.size() == num_ops, "got " << num_ops << " roles and " << lanes.size() << " lanes");
    for (const Role role : roles)
        LLMSYS_CHECK(role >= Role::before && role <= Role::after,
                     "a role must be 0, 1 or 2, got " << static_cast<std::int64_t>(role));
    for (const std::int64_t lane : lanes)
        LLMSYS_CHECK(lane >= kCompute && lane <= limit, "a lane must be in [-1, " << limit << "], got " << lane);
    for (const std::int64_t producer : joins)
        LLMSYS_CHECK(producer >= 0 && producer < limit, "a join of op " << producer << ", of " << num_ops << " ops");
    check_lists(waits, num_ops, limit, "waits");
    check_lists(slices, num_ops, std::numeric_limits<std::int64_t>::max(), "slices");
    check_lists(uses, num_ops, static_cast<std::int64_t>(joins.size()), "uses");
}

double pipeline_time(const RangePipeline& pipeline, const RangeDurations& durations) {
    LLMSYS_CHECK(durations.num_parts >= 1, "the number of parts must be positive, got " << durations.num_parts);
    return Walker(pipeline, durations).run();
}

Cover cover(std::int64_t num_groups, const std::vector<std::int64_t>& firsts, const std::vector<std::int64_t>& ends,
            const std::vector<double>& costs_ms) {
    LLMSYS_CHECK(num_groups >= 0 && firsts.size() == ends.size() && firsts.size() == costs_ms.size(),
                 "got " << num_groups << " groups and candidates with " << firsts.size() << " firsts, " << ends.size()
                        << " ends and " << costs_ms.size() << " costs");
    const auto size = static_cast<std::size_t>(num_groups) + 1;
    std::vector<std::vector<std::size_t>> ending(size);
    for (std::size_t c = 0; c < firsts.size(); ++c) {
        LLMSYS_CHECK(0 <= firsts[c] && firsts[c] < ends[c] && ends[c] <= num_groups,
                     "candidate " << c << " is [" << firsts[c] << ", " << ends[c] << ") of " << num_groups);
        ending[static_cast<std::size_t>(ends[c])].push_back(c);
    }
    std::vector<double> best_ms(size, std::numeric_limits<double>::infinity());
    std::vector<std::size_t> chosen(size, 0);
    best_ms[0] = 0.0;
    for (std::size_t n = 1; n < size; ++n) {
        for (const std::size_t c : ending[n]) {
            const double total_ms = best_ms[static_cast<std::size_t>(firsts[c])] + costs_ms[c];
            if (total_ms < best_ms[n]) {
                best_ms[n] = total_ms;
                chosen[n] = c;
            }
        }
    }
    Cover found{best_ms.back(), {}};
    if (found.total_ms == std::numeric_limits<double>::infinity()) return found;
    for (std::size_t n = size - 1; n > 0; n = static_cast<std::size_t>(firsts[chosen[n]]))
        found.candidates.push_back(static_cast<std::int64_t>(chosen[n]));
    std::reverse(found.candidates.begin(), found.candidates.end());
    return found;
}

}  // namespace llmsys
