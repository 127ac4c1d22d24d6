#include "solvers/tour.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <utility>

#include "common/check.h"
#include "solvers/random.h"

namespace llmsys {
namespace {

constexpr std::size_t kNeighbours = 8;
constexpr std::int64_t kMaxSegment = 3;   // Or-opt moves up to this many cities
constexpr std::int64_t kKickWindow = 30;  // a kick cuts within so many positions, so repair stays local

// A closed tour over the cities and one extra city at distance 0 from all: cut there, it is an open path.
class Tour {
  public:
    Tour(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& y)
        : x_(x), y_(y), size_(static_cast<std::int64_t>(x.size()) + 1), place_(x.size() + 1) {
        find_neighbours();
        greedy_start();
    }

    void improve_all() {
        for (std::int32_t city = 0; city < size_; ++city) push(city);
        improve();
    }

    // One double-bridge within a window, repaired; undone when the path got longer.
    void kick(Random& random) {
        const std::int64_t window = std::min(kKickWindow, size_ - 1);
        if (window < 4) return;
        const std::vector<std::int32_t> before = tour_;
        const std::int64_t start = random.below(size_);
        std::array<std::int64_t, 3> cut{};
        for (auto& c : cut) c = 1 + random.below(window - 1);
        std::sort(cut.begin(), cut.end());
        if (cut[0] == cut[1] || cut[1] == cut[2]) return;
        // A B C D -> A C B D, read from start.
        std::int64_t change = 0;
        std::vector<std::int32_t> middle;
        for (std::int64_t i = cut[1]; i < cut[2]; ++i) middle.push_back(at(start + i));
        for (std::int64_t i = cut[0]; i < cut[1]; ++i) middle.push_back(at(start + i));
        const std::int32_t left = at(start + cut[0] - 1), right = at(start + cut[2]);
        change -= distance(left, at(start + cut[0])) + distance(at(start + cut[1] - 1), at(start + cut[1])) +
                  distance(at(start + cut[2] - 1), right);
        change += distance(left, middle.front()) + distance(middle.back(), right) +
                  distance(at(start + cut[2] - 1), at(start + cut[0]));
        push(left);
        push(right);
        for (const std::int64_t i : {cut[0], cut[1] - 1, cut[1], cut[2] - 1}) push(at(start + i));
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(middle.size()); ++i)
            put(start + cut[0] + i, middle[static_cast<std::size_t>(i)]);
        if (change + improve() > 0) {
            tour_ = before;
            for (std::int64_t i = 0; i < size_; ++i)
                place_[static_cast<std::size_t>(tour_[static_cast<std::size_t>(i)])] = i;
        }
    }

    std::vector<std::int32_t> path() const {
        std::vector<std::int32_t> result;
        const std::int64_t cut = place_.back();
        for (std::int64_t i = 1; i < size_; ++i) result.push_back(at(cut + i));
        return result;
    }

  private:
    std::int64_t distance(std::int32_t a, std::int32_t b) const {
        if (a == size_ - 1 || b == size_ - 1) return 0;
        const auto i = static_cast<std::size_t>(a), j = static_cast<std::size_t>(b);
        return std::abs(x_[i] - x_[j]) + std::abs(y_[i] - y_[j]);
    }
    std::int64_t wrap(std::int64_t position) const {
        position %= size_;
        return position < 0 ? position + size_ : position;
    }
    std::int32_t at(std::int64_t position) const { return tour_[static_cast<std::size_t>(wrap(position))]; }
    std::int64_t place(std::int32_t city) const { return place_[static_cast<std::size_t>(city)]; }
    void put(std::int64_t position, std::int32_t city) {
        const std::int64_t p = wrap(position);
        tour_[static_cast<std::size_t>(p)] = city;
        place_[static_cast<std::size_t>(city)] = p;
    }
    void push(std::int32_t city) {
        if (queued_[static_cast<std::size_t>(city)]) return;
        queued_[static_cast<std::size_t>(city)] = true;
        queue_.push_back(city);
    }

