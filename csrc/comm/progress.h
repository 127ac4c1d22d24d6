#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "comm/batch.h"
#include "comm/copy_slice.h"
#include "comm/memory.h"
#include "comm/peer.h"
#include "comm/request.h"
#include "comm/ucx_library.h"

namespace llmsys::comm {

struct EngineOptions {
    bool spin = false;
    std::int64_t heartbeat_ns = 1'000'000'000;
    std::int64_t lease_ns = 10'000'000'000;
    bool shm = true;
    bool cma = true;
    std::int64_t max_message_bytes = 1 << 20;
    std::int64_t slice_bytes = 4 << 20;
    std::int64_t window = 256;
    std::int64_t num_copy_threads = 1;
    bool huge_pages = true;
    std::int64_t test_slice_delay_us = 0;
};

// Counted by the progress thread, read by any.
struct Counters {
    std::atomic<std::int64_t> num_wakeups{0}, num_batches{0}, num_segments{0}, num_operations{0};
    std::atomic<std::int64_t> num_notifications_sent{0}, num_notifications_received{0}, num_dropped_messages{0};
    std::atomic<std::int64_t> path_bytes[3]{};
};

struct PeerReport {
    std::string name, state, reason;
    bool cma = false;
    std::vector<std::string> transports;
    double silent_s = 0.0;
    double lease_left_s = 0.0;
    std::int64_t num_queued = 0;
    std::int64_t num_outstanding = 0;
};

// An epoll set and an event descriptor, closed with their owner.
class Descriptor {
  public:
    explicit Descriptor(int fd);  // throws std::runtime_error with errno's text if negative
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return fd_; }
    void close();

  private:
    int fd_;
};

// The progress thread: it alone uses the UCX worker, the control sockets and the peers. It sleeps while there is
// nothing to do. Commands and transactions come from other threads through a queue; results go to requests and events.
class Progress {
  public:
    Progress(UcxContext& ucx, EngineOptions options, Registry& registry, std::shared_ptr<EventQueue> events);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    // Runs `command` in the progress thread and returns after it, or throws what it threw. Any other thread.
    void call(const std::function<void()>& command);
    // Ends the transaction as closed where the thread takes no more.
    void submit(std::unique_ptr<Transaction> transaction);
    // Ends all requests and connections, then the thread. False where that took longer. Any number of times.
    bool close(std::chrono::nanoseconds timeout);

    Counters& counters() { return counters_; }
    double cpu_seconds();

    // The rest is for commands, in the progress thread.
    void add_peer(std::int64_t id, PeerArguments arguments, ControlSocket socket);
    // `then` runs when the peer is gone.
    void remove_peer(std::int64_t id, std::function<void()> then);
    PeerReport report(std::int64_t id);
    std::shared_ptr<Remote> import_remote(std::int64_t peer_id, const RemoteKey& key, std::uint64_t address,
                                          std::uint64_t size_bytes);
    void destroy_remote(const std::shared_ptr<Remote>& remote);

  private:
    struct Message;
    struct Item {  // one of the two
        std::function<void()> command;
        std::unique_ptr<Transaction> transaction;
    };

    // progress.cpp: the loop.
    void run() noexcept;
    bool run_items();
    bool progress_ucx();
    bool visit_peers();
    bool poll(int timeout_ms);
    void sleep();
    bool push(Item item);
    void wake();
    int sleep_ms() const;
    void watch(Peer& peer);
    void enqueue(std::unique_ptr<Transaction> transaction);

    // progress_peers.cpp: life and death of connections.
    void create_endpoints(Peer& peer, std::uint64_t num_made_by_peer);
    ucp_ep_h create_endpoint(Peer& peer, bool used);
    void read_socket(Peer& peer);
    void handle_frame(Peer& peer, const Frame& frame);
    void send_frame(Peer& peer, FrameKind kind, std::uint64_t sequence);
    void send_heartbeats();
    void check_peer(Peer& peer, std::int64_t now_ns);
    void check_stall(Peer& peer, std::int64_t now_ns);
    void give_up(Peer& peer, const std::string& reason);
    void begin_ending(Peer& peer, Ending ending, const std::string& reason);
    void close_endpoints(Peer& peer);
    void complete_ending(Peer& peer);
    void fail_transaction(Peer& peer, std::unique_ptr<Transaction> transaction);
    Peer& peer(std::int64_t id);
    static void on_endpoint_error(void* argument, ucp_ep_h endpoint, ucs_status_t status) noexcept;

    // progress_batches.cpp: reads and writes.
    bool advance(Peer& peer);
    bool advance_batch(Peer& peer);
    void run_slice(Peer& peer, Transaction& batch);
    std::int64_t move_piece(Peer& peer, const BatchGroup& group, const Segment& piece, bool write,
                            std::int64_t& ucx_budget);
    void run_copies(Peer& peer, bool write);
    bool post_operation(Peer& peer, const BatchGroup& group, const Segment& piece, bool write);
    void flush(Peer& peer);
    void finish_batch(Peer& peer);
    static std::string describe(const Peer& peer, const Transaction& transaction);
    static void on_operation(void* request, ucs_status_t status, void* peer) noexcept;
    static void on_flush(void* request, ucs_status_t status, void* peer) noexcept;

    // progress_messages.cpp: notifications.
    void send_notification(Peer& peer, std::unique_ptr<Transaction> transaction);
    void send_acknowledgement(Peer& peer);
    void send_message(std::unique_ptr<Message> message);
    void acknowledged(Peer& peer, std::uint64_t id);
    void receive(Peer& peer, const MessageHeader& header, std::string payload);
    void deliver_in_order(Peer& peer);
    static void on_sent(void* request, ucs_status_t status, void* message) noexcept;
    static ucs_status_t on_message(void* progress, const void* header, std::size_t header_bytes, void* data,
                                   std::size_t size_bytes, const ucp_am_recv_param_t* param) noexcept;

    UcxContext& context_;
    const UcxLibrary& ucx_;
    const EngineOptions options_;
    Registry& registry_;
    const std::shared_ptr<EventQueue> events_;
    Counters counters_;

    Descriptor epoll_;
    Descriptor wakeup_;
    std::mutex queue_mutex_;
    std::vector<Item> items_;
    bool accepting_ = true;  // with queue_mutex_
    std::atomic<bool> asleep_{false};

    std::unordered_map<std::int64_t, std::unique_ptr<Peer>> peers_;
    std::unordered_map<std::uint64_t, Peer*> by_token_;
    std::unordered_map<std::uint64_t, std::uint64_t> num_endpoints_made_;  // by the engine they lead to
    std::vector<std::int64_t> turn_;  // ids of living peers, in the order of their turns
    std::int64_t next_heartbeat_ns_ = 0;
    std::int64_t next_check_ns_ = 0;
    std::vector<Frame> frames_;
    CopySlice copies_;
    bool closing_ = false;

    std::mutex join_mutex_;
    std::condition_variable joinable_;
    bool finished_ = false;  // with join_mutex_
    double cpu_seconds_at_end_ = 0.0;
    std::thread thread_;
};

}  // namespace llmsys::comm
