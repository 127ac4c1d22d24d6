#include "solvers/table.h"

#include <algorithm>

#include "common/check.h"

namespace llmsys {
namespace {

constexpr std::size_t kMeasuredColumns = 4;

std::size_t grid_size(const std::vector<std::vector<double>>& axes) {
    std::size_t size = 1;
    for (const auto& axis : axes) size *= axis.size();
    return size;
}

// For every grid point the minimum over all points that are not smaller in any axis, one axis at a time.
std::vector<double> floor_of(std::vector<double> column, const std::vector<std::vector<double>>& axes) {
    std::size_t stride = column.size();
    for (const auto& axis : axes) {
        stride /= axis.size();
        for (std::size_t i = column.size(); i-- > 0;) {
            const std::size_t position = i / stride % axis.size();
            if (position + 1 < axis.size()) column[i] = std::min(column[i], column[i + stride]);
        }
    }
    return column;
}

}  // namespace

Bracket locate(const std::vector<double>& axis, double x) {
    if (x > axis.back()) return {0, 0.0, false};
    if (axis.size() == 1) return {0, 0.0, true};
    const auto above = std::upper_bound(axis.begin(), axis.end(), x);
    std::size_t low = above == axis.begin() ? 0 : static_cast<std::size_t>(above - axis.begin()) - 1;
    low = std::min(low, axis.size() - 2);
    return {low, (x - axis[low]) / (axis[low + 1] - axis[low]), true};
}

CostTable::CostTable(std::vector<std::vector<double>> axes, std::vector<std::vector<double>> columns)
    : axes_(std::move(axes)), columns_(std::move(columns)) {
    LLMSYS_CHECK(axes_.size() == 2 || axes_.size() == 3,
                 "a cost table has 2 or 3 axes (lengths, micro-batch size), got " << axes_.size());
    for (const auto& axis : axes_) {
        LLMSYS_CHECK(!axis.empty(), "a cost table axis is empty");
        LLMSYS_CHECK(std::is_sorted(axis.begin(), axis.end(), std::less_equal<double>()),
                     "a cost table axis must increase strictly");
    }
    LLMSYS_CHECK(columns_.size() == kMeasuredColumns,
                 "a cost table has 4 columns (forward, backward, stored, peak), got " << columns_.size());
    const std::size_t size = grid_size(axes_);
    for (auto& column : columns_) {
        if (column.empty()) column.assign(size, 0.0);
        LLMSYS_CHECK(column.size() == size,
                     "a cost table column must have " << size << " points, got " << column.size());
        for (double& value : column)
            if (std::isnan(value)) value = kInfinity;
    }
    columns_.push_back(floor_of(columns_[2], axes_));
}

std::vector<double> CostTable::cut_column(const std::vector<double>& column, const Bracket* brackets) const {
    const std::size_t num_batches = axes_.back().size();
    const auto row = [&](std::size_t index) { return column.data() + index * num_batches; };
    std::vector<double> line(num_batches);
    const auto blend = [&](const double* low, const double* high, double weight, double* out) {
        for (std::size_t k = 0; k < num_batches; ++k) out[k] = interpolate(low[k], high[k], weight);
    };
    // An axis with one point has no upper neighbour; its weight is 0 or the query is outside.
    const auto next = [&](std::size_t axis) { return axes_[axis].size() > 1 ? std::size_t{1} : std::size_t{0}; };
    const Bracket& first = brackets[0];
    if (num_lengths() == 1) {
        blend(row(first.low), row(first.low + next(0)), first.weight, line.data());
        return line;
    }
    const Bracket& second = brackets[1];
    const std::size_t width = axes_[1].size();
    const auto at = [&](std::size_t i, std::size_t j) { return row((first.low + i) * width + second.low + j); };
    std::vector<double> low(num_batches), high(num_batches);
    blend(at(0, 0), at(next(0), 0), first.weight, low.data());
    blend(at(0, next(1)), at(next(0), next(1)), first.weight, high.data());
    blend(low.data(), high.data(), second.weight, line.data());
    return line;
}

CostLine CostTable::cut(const double* lengths) const {
    Bracket brackets[2];
    const std::size_t num_batches = axes_.back().size();
    bool below = false;
    for (std::size_t axis = 0; axis < num_lengths(); ++axis) {
        brackets[axis] = locate(axes_[axis], lengths[axis]);
        if (!brackets[axis].inside) {
            const std::vector<double> none(num_batches, kInfinity);
            return {none, none, none, none, none};
        }
        below = below || brackets[axis].weight < 0.0;
    }
    // Extrapolation may raise the floor above what a longer micro-batch stores, or run into a hole beside it.
    return {cut_column(columns_[0], brackets), cut_column(columns_[1], brackets), cut_column(columns_[2], brackets),
            cut_column(columns_[3], brackets),
            below ? std::vector<double>(num_batches, 0.0) : cut_column(columns_[4], brackets)};
}

}  // namespace llmsys
