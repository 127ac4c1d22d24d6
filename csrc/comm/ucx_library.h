#pragma once

#include <ucp/api/ucp.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace llmsys::comm {

// UCX refused an operation; the message says which and why.
class UcxError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// UCX, loaded at run time: the same build works with the library of the system, of an HPC suite or of a Python package.
// The members are UCX's own functions. Never unloaded, since UCX leaves hooks behind in the process.
class UcxLibrary {
  public:
    // Throws UcxError where the file cannot be loaded, is older than 1.14 or would mix with another UCX in the process.
    explicit UcxLibrary(const std::string& path);

    const std::string& path() const { return path_; }
    const std::string& version() const { return version_; }
    unsigned major() const { return major_; }
    unsigned minor() const { return minor_; }

    // Throws UcxError with `what` and UCX's text unless status is UCS_OK.
    void check(ucs_status_t status, const std::string& what) const;

#define LLMSYS_UCX_FUNCTIONS(apply)                                                                                    \
    apply(ucp_config_read) apply(ucp_config_modify) apply(ucp_config_release) apply(ucp_init_version)                  \
        apply(ucp_cleanup) apply(ucp_context_query) apply(ucp_context_print_info) apply(ucp_worker_create)             \
            apply(ucp_worker_destroy) apply(ucp_worker_query) apply(ucp_worker_get_address)                            \
                apply(ucp_worker_release_address) apply(ucp_worker_progress) apply(ucp_worker_get_efd)                 \
                    apply(ucp_worker_arm) apply(ucp_worker_set_am_recv_handler) apply(ucp_mem_map)                     \
                        apply(ucp_mem_unmap) apply(ucp_mem_query) apply(ucp_rkey_pack) apply(ucp_rkey_buffer_release)  \
                            apply(ucp_ep_rkey_unpack) apply(ucp_rkey_ptr) apply(ucp_rkey_destroy) apply(ucp_ep_create) \
                                apply(ucp_ep_close_nbx) apply(ucp_ep_flush_nbx) apply(ucp_ep_query) apply(ucp_get_nbx) \
                                    apply(ucp_put_nbx) apply(ucp_am_send_nbx) apply(ucp_request_check_status)          \
                                        apply(ucp_request_free) apply(ucs_status_string)
#define LLMSYS_UCX_MEMBER(name) decltype(&::name) name = nullptr;
    LLMSYS_UCX_FUNCTIONS(LLMSYS_UCX_MEMBER)
#undef LLMSYS_UCX_MEMBER

  private:
    std::string path_;
    std::string version_;
    unsigned major_ = 0;
    unsigned minor_ = 0;
};

// One UCX context and its worker. Memory functions may be called by any thread where thread_safe(), the worker only by
// one thread at a time.
class UcxContext {
  public:
    // Options have names without "UCX_"; an unknown one, or a value UCX refuses, throws std::invalid_argument.
    UcxContext(std::shared_ptr<const UcxLibrary> library, const std::map<std::string, std::string>& options);
    ~UcxContext();
    UcxContext(const UcxContext&) = delete;
    UcxContext& operator=(const UcxContext&) = delete;
    // Ends UCX; address() and transports() stay. Nothing else may be used after it.
    void shut_down();

    const UcxLibrary& library() const { return *library_; }
    ucp_context_h context() const { return context_; }
    ucp_worker_h worker() const { return worker_; }
    bool thread_safe() const { return thread_safe_; }
    const std::string& address() const { return address_; }
    // Transports and devices, as "tcp/eth0".
    const std::vector<std::string>& transports() const { return transports_; }
    // UCX's setting TLS as asked for; empty where it was left to UCX.
    const std::string& tls() const { return tls_; }
    // Becomes readable when the armed worker has something to do.
    int event_fd() const { return event_fd_; }

  private:
    void create_worker();
    void read_transports();
    void check_shared_memory(const std::map<std::string, std::string>& options) const;

    std::shared_ptr<const UcxLibrary> library_;
    ucp_context_h context_ = nullptr;
    ucp_worker_h worker_ = nullptr;
    bool thread_safe_ = false;
    std::string address_;
    std::string tls_;
    std::vector<std::string> transports_;
    int event_fd_ = -1;
};

}  // namespace llmsys::comm
