#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace llmsys {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Where a query lies on one axis: value = (1 - weight) * v[low] + weight * v[low + 1].
// Below the first point the weight is negative, which extrapolates; beyond the last point nothing is known.
struct Bracket {
    std::size_t low = 0;
    double weight = 0.0;
    bool inside = true;
};

Bracket locate(const std::vector<double>& axis, double x);

// (1 - w) * a + w * b, where an unused end may be infeasible (infinite) and a used one makes the result so.
inline double interpolate(double a, double b, double w) {
    if (w == 0.0) return a;
    if (w == 1.0) return b;
    if (std::isinf(a) || std::isinf(b)) return kInfinity;
    return (1.0 - w) * a + w * b;
}

// Costs of one layer for every micro-batch size at fixed padded lengths: the profile cut along its last axis.
struct CostLine {
    std::vector<double> forward, backward, stored, peak;
    std::vector<double> stored_floor;  // see CostTable; 0 below the grid
};

// A measured grid of one layer's costs. The axes are one or two padded lengths, then the micro-batch size.
// Infeasible points are infinite.
class CostTable {
  public:
    // Each column holds the grid in row-major order; an empty column stands for zeros.
    CostTable(std::vector<std::vector<double>> axes, std::vector<std::vector<double>> columns);

    std::size_t num_lengths() const { return axes_.size() - 1; }
    const std::vector<double>& batch_axis() const { return axes_.back(); }

    // lengths has num_lengths() entries. A length beyond the grid gives an infeasible line.
    CostLine cut(const double* lengths) const;

  private:
    std::vector<double> cut_column(const std::vector<double>& column, const Bracket* brackets) const;

    std::vector<std::vector<double>> axes_;
    // forward, backward, stored, peak, then stored_floor: the least stored memory of any grid point that is
    // at least as large in every axis. Unlike measured columns it never falls as a micro-batch grows, so
    // passing a limit there proves that no larger micro-batch fits.
    std::vector<std::vector<double>> columns_;
};

}  // namespace llmsys
