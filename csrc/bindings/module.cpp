#include <nanobind/nanobind.h>

#include "bindings/bind.h"

namespace nb = nanobind;

namespace {

nb::dict build_info() {
    nb::dict info;
#if defined(__clang__)
    info["compiler"] = "clang";
    info["compiler_version"] = __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc";
    info["compiler_version"] = __VERSION__;
#else
    info["compiler"] = "unknown";
    info["compiler_version"] = "";
#endif
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["cuda_toolchain"] = static_cast<bool>(LLMSYS_CUDA_TOOLCHAIN);
    info["sanitize"] = LLMSYS_SANITIZE;
    return info;
}

}  // namespace

NB_MODULE(_C, m) {
    m.doc() = "Native solvers and communication engine of llmsys.";
    m.def("build_info", &build_info, "How this module was built: compiler, C++ standard, CUDA toolchain, sanitizers.");
    bind_solvers(m);
    bind_comm(m);
    bind_copy_ranges(m);
    bind_partition(m);
}
