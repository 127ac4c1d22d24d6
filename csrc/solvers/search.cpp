#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "solvers/adaptive.h"
#include "solvers/random.h"
#include "solvers/schedule.h"

namespace llmsys {
namespace {

struct Score {
    double overflow_mb = std::numeric_limits<double>::infinity();
    double makespan_ms = std::numeric_limits<double>::infinity();
    bool operator<(const Score& other) const {
        return overflow_mb != other.overflow_mb ? overflow_mb < other.overflow_mb : makespan_ms < other.makespan_ms;
    }
    bool operator<=(const Score& other) const { return !(other < *this); }
};

// A schedule slower than a feasible best one is of no use; while the best overflows, slower ones may be.
double give_up_ms(const Score& best) { return best.overflow_mb == 0.0 ? best.makespan_ms : Replay::kNever; }

class Evaluator {
  public:
    Evaluator(const PipelineCosts& costs, const std::vector<double>& limit_mb, std::int64_t max_in_flight)
        : limit_mb_(limit_mb),
          replay_(costs),
          adaptive_(costs, limit_mb, max_in_flight),
          one_f_one_b_(one_f_one_b_order(costs.num_micro_batches, costs.num_stages, costs.num_devices)) {}

    // Valid until the next call; null when the schedule cannot complete.
    const DeviceOrders* orders(ScheduleKind kind, const std::vector<std::int32_t>& permutation) {
        return kind == ScheduleKind::one_f_one_b ? &one_f_one_b_ : adaptive_.schedule(permutation.data());
    }

    Outcome run(ScheduleKind kind, const std::vector<std::int32_t>& permutation, double give_up_ms) {
        ++num_evaluations;
        const DeviceOrders* made = orders(kind, permutation);
        return made ? replay_.run(*made, permutation.data(), give_up_ms) : Outcome{};
    }

    Score score(const Outcome& outcome) const {
        if (!outcome.complete) return {};
        double overflow = 0.0;
        for (std::size_t d = 0; d < limit_mb_.size(); ++d)
            overflow = std::max(overflow, outcome.peak_mb[d] - limit_mb_[d]);
        return {overflow, outcome.makespan_ms};
    }

    std::int64_t num_evaluations = 0;

  private:
    const std::vector<double>& limit_mb_;
    Replay replay_;
    AdaptiveScheduler adaptive_;
    DeviceOrders one_f_one_b_;
};

void random_move(std::vector<std::int32_t>& permutation, Random& random) {
    const auto size = static_cast<std::int64_t>(permutation.size());
    const auto from = permutation.begin() + random.below(size);
    auto to = permutation.begin() + random.below(size);
    if (to == from) to = to + 1 == permutation.end() ? permutation.begin() : to + 1;
    if (random.below(2) == 0) {
        std::swap(*from, *to);
    } else if (from < to) {
        std::rotate(from, from + 1, to + 1);
    } else {
        std::rotate(to, from, from + 1);
    }
}

}  // namespace

SearchResult search_schedule(const PipelineCosts& costs, const std::vector<ScheduleKind>& kinds,
                             const std::vector<std::vector<std::int32_t>>& permutations,
                             const std::vector<double>& memory_limit_mb, std::int64_t max_in_flight,
                             std::int64_t max_moves, std::uint64_t seed) {
    costs.check();
    LLMSYS_CHECK(!kinds.empty() && !permutations.empty(), "a search needs at least one schedule kind and one order");
    LLMSYS_CHECK(
        memory_limit_mb.size() == static_cast<std::size_t>(costs.num_devices),
        "expected one memory limit for each of " << costs.num_devices << " devices, got " << memory_limit_mb.size());
    LLMSYS_CHECK(max_in_flight > 0, "max_in_flight must be positive, got " << max_in_flight);
    for (const auto& permutation : permutations) {
        auto sorted = permutation;
        std::sort(sorted.begin(), sorted.end());
        bool valid = sorted.size() == static_cast<std::size_t>(costs.num_micro_batches);
        for (std::size_t i = 0; valid && i < sorted.size(); ++i) valid = sorted[i] == static_cast<std::int32_t>(i);
        LLMSYS_CHECK(valid, "an order must list each of the " << costs.num_micro_batches << " micro-batches once");
    }

    Evaluator evaluator(costs, memory_limit_mb, max_in_flight);
    SearchResult best;
    Score best_score;
    for (const ScheduleKind kind : kinds) {
        for (const auto& permutation : permutations) {
            const Outcome outcome = evaluator.run(kind, permutation, give_up_ms(best_score));
            const Score score = evaluator.score(outcome);
            if (score < best_score || best.permutation.empty()) {
                best_score = score;
                best.kind = kind;
                best.permutation = permutation;
                best.outcome = outcome;
            }
        }
    }
    Random random(seed);
    std::vector<std::int32_t> tried;
    for (std::int64_t move = 0; move < max_moves && costs.num_micro_batches > 1; ++move) {
        tried = best.permutation;
        random_move(tried, random);
        // Every fourth try looks at the other kind, which may have overtaken.
        const auto kind = move % 4 == 3 ? kinds[static_cast<std::size_t>(move / 4) % kinds.size()] : best.kind;
        const Outcome outcome = evaluator.run(kind, tried, give_up_ms(best_score));
        const Score score = evaluator.score(outcome);
        if (score <= best_score) {  // equal ones too: a walk along a plateau finds its edge
            best_score = score;
            best.kind = kind;
            best.outcome = outcome;
            best.permutation.swap(tried);
        }
    }
    best.num_evaluations = evaluator.num_evaluations;
    best.overflow_mb = best_score.overflow_mb;
    best.feasible = best_score.overflow_mb == 0.0;
    if (std::isfinite(best_score.overflow_mb)) {
        best.orders = *evaluator.orders(best.kind, best.permutation);
        for (auto& order : best.orders)
            for (Op& op : order) op.micro_batch = best.permutation[static_cast<std::size_t>(op.micro_batch)];
    }
    return best;
}

}  // namespace llmsys
