#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "comm/paths.h"

namespace llmsys::comm {

// CLOCK_MONOTONIC, for what a user compares with his own clock.
std::int64_t monotonic_ns();

struct NotificationEvent {
    std::int64_t peer_id;
    std::uint64_t id;
    std::string payload;
};
struct EstablishedEvent {
    std::int64_t peer_id;
};
struct LostEvent {
    std::int64_t peer_id;
    std::string reason;
    bool left;
};
struct DoneEvent {
    std::int64_t request_id;
};
using Event = std::variant<NotificationEvent, EstablishedEvent, LostEvent, DoneEvent>;

// Unbounded, since what was acknowledged must not be dropped. Any thread.
class EventQueue {
  public:
    void push(Event event);
    // The oldest event; nothing after `timeout`, or when `wake` was called, which sets `woken`.
    std::optional<Event> pop(std::chrono::nanoseconds timeout, bool& woken);
    void wake();
    std::size_t size() const;
    std::size_t max_size() const;

  private:
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Event> events_;
    std::size_t max_size_ = 0;
    std::size_t num_wakes_ = 0;
};

enum class RequestKind : std::uint8_t { read, write, notify };
enum class ErrorKind : std::uint8_t { none, lost, transport, cancelled, closed };

// What the user holds of a batch or notification. Ends exactly once.
class Request {
  public:
    Request(std::int64_t id, std::int64_t peer_id, RequestKind kind, std::shared_ptr<EventQueue> events);

    const std::int64_t id;
    const std::int64_t peer_id;
    const RequestKind kind;
    // Set before the request is queued, constant from then on.
    std::int64_t num_entries = 0;
    std::int64_t num_segments = 0;
    std::int64_t size_bytes = 0;
    std::vector<Path> paths;
    const std::int64_t posted_ns;
    std::atomic<std::int64_t> started_ns{0};
    std::atomic<std::int64_t> finished_ns{0};

    bool done() const;
    bool wait(std::chrono::nanoseconds timeout) const;
    std::string error() const;
    ErrorKind error_kind() const;
    void watch();

    // By the engine only, once.
    void finish(ErrorKind kind, std::string error);

  private:
    const std::shared_ptr<EventQueue> events_;
    mutable std::mutex mutex_;
    mutable std::condition_variable finished_;
    bool done_ = false;
    bool watched_ = false;
    ErrorKind error_kind_ = ErrorKind::none;
    std::string error_;
};

}  // namespace llmsys::comm
