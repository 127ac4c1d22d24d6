#include "comm/request.h"

#include <algorithm>
#include <utility>

namespace llmsys::comm {

std::int64_t monotonic_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void EventQueue::push(Event event) {
    {
        const std::lock_guard lock(mutex_);
        events_.push_back(std::move(event));
        max_size_ = std::max(max_size_, events_.size());
    }
    changed_.notify_one();
}

std::optional<Event> EventQueue::pop(std::chrono::nanoseconds timeout, bool& woken) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline, [this] { return !events_.empty() || num_wakes_ > 0; });
    if (!events_.empty()) {
        Event event = std::move(events_.front());
        events_.pop_front();
        return event;
    }
    woken = num_wakes_ > 0;
    if (woken) --num_wakes_;
    return std::nullopt;
}

void EventQueue::wake() {
    {
        const std::lock_guard lock(mutex_);
        ++num_wakes_;
    }
    changed_.notify_one();
}

std::size_t EventQueue::size() const {
    const std::lock_guard lock(mutex_);
    return events_.size();
}

std::size_t EventQueue::max_size() const {
    const std::lock_guard lock(mutex_);
    return max_size_;
}

Request::Request(std::int64_t request_id, std::int64_t peer, RequestKind request_kind,
                 std::shared_ptr<EventQueue> events)
    : id(request_id), peer_id(peer), kind(request_kind), posted_ns(monotonic_ns()), events_(std::move(events)) {}

bool Request::done() const {
    const std::lock_guard lock(mutex_);
    return done_;
}

bool Request::wait(std::chrono::nanoseconds timeout) const {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    std::unique_lock lock(mutex_);
    return finished_.wait_until(lock, deadline, [this] { return done_; });
}

std::string Request::error() const {
    const std::lock_guard lock(mutex_);
    return error_;
}

ErrorKind Request::error_kind() const {
    const std::lock_guard lock(mutex_);
    return error_kind_;
}

void Request::watch() {
    bool already_done = false;
    {
        const std::lock_guard lock(mutex_);
        if (watched_) return;
        watched_ = true;
        already_done = done_;
    }
    if (already_done) events_->push(DoneEvent{id});
}

void Request::finish(ErrorKind why, std::string text) {
    bool watched = false;
    {
        const std::lock_guard lock(mutex_);
        finished_ns.store(monotonic_ns());
        error_kind_ = why;
        error_ = std::move(text);
        done_ = true;
        watched = watched_;
        // Under the lock: a waiter that wakes may drop the last reference to this object.
        finished_.notify_all();
    }
    if (watched) events_->push(DoneEvent{id});
}

}  // namespace llmsys::comm
