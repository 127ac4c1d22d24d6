#include "comm/progress.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "common/check.h"

namespace llmsys::comm {

namespace {

constexpr std::uint64_t kWakeupTag = 0;  // peers have ids from 1
constexpr std::uint64_t kUcxTag = ~std::uint64_t{0};
constexpr unsigned kAmId = 1;
constexpr int kMaxProgressCalls = 64;
constexpr auto kCallDeadline = std::chrono::seconds(60);

void add_to_epoll(int epoll, int fd, std::uint64_t tag) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = tag;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) {
        throw std::runtime_error(std::string("epoll_ctl: ") + strerror(errno));
    }
}

// One command and whoever waits for it. The lock is held while the command runs, so that a caller who gives up does so
// before it or after it: a command may use the caller's variables.
struct Call {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    bool abandoned = false;
    bool invalid = false;
    std::string error;
};

}  // namespace

Descriptor::Descriptor(int fd) : fd_(fd) {
    if (fd < 0) throw std::runtime_error(std::string("no file descriptor: ") + strerror(errno));
}

Descriptor::~Descriptor() { close(); }

void Descriptor::close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

Progress::Progress(UcxContext& context, EngineOptions options, Registry& registry, std::shared_ptr<EventQueue> events)
    : context_(context),
      ucx_(context.library()),
      options_(options),
      registry_(registry),
      events_(std::move(events)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wakeup_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      copies_(static_cast<int>(options.num_copy_threads), options.slice_bytes) {
    add_to_epoll(epoll_.get(), wakeup_.get(), kWakeupTag);
    add_to_epoll(epoll_.get(), context_.event_fd(), kUcxTag);
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                         UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = kAmId;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG;
    handler.cb = &Progress::on_message;
    handler.arg = this;
    ucx_.check(ucx_.ucp_worker_set_am_recv_handler(context_.worker(), &handler), "setting the message handler");
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "llmsys-comm");
}

Progress::~Progress() {
    if (thread_.joinable()) thread_.detach();
}

bool Progress::push(Item item) {
    {
        const std::lock_guard lock(queue_mutex_);
        if (!accepting_) return false;
        items_.push_back(std::move(item));
    }
    wake();
    return true;
}

void Progress::wake() {
    if (asleep_.exchange(false)) {
        const std::uint64_t one = 1;
        // Fails only when the counter is full, and then the thread wakes anyway.
        [[maybe_unused]] const ssize_t written = write(wakeup_.get(), &one, sizeof(one));
    }
}

void Progress::call(const std::function<void()>& command) {
    auto call = std::make_shared<Call>();
    const bool accepted = push({[call, command] {
                                    const std::lock_guard lock(call->mutex);
                                    if (call->abandoned) return;
                                    try {
                                        command();
                                    } catch (const std::invalid_argument& error) {
                                        call->invalid = true;
                                        call->error = error.what();
                                    } catch (const std::exception& error) {
                                        call->error = error.what();
                                    }
                                    call->done = true;
                                    call->changed.notify_all();
                                },
                                nullptr});
    if (!accepted) throw std::runtime_error("the engine is closed");
    std::unique_lock lock(call->mutex);
    const auto deadline = std::chrono::steady_clock::now() + kCallDeadline;
    if (!call->changed.wait_until(lock, deadline, [&] { return call->done; })) {
        call->abandoned = true;
        throw std::runtime_error("the progress thread did not answer within 60 s");
    }
    if (call->invalid) throw std::invalid_argument(call->error);
    if (!call->error.empty()) throw UcxError(call->error);
}

void Progress::submit(std::unique_ptr<Transaction> transaction) {
    const std::shared_ptr<Request> request = transaction->request;
    if (!push({nullptr, std::move(transaction)})) {
        request->finish(ErrorKind::closed, "the engine is closed");
    }
}

bool Progress::close(std::chrono::nanoseconds timeout) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    {
        const std::lock_guard lock(queue_mutex_);
        if (accepting_) {
            items_.push_back({[this] {
                                  closing_ = true;
                                  for (const std::int64_t id : turn_) {
                                      begin_ending(peer(id), Ending::closing, "the engine was closed");
                                  }
                              },
                              nullptr});
        }
        // At once, so that nothing is left behind in the queue.
        accepting_ = false;
    }
    wake();
    std::unique_lock lock(join_mutex_);
    if (!joinable_.wait_until(lock, deadline, [this] { return finished_; })) return false;
    if (thread_.joinable()) thread_.join();
    copies_.stop();
    // Nothing wakes a thread that takes no more items.
    epoll_.close();
    wakeup_.close();
    return true;
}

double Progress::cpu_seconds() {
    const std::lock_guard lock(join_mutex_);
    clockid_t clock{};
    timespec used{};
    if (finished_ || pthread_getcpuclockid(thread_.native_handle(), &clock) != 0) return cpu_seconds_at_end_;
    clock_gettime(clock, &used);
    return static_cast<double>(used.tv_sec) + 1e-9 * static_cast<double>(used.tv_nsec);
}

