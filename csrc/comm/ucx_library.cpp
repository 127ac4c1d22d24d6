#include "comm/ucx_library.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <sstream>
#include <utility>

#include "common/check.h"

namespace llmsys::comm {

namespace {

// The interface this code was written for; newer libraries keep it, and no field younger than it is used.
constexpr unsigned kApiMajor = 1;
constexpr unsigned kApiMinor = 14;

std::filesystem::path folder_of(const void* symbol) {
    Dl_info info{};
    if (dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return {};
    std::error_code ignored;
    return std::filesystem::weakly_canonical(info.dli_fname, ignored).parent_path();
}

}  // namespace

UcxLibrary::UcxLibrary(const std::string& path) : path_(path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        throw UcxError("cannot load UCX from " + path + ": " + dlerror());
    }
    auto resolve = [&](const char* name) {
        void* symbol = dlsym(handle, name);
        if (symbol == nullptr) throw UcxError(path + " is not a usable libucp: it has no " + name);
        return symbol;
    };
    auto get_version = reinterpret_cast<decltype(&::ucp_get_version)>(resolve("ucp_get_version"));
    unsigned release = 0;
    get_version(&major_, &minor_, &release);
    version_ = std::to_string(major_) + "." + std::to_string(minor_) + "." + std::to_string(release);
    // Older ones complete no read from a process that does not call UCX itself.
    if (major_ != kApiMajor || minor_ < kApiMinor) {
        throw UcxError("UCX 1.14 or newer is needed, " + path + " is " + version_);
    }
#define LLMSYS_UCX_RESOLVE(name) name = reinterpret_cast<decltype(&::name)>(resolve(#name));
    LLMSYS_UCX_FUNCTIONS(LLMSYS_UCX_RESOLVE)
#undef LLMSYS_UCX_RESOLVE
    // The loader finds libucs by its name: where another UCX is in the process, libucp would run on top of that one.
    const auto ours = folder_of(reinterpret_cast<const void*>(get_version));
    const auto base = folder_of(reinterpret_cast<const void*>(ucs_status_string));
    if (ours != base) {
        throw UcxError("another UCX, in " + base.string() + ", is already loaded in this process; " + path +
                       " cannot be mixed with it");
    }
}

void UcxLibrary::check(ucs_status_t status, const std::string& what) const {
    if (status != UCS_OK) throw UcxError(what + ": UCX says '" + ucs_status_string(status) + "'");
}

UcxContext::UcxContext(std::shared_ptr<const UcxLibrary> library, const std::map<std::string, std::string>& options)
    : library_(std::move(library)) {
    const UcxLibrary& ucx = *library_;
    if (const char* tls = getenv("UCX_TLS")) tls_ = tls;
    ucp_config_t* config = nullptr;
    ucx.check(ucx.ucp_config_read(nullptr, nullptr, &config), "reading UCX's settings from the environment");
    const std::unique_ptr<ucp_config_t, decltype(ucx.ucp_config_release)> config_owner(config, ucx.ucp_config_release);
    for (const auto& [name, value] : options) {
        const ucs_status_t status = ucx.ucp_config_modify(config, name.c_str(), value.c_str());
        if (name == "TLS") tls_ = value;
        LLMSYS_CHECK(status == UCS_OK,
                     "UCX setting " << name << "=" << value << " is refused: " << ucx.ucs_status_string(status));
    }
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
    params.features = UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    // Registering memory can take seconds; heartbeats must go on meanwhile, so it is done outside the progress thread.
    params.mt_workers_shared = 1;
    ucx.check(ucx.ucp_init_version(kApiMajor, kApiMinor, &params, config, &context_), "starting UCX");
    try {
        read_transports();
        check_shared_memory(options);
        create_worker();
    } catch (...) {
        shut_down();
        throw;
    }
}

void UcxContext::create_worker() {
    const UcxLibrary& ucx = *library_;
    ucp_context_attr_t attributes{};
    attributes.field_mask = UCP_ATTR_FIELD_THREAD_MODE;
    ucx.check(ucx.ucp_context_query(context_, &attributes), "asking UCX for its thread mode");
    thread_safe_ = attributes.thread_mode == UCS_THREAD_MODE_MULTI;
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    ucx.check(ucx.ucp_worker_create(context_, &params, &worker_), "creating a UCX worker");
    ucx.check(ucx.ucp_worker_get_efd(worker_, &event_fd_), "asking UCX for its event descriptor");
    ucp_address_t* address = nullptr;
    std::size_t size = 0;
    ucx.check(ucx.ucp_worker_get_address(worker_, &address, &size), "asking UCX for its address");
    address_.assign(reinterpret_cast<const char*>(address), size);
    ucx.ucp_worker_release_address(worker_, address);
}

// UCX has no call that lists transports; its printed description has lines "resource N : md N dev N flags --
// tl/device".
void UcxContext::read_transports() {
    char* text = nullptr;
    std::size_t size = 0;
    FILE* stream = open_memstream(&text, &size);
    if (stream == nullptr) return;
    library_->ucp_context_print_info(context_, stream);
    fclose(stream);
    std::istringstream lines(std::string(text, size));
    free(text);
    for (std::string line; std::getline(lines, line);) {
        const std::size_t found = line.find("resource");
        const std::size_t last = line.find_last_of(' ');
        if (found == std::string::npos || last == std::string::npos) continue;
        const std::string token = line.substr(last + 1);
        if (token.find('/') != std::string::npos) transports_.push_back(token);
    }
}

// UCX does without shared memory where less than 16 MiB of it are free, but asks again and again while it makes a
// worker, which takes 4 MiB, and crashes where the answer changes meanwhile.
void UcxContext::check_shared_memory(const std::map<std::string, std::string>& options) const {
    constexpr std::uint64_t kNeeded = 24 << 20;
    const bool uses_it = std::any_of(transports_.begin(), transports_.end(),
                                     [](const std::string& name) { return name.starts_with("posix/"); });
    const auto option = options.find("POSIX_DIR");
    const char* variable = getenv("UCX_POSIX_DIR");
    const std::string folder = option != options.end() ? option->second : variable != nullptr ? variable : "/dev/shm";
    struct statvfs found{};
    if (!uses_it || statvfs(folder.c_str(), &found) != 0) return;
    const std::uint64_t free_bytes = static_cast<std::uint64_t>(found.f_bavail) * found.f_frsize;
    if (free_bytes >= kNeeded) return;
    throw UcxError("UCX needs 24 MiB of shared memory to start, " + folder + " has " +
                   std::to_string(free_bytes >> 20) +
                   " MiB free: make it larger, or do without by UCX's setting "
                   "TLS=tcp,self");
}

UcxContext::~UcxContext() { shut_down(); }

void UcxContext::shut_down() {
    if (worker_ != nullptr) library_->ucp_worker_destroy(std::exchange(worker_, nullptr));
    if (context_ != nullptr) library_->ucp_cleanup(std::exchange(context_, nullptr));
}

}  // namespace llmsys::comm
