#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llmsys::comm {

// Threads that help the progress thread copy. They start at the first use and sleep while there is nothing to copy.
class CopyPool {
  public:
    explicit CopyPool(int num_threads) : num_threads_(num_threads) {}
    ~CopyPool() { stop(); }
    CopyPool(const CopyPool&) = delete;
    CopyPool& operator=(const CopyPool&) = delete;

    // The caller's thread included.
    int num_threads() const { return num_threads_; }
    // Calls part(0), ..., part(num_parts - 1) at the same time, part(0) here, and returns when all have. `part` must
    // not throw. num_parts <= num_threads. One caller at a time.
    void run(int num_parts, const std::function<void(int)>& part);
    // Ends the threads; `run` must not be called any more. Any number of times.
    void stop();

  private:
    void work(int index);

    const int num_threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable started_;
    std::condition_variable ended_;
    std::atomic<std::uint64_t> round_{0};  // changed with mutex_
    std::atomic<int> num_left_{0};         // changed with mutex_
    const std::function<void(int)>* part_ = nullptr;
    int num_parts_ = 0;
    bool stopping_ = false;
};

}  // namespace llmsys::comm