void Progress::run() noexcept {
    while (true) {
        bool busy = run_items();
        busy |= progress_ucx();
        busy |= visit_peers();
        if (closing_ && turn_.empty()) break;
        if (busy || options_.spin) {
            poll(0);
        } else {
            sleep();
        }
    }
    timespec used{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    const std::lock_guard lock(join_mutex_);
    cpu_seconds_at_end_ = static_cast<double>(used.tv_sec) + 1e-9 * static_cast<double>(used.tv_nsec);
    finished_ = true;
    joinable_.notify_all();
}

bool Progress::run_items() {
    std::vector<Item> items;
    {
        const std::lock_guard lock(queue_mutex_);
        items.swap(items_);
    }
    for (Item& item : items) {
        if (item.command) {
            item.command();
        } else {
            enqueue(std::move(item.transaction));
        }
    }
    return !items.empty();
}

void Progress::enqueue(std::unique_ptr<Transaction> transaction) {
    const auto found = peers_.find(transaction->request->peer_id);
    if (closing_) {
        transaction->finish(ErrorKind::closed, "the engine was closed");
    } else if (found == peers_.end()) {
        transaction->finish(ErrorKind::cancelled, "its peer was removed");
    } else if (found->second->gone) {
        fail_transaction(*found->second, std::move(transaction));
    } else {
        found->second->queue.push_back(std::move(transaction));
    }
}

bool Progress::progress_ucx() {
    int calls = 0;
    while (calls < kMaxProgressCalls && ucx_.ucp_worker_progress(context_.worker()) != 0) ++calls;
    return calls > 0;
}

bool Progress::visit_peers() {
    const std::int64_t now = boottime_ns();
    if (now >= next_heartbeat_ns_) {
        send_heartbeats();
        next_heartbeat_ns_ = now + options_.heartbeat_ns;
    }
    const bool check = now >= next_check_ns_;
    if (check) next_check_ns_ = now + options_.heartbeat_ns;
    bool busy = false;
    for (const std::int64_t id : turn_) {
        Peer& visited = peer(id);
        if (check || visited.ending != Ending::none || !visited.endpoint_error.empty()) check_peer(visited, now);
        if (visited.ending != Ending::none) continue;
        busy |= advance(visited);
        if (visited.last_delivered > visited.last_acknowledged && !visited.acknowledging) {
            send_acknowledgement(visited);
            busy = true;
        }
    }
    std::erase_if(turn_, [this](std::int64_t id) {
        const Peer& visited = peer(id);
        if (!visited.gone) return false;
        if (visited.forget) peers_.erase(id);
        return true;
    });
    return busy;
}

int Progress::sleep_ms() const {
    const std::int64_t left = std::min(next_heartbeat_ns_, next_check_ns_) - boottime_ns();
    return static_cast<int>(std::clamp<std::int64_t>(left / 1'000'000 + 1, 0, 60'000));
}

void Progress::sleep() {
    asleep_.store(true);
    bool waiting = false;
    {
        const std::lock_guard lock(queue_mutex_);
        waiting = !items_.empty();
    }
    // Busy means that something arrived since the last look at it.
    if (!waiting && ucx_.ucp_worker_arm(context_.worker()) == UCS_OK) {
        poll(sleep_ms());
        counters_.num_wakeups.fetch_add(1, std::memory_order_relaxed);
    }
    asleep_.store(false);
}

bool Progress::poll(int timeout_ms) {
    epoll_event events[64];
    const int count = epoll_wait(epoll_.get(), events, 64, timeout_ms);
    for (int i = 0; i < count; ++i) {
        if (events[i].data.u64 == kWakeupTag) {
            std::uint64_t ignored = 0;
            [[maybe_unused]] const ssize_t got = read(wakeup_.get(), &ignored, sizeof(ignored));
        } else if (events[i].data.u64 != kUcxTag) {
            const auto found = peers_.find(static_cast<std::int64_t>(events[i].data.u64));
            if (found == peers_.end() || found->second->ending != Ending::none) continue;
            if (events[i].events & EPOLLOUT) found->second->socket.flush();
            read_socket(*found->second);
            watch(*found->second);
        }
    }
    return count > 0;
}

// A socket with nothing to send is always writable: asks for that only while something waits.
void Progress::watch(Peer& watched) {
    const bool writable = watched.socket.wants_to_write();
    if (watched.ending != Ending::none || writable == watched.watches_writable) return;
    epoll_event event{};
    event.events = EPOLLIN;
    if (writable) event.events |= EPOLLOUT;
    event.data.u64 = static_cast<std::uint64_t>(watched.id);
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, watched.socket.fd(), &event);
    watched.watches_writable = writable;
}

}  // namespace llmsys::comm
