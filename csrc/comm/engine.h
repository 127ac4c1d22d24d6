#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "comm/batch.h"
#include "comm/progress.h"
#include "comm/request.h"
#include "comm/ucx_library.h"

namespace llmsys::comm {

// What the binding exposes: checks arguments in the caller's thread and hands the work to the progress thread. Every
// method may be called from any thread. Bad arguments throw std::invalid_argument, UCX and a closed engine
// std::runtime_error.
class Engine {
  public:
    Engine(const std::string& library_path, const std::map<std::string, std::string>& ucx_options,
           EngineOptions options);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    const UcxContext& ucx() const { return *context_; }
    std::string worker_address() const;
    Probe probe() const;

    std::int64_t register_memory(std::uint64_t address, std::uint64_t size_bytes, bool cuda);
    std::pair<std::int64_t, std::uint64_t> allocate(std::uint64_t size_bytes);
    std::string remote_key(std::int64_t region_id);
    void release(std::int64_t region_id);

    std::int64_t add_peer(ControlSocket socket, PeerArguments arguments);
    WorkerAddress read_worker_address(const std::string& bytes) const;
    void remove_peer(std::int64_t peer_id);
    PeerReport report(std::int64_t peer_id);

    std::int64_t import_remote(std::int64_t peer_id, const std::string& key, std::uint64_t address,
                               std::uint64_t size_bytes, bool cuda);
    Path remote_path(std::int64_t remote_id) const;
    void drop_remote(std::int64_t remote_id);

    std::shared_ptr<Request> post(std::int64_t peer_id, const BatchArguments& arguments);
    std::shared_ptr<Request> notify(std::int64_t peer_id, std::string payload);

    EventQueue& events() { return *events_; }
    Counters& counters() { return progress_->counters(); }
    Registry::Counts registry_counts() const { return registry_.counts(); }
    double progress_cpu_seconds() { return progress_->cpu_seconds(); }
    void close();

  private:
    std::int64_t map_memory(ucp_mem_map_params_t params, bool cuda);
    void unmap(ucp_mem_h handle);
    // In this thread where UCX allows it, so that heartbeats go on while memory is registered, else in the other one.
    void with_context(const std::function<void()>& command);
    void check_open() const;
    UcxVersion version() const { return {context_->library().major(), context_->library().minor()}; }

    const EngineOptions options_;
    const pid_t owner_;
    const Nonce nonce_;
    const std::uint64_t identity_;
    std::unique_ptr<UcxContext> context_;
    Registry registry_;
    std::shared_ptr<EventQueue> events_;
    std::unique_ptr<Progress> progress_;
    std::atomic<std::int64_t> next_request_{1};
    std::mutex memory_mutex_;
    std::mutex close_mutex_;
    std::atomic<bool> closed_{false};
};

}  // namespace llmsys::comm
