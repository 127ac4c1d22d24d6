#include "comm/engine.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <stdexcept>

#include "comm/huge_pages.h"
#include "common/check.h"

namespace llmsys::comm {

namespace {

constexpr auto kCloseDeadline = std::chrono::seconds(30);
constexpr auto kRemoveDeadline = std::chrono::seconds(60);

template <typename Value>
Value random_value() {
    Value value{};
    if (getrandom(&value, sizeof(value), 0) != static_cast<ssize_t>(sizeof(value))) {
        throw std::runtime_error("getrandom gave too few bytes");
    }
    return value;
}

EngineOptions checked(const EngineOptions& options) {
    LLMSYS_CHECK(options.heartbeat_ns >= 1'000'000,
                 "heartbeat_s must be at least 0.001, got " << 1e-9 * static_cast<double>(options.heartbeat_ns));
    LLMSYS_CHECK(options.lease_ns >= 2 * options.heartbeat_ns, "lease_s must be at least twice heartbeat_s, got "
                                                                   << 1e-9 * static_cast<double>(options.lease_ns)
                                                                   << " and "
                                                                   << 1e-9 * static_cast<double>(options.heartbeat_ns));
    LLMSYS_CHECK(options.max_message_bytes >= 1,
                 "max_message_bytes must be positive, got " << options.max_message_bytes);
    LLMSYS_CHECK(options.slice_bytes >= 4096 && options.slice_bytes <= (1 << 30),
                 "slice_bytes must be between 4096 and 1073741824, got " << options.slice_bytes);
    LLMSYS_CHECK(options.window >= 1, "window must be positive, got " << options.window);
    LLMSYS_CHECK(options.num_copy_threads >= 1 && options.num_copy_threads <= 64,
                 "num_copy_threads must be between 1 and 64, got " << options.num_copy_threads);
    return options;
}

}  // namespace

Engine::Engine(const std::string& library_path, const std::map<std::string, std::string>& ucx_options,
               EngineOptions options)
    : options_(checked(options)),
      owner_(getpid()),
      nonce_(random_value<Nonce>()),
      identity_(random_value<std::uint64_t>()),
      context_(std::make_unique<UcxContext>(std::make_shared<UcxLibrary>(library_path), ucx_options)),
      events_(std::make_shared<EventQueue>()),
      progress_(std::make_unique<Progress>(*context_, options_, registry_, events_)) {}

Engine::~Engine() {
    // A forked child has the object and not the thread: it leaves everything to its parent.
    if (getpid() != owner_) {
        static_cast<void>(progress_.release());
        static_cast<void>(context_.release());
        return;
    }
    try {
        close();
    } catch (const std::exception&) {
        // The thread did not end and still uses both.
        static_cast<void>(progress_.release());
        static_cast<void>(context_.release());
    }
}

void Engine::check_open() const {
    if (closed_.load()) throw std::runtime_error("the engine is closed");
    if (getpid() != owner_) {
        throw std::runtime_error("the engine belongs to process " + std::to_string(owner_) +
                                 ", of which this one was forked: make one here");
    }
}

std::string Engine::worker_address() const { return pack(WorkerAddress{identity_, context_->address()}, version()); }

WorkerAddress Engine::read_worker_address(const std::string& bytes) const {
    return unpack_worker_address(bytes, version());
}

Probe Engine::probe() const { return {owner_, reinterpret_cast<std::uint64_t>(nonce_.data()), nonce_}; }

void Engine::with_context(const std::function<void()>& command) {
    check_open();
    if (!context_->thread_safe()) {
        progress_->call(command);
        return;
    }
    const std::lock_guard lock(memory_mutex_);
    check_open();
    command();
}

std::int64_t Engine::map_memory(ucp_mem_map_params_t params, bool cuda) {
    const UcxLibrary& ucx = context_->library();
    auto region = std::make_shared<Region>();
    params.field_mask |= UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
    params.memory_type = cuda ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
    std::int64_t id = 0;
    with_context([&] {
        ucx.check(ucx.ucp_mem_map(context_->context(), &params, &region->handle),
                  "registering " + std::to_string(params.length) + " bytes");
        ucp_mem_attr_t attributes{};
        attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
        const ucs_status_t status = ucx.ucp_mem_query(region->handle, &attributes);
        if (status != UCS_OK) {
            ucx.ucp_mem_unmap(context_->context(), region->handle);
            ucx.check(status, "asking UCX for an address");
        }
        const bool given = params.field_mask & UCP_MEM_MAP_PARAM_FIELD_ADDRESS;
        region->address = reinterpret_cast<std::uint64_t>(given ? params.address : attributes.address);
        region->size_bytes = params.length;
        region->cuda = cuda;
        id = registry_.add(region);
    });
    return id;
}

std::int64_t Engine::register_memory(std::uint64_t address, std::uint64_t size_bytes, bool cuda) {
    LLMSYS_CHECK(address != 0, "address must not be 0");
    LLMSYS_CHECK(
        size_bytes > 0 && size_bytes <= (~std::uint64_t{0} >> 1) - address,
        "size_bytes must be positive and end within the address space, got " << size_bytes << " at " << address);
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS;
    params.address = reinterpret_cast<void*>(address);
    params.length = size_bytes;
    if (options_.huge_pages && !cuda) ask_for_huge_pages(address, size_bytes);
    return map_memory(params, cuda);
}

std::pair<std::int64_t, std::uint64_t> Engine::allocate(std::uint64_t size_bytes) {
    LLMSYS_CHECK(size_bytes > 0 && size_bytes <= (std::uint64_t{1} << 46),
                 "size_bytes must be positive and below 64 TiB, got " << size_bytes);
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_FLAGS;
    params.flags = UCP_MEM_MAP_ALLOCATE;
    params.length = size_bytes;
    const std::int64_t id = map_memory(params, false);
    const std::uint64_t address = registry_.region(id)->address;
    // Not all of UCX's allocators give zeros. The lock keeps `close` from taking the memory away meanwhile.
    const std::lock_guard lock(memory_mutex_);
    check_open();
    std::memset(reinterpret_cast<void*>(address), 0, size_bytes);
    return {id, address};
}

std::string Engine::remote_key(std::int64_t region_id) {
    const UcxLibrary& ucx = context_->library();
    RemoteKey key;
    with_context([&] {
        const Pin<Region> region = registry_.pin_region(region_id);
        void* buffer = nullptr;
        std::size_t size = 0;
        ucx.check(ucx.ucp_rkey_pack(context_->context(), region->handle, &buffer, &size),
                  "making a remote key of region " + std::to_string(region_id));
        key.ucx_key.assign(static_cast<const char*>(buffer), size);
        ucx.ucp_rkey_buffer_release(buffer);
        key.engine = identity_;
        key.address = region->address;
        key.size_bytes = region->size_bytes;
        key.cuda = region->cuda;
    });
    return pack(key, version());
}

void Engine::unmap(ucp_mem_h handle) {
    const UcxLibrary& ucx = context_->library();
    ucx.check(ucx.ucp_mem_unmap(context_->context(), handle), "releasing a region");
}

void Engine::release(std::int64_t region_id) {
    with_context([&] { unmap(registry_.take_region(region_id)->handle); });
}

std::int64_t Engine::add_peer(ControlSocket socket, PeerArguments arguments) {
    check_open();
    LLMSYS_CHECK(arguments.peer_lease_ns >= 2 * options_.heartbeat_ns,
                 "peer_lease_s of peer '" << arguments.name << "' must be at least twice heartbeat_s, got "
                                          << 1e-9 * static_cast<double>(arguments.peer_lease_ns) << " and "
                                          << 1e-9 * static_cast<double>(options_.heartbeat_ns));
    const std::int64_t id = registry_.add_peer(arguments.name);
    try {
        progress_->call([&] { progress_->add_peer(id, std::move(arguments), std::move(socket)); });
    } catch (...) {
        registry_.remove_peer(id);
        throw;
    }
    return id;
}

void Engine::remove_peer(std::int64_t peer_id) {
    check_open();
    struct Waiter {
        std::mutex mutex;
        std::condition_variable changed;
        bool gone = false;
    };
    auto waiter = std::make_shared<Waiter>();
    const std::string name = registry_.peer_name(peer_id);
    progress_->call([&] {
        progress_->remove_peer(peer_id, [waiter] {
            const std::lock_guard lock(waiter->mutex);
            waiter->gone = true;
            waiter->changed.notify_all();
        });
    });
    registry_.remove_peer(peer_id);
    std::unique_lock lock(waiter->mutex);
    const auto deadline = std::chrono::steady_clock::now() + kRemoveDeadline;
    if (!waiter->changed.wait_until(lock, deadline, [&] { return waiter->gone; })) {
        throw std::runtime_error("UCX did not give up its operations with peer '" + name + "' within 60 s");
    }
}

PeerReport Engine::report(std::int64_t peer_id) {
    check_open();
    PeerReport report;
    progress_->call([&] { report = progress_->report(peer_id); });
    return report;
}

std::int64_t Engine::import_remote(std::int64_t peer_id, const std::string& bytes, std::uint64_t address,
                                   std::uint64_t size_bytes, bool cuda) {
    check_open();
    const RemoteKey key = unpack_remote_key(bytes, version());
    LLMSYS_CHECK(size_bytes > 0, "size_bytes must be positive");
    LLMSYS_CHECK(address >= key.address && address - key.address <= key.size_bytes &&
                     size_bytes <= key.size_bytes - (address - key.address),
                 size_bytes << " bytes at address " << address << " are not inside the region of the key, "
                            << key.size_bytes << " bytes at address " << key.address);
    LLMSYS_CHECK(cuda == key.cuda, "device is " << (cuda ? "cuda" : "cpu") << ", the key is of memory on "
                                                << (key.cuda ? "cuda" : "cpu"));
    std::int64_t id = 0;
    progress_->call([&] { id = registry_.add(progress_->import_remote(peer_id, key, address, size_bytes)); });
    return id;
}

Path Engine::remote_path(std::int64_t remote_id) const { return registry_.remote(remote_id)->path; }

void Engine::drop_remote(std::int64_t remote_id) {
    check_open();
    progress_->call([&] { progress_->destroy_remote(registry_.take_remote(remote_id)); });
}

std::shared_ptr<Request> Engine::post(std::int64_t peer_id, const BatchArguments& arguments) {
    check_open();
    static_cast<void>(registry_.peer_name(peer_id));
    auto transaction = std::make_unique<Transaction>();
    transaction->request = std::make_shared<Request>(next_request_++, peer_id,
                                                     arguments.write ? RequestKind::write : RequestKind::read, events_);
    fill_batch(*transaction, arguments, registry_);
    std::shared_ptr<Request> request = transaction->request;
    progress_->submit(std::move(transaction));
    return request;
}

std::shared_ptr<Request> Engine::notify(std::int64_t peer_id, std::string payload) {
    check_open();
    static_cast<void>(registry_.peer_name(peer_id));
    LLMSYS_CHECK(payload.size() <= static_cast<std::size_t>(options_.max_message_bytes),
                 "a notification has at most max_message_bytes=" << options_.max_message_bytes << " bytes, got "
                                                                 << payload.size());
    auto transaction = std::make_unique<Transaction>();
    transaction->request = std::make_shared<Request>(next_request_++, peer_id, RequestKind::notify, events_);
    transaction->request->size_bytes = static_cast<std::int64_t>(payload.size());
    transaction->payload = std::move(payload);
    std::shared_ptr<Request> request = transaction->request;
    progress_->submit(std::move(transaction));
    return request;
}

void Engine::close() {
    if (getpid() != owner_) return;
    const std::lock_guard closing(close_mutex_);
    if (closed_.load()) return;
    if (!progress_->close(kCloseDeadline)) {
        throw std::runtime_error("the progress thread did not end within 30 s; its memory is not given back");
    }
    const std::lock_guard memory(memory_mutex_);
    closed_.store(true);
    for (const auto& [id, region] : registry_.take_all_regions()) {
        context_->library().ucp_mem_unmap(context_->context(), region->handle);
    }
    context_->shut_down();
    events_->wake();
}

}  // namespace llmsys::comm
