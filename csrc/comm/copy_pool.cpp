#include "comm/copy_pool.h"

#include <pthread.h>

#include <chrono>

namespace llmsys::comm {

namespace {

// Slices follow each other within microseconds, and a sleeping thread takes tens of them to wake.
constexpr auto kSpin = std::chrono::microseconds(50);

template <typename Condition>
bool spin_until(const Condition& condition) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (!condition()) {
        if (std::chrono::steady_clock::now() >= deadline) return false;
        std::this_thread::yield();
    }
    return true;
}

}  // namespace

void CopyPool::stop() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        ++round_;
    }
    started_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

void CopyPool::run(int num_parts, const std::function<void(int)>& part) {
    if (num_parts <= 1) {
        part(0);
        return;
    }
    while (static_cast<int>(workers_.size()) < num_threads_ - 1) {
        const int index = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, index] { work(index); });
        pthread_setname_np(workers_.back().native_handle(), "llmsys-copy");
    }
    {
        const std::lock_guard lock(mutex_);
        part_ = &part;
        num_parts_ = num_parts;
        num_left_ = num_parts - 1;
        ++round_;
    }
    started_.notify_all();
    part(0);
    const auto all_ended = [this] { return num_left_ == 0; };
    spin_until(all_ended);
    std::unique_lock lock(mutex_);
    ended_.wait(lock, all_ended);
}

void CopyPool::work(int index) {
    std::uint64_t seen = 0;
    while (true) {
        spin_until([&] { return round_ != seen; });
        std::unique_lock lock(mutex_);
        started_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (stopping_) return;
        // A round is not over before its parts are, so this thread cannot have missed one that had a part for it.
        if (index >= num_parts_) continue;
        const std::function<void(int)>& part = *part_;
        lock.unlock();
        part(index);
        lock.lock();
        if (--num_left_ == 0) ended_.notify_all();
    }
}

}  // namespace llmsys::comm