    void find_neighbours() {
        queued_.assign(static_cast<std::size_t>(size_), false);
        neighbours_.resize(x_.size());
        std::vector<std::pair<std::int64_t, std::int32_t>> others;
        for (std::int32_t city = 0; city + 1 < size_; ++city) {
            others.clear();
            for (std::int32_t other = 0; other + 1 < size_; ++other)
                if (other != city) others.emplace_back(distance(city, other), other);
            const std::size_t keep = std::min(kNeighbours, others.size());
            std::partial_sort(others.begin(), others.begin() + static_cast<std::ptrdiff_t>(keep), others.end());
            for (std::size_t k = 0; k < keep; ++k)
                neighbours_[static_cast<std::size_t>(city)].push_back(others[k].second);
        }
    }

    void greedy_start() {
        std::vector<bool> visited(x_.size(), false);
        // Starting at an extreme city keeps the first path from having to return to a corner.
        std::int32_t city = 0;
        for (std::int32_t other = 1; other + 1 < size_; ++other) {
            const auto i = static_cast<std::size_t>(other), j = static_cast<std::size_t>(city);
            if (x_[i] + y_[i] > x_[j] + y_[j]) city = other;
        }
        tour_.push_back(city);
        visited[static_cast<std::size_t>(city)] = true;
        while (static_cast<std::int64_t>(tour_.size()) + 1 < size_) {
            city = nearest_unvisited(city, visited);
            visited[static_cast<std::size_t>(city)] = true;
            tour_.push_back(city);
        }
        tour_.push_back(static_cast<std::int32_t>(size_ - 1));
        for (std::int64_t i = 0; i < size_; ++i) put(i, tour_[static_cast<std::size_t>(i)]);
    }

    std::int32_t nearest_unvisited(std::int32_t city, const std::vector<bool>& visited) const {
        for (const std::int32_t other : neighbours_[static_cast<std::size_t>(city)])
            if (!visited[static_cast<std::size_t>(other)]) return other;
        std::int32_t nearest = -1;
        for (std::int32_t other = 0; other + 1 < size_; ++other) {
            if (visited[static_cast<std::size_t>(other)]) continue;
            if (nearest < 0 || distance(city, other) < distance(city, nearest)) nearest = other;
        }
        return nearest;
    }

    // Returns by how much the tour's length changed (never above 0).
    std::int64_t improve() {
        std::int64_t change = 0;
        while (!queue_.empty()) {
            const std::int32_t city = queue_.back();
            queue_.pop_back();
            queued_[static_cast<std::size_t>(city)] = false;
            for (std::int64_t gain; (gain = improve_city(city)) > 0;) change -= gain;
        }
        return change;
    }

    std::int64_t improve_city(std::int32_t city) {
        if (city == size_ - 1) return 0;
        for (const std::int32_t other : neighbours_[static_cast<std::size_t>(city)]) {
            for (const bool forward : {true, false}) {
                if (const std::int64_t gain = two_opt(city, other, forward); gain > 0) return gain;
            }
        }
        for (std::int64_t length = 1; length <= kMaxSegment; ++length) {
            for (const bool forward : {true, false}) {
                if (const std::int64_t gain = or_opt(city, length, forward); gain > 0) return gain;
            }
        }
        return 0;
    }

    // Joins a with b, and their successors (or predecessors) with each other.
    std::int64_t two_opt(std::int32_t a, std::int32_t b, bool forward) {
        const std::int64_t step = forward ? 1 : -1;
        const std::int32_t after_a = at(place(a) + step), after_b = at(place(b) + step);
        const std::int64_t gain =
            distance(a, after_a) + distance(b, after_b) - distance(a, b) - distance(after_a, after_b);
        if (gain <= 0) return 0;
        if (forward) {
            reverse(place(after_a), place(b));
        } else {
            reverse(place(b), place(after_a));
        }
        for (const std::int32_t city : {a, b, after_a, after_b}) push(city);
        return gain;
    }

    // Reverses the cities from position `from` to position `to`, going forward, by the shorter side.
    void reverse(std::int64_t from, std::int64_t to) {
        std::int64_t inside = wrap(to - from) + 1;
        if (2 * inside > size_) {
            std::swap(from, to);
            ++from;
            --to;
            inside = size_ - inside;
        }
        for (std::int64_t i = 0; i < inside / 2; ++i) {
            const std::int32_t a = at(from + i), b = at(to - i);
            put(from + i, b);
            put(to - i, a);
        }
    }

