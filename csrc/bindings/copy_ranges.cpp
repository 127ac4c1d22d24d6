#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <cstdint>
#include <cstring>

#include "bindings/bind.h"
#include "common/check.h"

namespace nb = nanobind;

namespace {

using Integers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

double copy_ranges(std::uint64_t destination, std::uint64_t source, const Integers& destination_offsets,
                   const Integers& source_offsets, const Integers& lengths) {
    const std::size_t count = lengths.size();
    LLMSYS_CHECK(destination_offsets.size() == count && source_offsets.size() == count,
                 "offsets and lengths must be arrays of one size, got " << destination_offsets.size() << ", "
                                                                        << source_offsets.size() << " and " << count);
    const std::int64_t* to = destination_offsets.data();
    const std::int64_t* from = source_offsets.data();
    const std::int64_t* length = lengths.data();
    const nb::gil_scoped_release release;
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(reinterpret_cast<void*>(destination + static_cast<std::uint64_t>(to[i])),
                    reinterpret_cast<const void*>(source + static_cast<std::uint64_t>(from[i])),
                    static_cast<std::size_t>(length[i]));
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void bind_copy_ranges(nb::module_& m) {
    m.def("copy_ranges", &copy_ranges, nb::arg("destination_address"), nb::arg("source_address"),
          nb::arg("destination_offsets"), nb::arg("source_offsets"), nb::arg("lengths"),
          "memcpy of ranges, one after the other, by the calling thread; the seconds it took. Addresses are not "
          "checked.");
}