    // Moves the segment of `length` cities that begins at `city` (backwards when not forward) beside a neighbour of
    // `city`, so that the two become adjacent.
    std::int64_t or_opt(std::int32_t city, std::int64_t length, bool forward) {
        if (length + 3 > size_) return 0;
        const std::int64_t step = forward ? 1 : -1;
        const std::int64_t head = place(city);
        const std::int32_t tail = at(head + step * (length - 1));
        const std::int32_t before = at(head - step), after = at(head + step * length);
        const std::int64_t removed = distance(before, city) + distance(tail, after) - distance(before, after);
        if (removed <= 0) return 0;
        for (const std::int32_t target : neighbours_[static_cast<std::size_t>(city)]) {
            const std::int64_t offset = wrap(step * (place(target) - head));
            if (offset < length) continue;  // inside the segment
            for (const std::int64_t side : {std::int64_t{1}, std::int64_t{-1}}) {
                // The segment goes between target and its neighbour `other` on that side, city next to target.
                const std::int32_t other = at(place(target) + side);
                if (wrap(step * (place(other) - head)) < length) continue;
                const std::int64_t added = distance(target, city) + distance(tail, other) - distance(target, other);
                if (removed - added <= 0) continue;
                move_segment(head, step, length, target, side);
                for (const std::int32_t touched : {before, after, city, tail, target, other}) push(touched);
                return removed - added;
            }
        }
        return 0;
    }

    void move_segment(std::int64_t head, std::int64_t step, std::int64_t length, std::int32_t target,
                      std::int64_t side) {
        std::array<std::int32_t, kMaxSegment> segment{};
        for (std::int64_t i = 0; i < length; ++i) segment[static_cast<std::size_t>(i)] = at(head + step * i);
        // Close the gap by shifting the cities between the segment and its new place; `low` is the segment's first
        // position in tour order.
        const std::int64_t low = wrap(step > 0 ? head : head - (length - 1));
        const std::int64_t ahead = wrap(place(target) - (low + length - 1));
        const std::int64_t behind = wrap(low - place(target));
        // Ends at the gap between target and its neighbour on `side`.
        if (ahead <= behind) {
            const std::int64_t count = side > 0 ? ahead : ahead - 1;
            for (std::int64_t i = 0; i < count; ++i) put(low + i, at(low + length + i));
            for (std::int64_t i = 0; i < length; ++i)
                put(low + count + i, segment[static_cast<std::size_t>(side > 0 ? i : length - 1 - i)]);
        } else {
            const std::int64_t count = side > 0 ? behind - 1 : behind;
            for (std::int64_t i = 1; i <= count; ++i) put(low + length - i, at(low - i));
            for (std::int64_t i = 0; i < length; ++i)
                put(low - count + i, segment[static_cast<std::size_t>(side > 0 ? i : length - 1 - i)]);
        }
    }

    const std::vector<std::int64_t>& x_;
    const std::vector<std::int64_t>& y_;
    std::int64_t size_;
    std::vector<std::int32_t> tour_;
    std::vector<std::int64_t> place_;
    std::vector<std::vector<std::int32_t>> neighbours_;
    std::vector<bool> queued_;
    std::vector<std::int32_t> queue_;
};

}  // namespace

std::vector<std::int32_t> open_path(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& y,
                                    std::int64_t max_kicks, std::uint64_t seed) {
    LLMSYS_CHECK(x.size() == y.size(), "got " << x.size() << " x and " << y.size() << " y coordinates");
    std::vector<std::int32_t> trivial;
    if (x.size() < 3) {
        for (std::size_t i = 0; i < x.size(); ++i) trivial.push_back(static_cast<std::int32_t>(i));
        return trivial;
    }
    Tour tour(x, y);
    tour.improve_all();
    Random random(seed);
    for (std::int64_t i = 0; i < max_kicks; ++i) tour.kick(random);
    return tour.path();
}

}  // namespace llmsys
