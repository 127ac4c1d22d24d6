#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "bindings/bind.h"
#include "comm/coalesce.h"
#include "common/check.h"

#if LLMSYS_ENGINE
#include "comm/engine.h"
#endif

namespace nb = nanobind;

namespace {

using namespace llmsys::comm;

using Integers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::object to_numpy(const std::vector<Segment>& segments, std::int64_t Segment::* member) {
    auto* owned = new std::vector<std::int64_t>(segments.size());
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<std::int64_t>*>(p); });
    for (std::size_t i = 0; i < segments.size(); ++i) (*owned)[i] = segments[i].*member;
    const std::size_t size = owned->size();
    return nb::cast(nb::ndarray<nb::numpy, std::int64_t>(owned->data(), 1, &size, owner));
}

void check_same_size(const Integers& local, const Integers& remote, const Integers& lengths) {
    LLMSYS_CHECK(local.size() == remote.size() && local.size() == lengths.size(),
                 "local_offsets, remote_offsets and lengths must have one entry each, got "
                     << local.size() << ", " << remote.size() << " and " << lengths.size());
}

nb::tuple coalesce(const Integers& local, const Integers& remote, const Integers& lengths, bool write) {
    check_same_size(local, remote, lengths);
    constexpr std::int64_t kMax = std::int64_t{1} << 62;
    for (std::size_t i = 0; i < local.size(); ++i) {
        const std::int64_t values[] = {local.data()[i], remote.data()[i], lengths.data()[i]};
        LLMSYS_CHECK(*std::min_element(values, values + 3) >= 0 && *std::max_element(values, values + 3) < kMax,
                     "entry " << i << " is out of bounds: local offset " << values[0] << ", remote offset " << values[1]
                              << ", length " << values[2]);
    }
    const Entries entries{local.data(), remote.data(), lengths.data(), 0, static_cast<std::int64_t>(local.size())};
    Segments found;
    {
        nb::gil_scoped_release release;
        found = make_segments(entries, write, true);
    }
    return nb::make_tuple(to_numpy(found.items, &Segment::local), to_numpy(found.items, &Segment::remote),
                          to_numpy(found.items, &Segment::length));
}

#if LLMSYS_ENGINE

using IntegerMatrix = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PythonProbe = std::tuple<std::int64_t, std::uint64_t, nb::bytes>;

constexpr const char* kRequestKinds[] = {"read", "write", "notify"};
constexpr const char* kErrorKinds[] = {"", "lost", "transport", "cancelled", "closed"};

std::string to_string(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }
nb::bytes to_bytes(const std::string& text) { return nb::bytes(text.data(), text.size()); }

std::int64_t nanoseconds(double seconds, const char* name) {
    LLMSYS_CHECK(std::isfinite(seconds) && seconds >= 0 && seconds <= 1e9,
                 name << " must be between 0 and 1e9 seconds, got " << seconds);
    return std::llround(seconds * 1e9);
}

bool is_cuda(const std::string& device) {
    LLMSYS_CHECK(device == "cpu" || device == "cuda", "device must be cpu or cuda, got " << device);
    return device == "cuda";
}

// Calls `wait(nanoseconds)` without Python's lock until it says true or the time is over, and lets Ctrl-C in.
template <typename Wait>
bool wait_interruptibly(double timeout_s, Wait wait) {
    constexpr std::int64_t kStepNs = 100'000'000;
    const std::int64_t deadline = monotonic_ns() + nanoseconds(timeout_s, "timeout_s");
    while (true) {
        const std::int64_t left = std::max<std::int64_t>(deadline - monotonic_ns(), 0);
        bool found = false;
        {
            nb::gil_scoped_release release;
            found = wait(std::chrono::nanoseconds(std::min(left, kStepNs)));
        }
        if (found || left <= kStepNs) return found;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
}

nb::object event_to_python(Event&& event) {
    if (auto* item = std::get_if<NotificationEvent>(&event)) {
        return nb::make_tuple("notification", item->peer_id, item->id, to_bytes(item->payload));
    }
    if (auto* item = std::get_if<EstablishedEvent>(&event)) return nb::make_tuple("established", item->peer_id);
    if (auto* item = std::get_if<LostEvent>(&event)) {
        return nb::make_tuple("lost", item->peer_id, item->reason, item->left);
    }
    return nb::make_tuple("done", std::get<DoneEvent>(event).request_id);
}

nb::object next_event(Engine& engine, double timeout_s) {
    std::optional<Event> event;
    // Woken up without an event is an answer too.
    wait_interruptibly(timeout_s, [&](std::chrono::nanoseconds step) {
        bool woken = false;
        event = engine.events().pop(step, woken);
        return event.has_value() || woken;
    });
    return event ? event_to_python(std::move(*event)) : nb::none();
}

// An engine that is still open when the interpreter ends: its thread must not outlive what it uses. Python runs these
// before anything is torn down.
void close_at_exit(nb::handle engine) {
    nb::object reference = nb::module_::import_("weakref").attr("ref")(engine);
    nb::module_::import_("atexit").attr("register")(nb::cpp_function([reference] {
        nb::object alive = reference();
        if (!alive.is_none()) alive.attr("close")();
    }));
}

void make_engine(nb::pointer_and_handle<Engine> self, const std::string& library_path,
                 const std::map<std::string, std::string>& ucx_config, bool spin, double heartbeat_s, double lease_s,
                 bool shm, bool cma, std::int64_t max_message_bytes, std::int64_t slice_bytes, std::int64_t window,
                 std::int64_t num_copy_threads, bool huge_pages, std::int64_t test_slice_delay_us) {
    EngineOptions options;
    options.spin = spin;
    options.heartbeat_ns = nanoseconds(heartbeat_s, "heartbeat_s");
    options.lease_ns = nanoseconds(lease_s, "lease_s");
    options.shm = shm;
    options.cma = cma;
    options.max_message_bytes = max_message_bytes;
    options.slice_bytes = slice_bytes;
    options.window = window;
    options.num_copy_threads = num_copy_threads;
    options.huge_pages = huge_pages;
    options.test_slice_delay_us = test_slice_delay_us;
    {
        nb::gil_scoped_release release;
        new (self.p) Engine(library_path, ucx_config, options);
    }
    close_at_exit(self.h);
}

nb::dict info(const Engine& engine) {
    nb::dict result;
    result["library"] = engine.ucx().library().path();
    result["version"] = engine.ucx().library().version();
    result["transports"] = nb::cast(engine.ucx().transports());
    result["tls"] = engine.ucx().tls();
    result["thread_safe"] = engine.ucx().thread_safe();
    return result;
}

std::int64_t add_peer(Engine& engine, std::string name, int fd, const nb::bytes& worker_address, std::uint64_t token_in,
                      std::uint64_t token_out, double peer_lease_s, std::optional<PythonProbe> probe) {
    ControlSocket socket(fd);
    PeerArguments arguments;
    arguments.name = std::move(name);
    arguments.address = engine.read_worker_address(to_string(worker_address));
    arguments.token_in = token_in;
    arguments.token_out = token_out;
    arguments.peer_lease_ns = nanoseconds(peer_lease_s, "peer_lease_s");
    if (probe) {
        const auto& [pid, address, nonce] = *probe;
        Probe& made = arguments.probe.emplace();
        LLMSYS_CHECK(nonce.size() == made.nonce.size(),
                     "a probe has " << made.nonce.size() << " random bytes, got " << nonce.size());
        LLMSYS_CHECK(pid > 0 && pid <= std::numeric_limits<pid_t>::max(), "pid must be positive, got " << pid);
        made.pid = static_cast<pid_t>(pid);
        made.address = address;
        std::memcpy(made.nonce.data(), nonce.c_str(), nonce.size());
    }
    nb::gil_scoped_release release;
    return engine.add_peer(std::move(socket), std::move(arguments));
}

nb::dict peer_state(Engine& engine, std::int64_t peer_id) {
    PeerReport report;
    {
        nb::gil_scoped_release release;
        report = engine.report(peer_id);
    }
    nb::dict result;
    result["name"] = report.name;
    result["state"] = report.state;
    result["reason"] = report.reason;
    result["cma"] = report.cma;
    result["transports"] = nb::cast(report.transports);
    result["silent_s"] = report.silent_s;
    result["lease_left_s"] = report.lease_left_s;
    result["num_queued"] = report.num_queued;
    result["num_outstanding"] = report.num_outstanding;
    return result;
}

nb::dict stats(Engine& engine) {
    const Counters& counters = engine.counters();
    const Registry::Counts counts = engine.registry_counts();
    nb::dict result;
    result["progress_cpu_s"] = engine.progress_cpu_seconds();
    result["num_wakeups"] = counters.num_wakeups.load();
    result["num_batches"] = counters.num_batches.load();
    result["num_segments"] = counters.num_segments.load();
    result["num_operations"] = counters.num_operations.load();
    result["num_notifications_sent"] = counters.num_notifications_sent.load();
    result["num_notifications_received"] = counters.num_notifications_received.load();
    result["num_dropped_messages"] = counters.num_dropped_messages.load();
    result["num_queued_events"] = engine.events().size();
    result["max_queued_events"] = engine.events().max_size();
    result["num_regions"] = counts.num_regions;
    result["num_remotes"] = counts.num_remotes;
    result["num_peers"] = counts.num_peers;
    for (const Path path : {Path::shm, Path::cma, Path::ucx}) {
        const int i = static_cast<int>(path);
        result[(std::string(kPathNames[i]) + "_bytes").c_str()] = counters.path_bytes[i].load();
    }
    return result;
}

std::shared_ptr<Request> post(Engine& engine, bool write, std::int64_t peer_id, const IntegerMatrix& groups,
                              const Integers& local, const Integers& remote, const Integers& lengths, bool merge) {
    LLMSYS_CHECK(groups.shape(1) == 4, "a group has 4 values (region, remote, begin, end), got " << groups.shape(1));
    check_same_size(local, remote, lengths);
    const BatchArguments arguments{write,        merge,         groups.data(),  groups.shape(0),
                                   local.data(), remote.data(), lengths.data(), local.size()};
    nb::gil_scoped_release release;
    return engine.post(peer_id, arguments);
}

void bind_request(nb::module_& m) {
    nb::class_<Request>(m, "Request", "One batch or notification. It ends exactly once.")
        .def_ro("id", &Request::id)
        .def_ro("peer_id", &Request::peer_id)
        .def_prop_ro("kind", [](const Request& r) { return kRequestKinds[static_cast<int>(r.kind)]; })
        .def_ro("num_entries", &Request::num_entries)
        .def_ro("num_segments", &Request::num_segments)
        .def_ro("size_bytes", &Request::size_bytes)
        .def_prop_ro("paths",
                     [](const Request& r) {
                         nb::list names;
                         for (const Path path : r.paths) names.append(kPathNames[static_cast<int>(path)]);
                         return names;
                     })
        .def_ro("posted_ns", &Request::posted_ns)
        .def_prop_ro("started_ns", [](const Request& r) { return r.started_ns.load(); })
        .def_prop_ro("finished_ns", [](const Request& r) { return r.finished_ns.load(); })
        .def("done", &Request::done)
        .def(
            "wait",
            [](const Request& r, double timeout_s) {
                return wait_interruptibly(timeout_s, [&](std::chrono::nanoseconds step) { return r.wait(step); });
            },
            nb::arg("timeout_s"))
        .def("error",
             [](const Request& r) -> std::optional<std::string> {
                 if (r.error_kind() == ErrorKind::none) return std::nullopt;
                 return r.error();
             })
        .def("error_kind", [](const Request& r) { return kErrorKinds[static_cast<int>(r.error_kind())]; })
        .def("watch", &Request::watch);
}

void bind_engine(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    const EngineOptions defaults;
    nb::class_<Engine>(m, "Engine", "Reads, writes and notifications between processes, by one progress thread.",
                       nb::is_weak_referenceable())
        .def("__init__", &make_engine, nb::arg("library_path"), nb::kw_only(),
             nb::arg("ucx_config") = std::map<std::string, std::string>{}, nb::arg("spin") = defaults.spin,
             nb::arg("heartbeat_s") = 1e-9 * static_cast<double>(defaults.heartbeat_ns),
             nb::arg("lease_s") = 1e-9 * static_cast<double>(defaults.lease_ns), nb::arg("shm") = defaults.shm,
             nb::arg("cma") = defaults.cma, nb::arg("max_message_bytes") = defaults.max_message_bytes,
             nb::arg("slice_bytes") = defaults.slice_bytes, nb::arg("window") = defaults.window,
             nb::arg("num_copy_threads") = defaults.num_copy_threads, nb::arg("huge_pages") = defaults.huge_pages,
             nb::arg("test_slice_delay_us") = defaults.test_slice_delay_us)
        .def("info", &info)
        .def("worker_address", [](const Engine& engine) { return to_bytes(engine.worker_address()); })
        .def("probe",
             [](const Engine& engine) {
                 const Probe probe = engine.probe();
                 return nb::make_tuple(
                     probe.pid, probe.address,
                     nb::bytes(reinterpret_cast<const char*>(probe.nonce.data()), probe.nonce.size()));
             })
        .def(
            "register_memory",
            [](Engine& engine, std::uint64_t address, std::uint64_t size_bytes, const std::string& device) {
                return engine.register_memory(address, size_bytes, is_cuda(device));
            },
            nb::arg("address"), nb::arg("size_bytes"), nb::arg("device") = "cpu", Release())
        .def("allocate", &Engine::allocate, nb::arg("size_bytes"), Release())
        .def(
            "remote_key",
            [](Engine& engine, std::int64_t region_id) {
                std::string key;
                {
                    nb::gil_scoped_release release;
                    key = engine.remote_key(region_id);
                }
                return to_bytes(key);
            },
            nb::arg("region_id"))
        .def("release", &Engine::release, nb::arg("region_id"), Release())
        .def("add_peer", &add_peer, nb::arg("name"), nb::arg("fd"), nb::arg("worker_address"), nb::arg("token_in"),
             nb::arg("token_out"), nb::arg("peer_lease_s"), nb::arg("probe").none() = nb::none())
        .def("remove_peer", &Engine::remove_peer, nb::arg("peer_id"), Release())
        .def("peer_state", &peer_state, nb::arg("peer_id"))
        .def(
            "import_remote",
            [](Engine& engine, std::int64_t peer_id, const nb::bytes& key, std::uint64_t address,
               std::uint64_t size_bytes, const std::string& device) {
                const std::string bytes = to_string(key);
                nb::gil_scoped_release release;
                return engine.import_remote(peer_id, bytes, address, size_bytes, is_cuda(device));
            },
            nb::arg("peer_id"), nb::arg("remote_key"), nb::arg("address"), nb::arg("size_bytes"),
            nb::arg("device") = "cpu")
        .def(
            "remote_path",
            [](const Engine& engine, std::int64_t id) { return kPathNames[static_cast<int>(engine.remote_path(id))]; },
            nb::arg("remote_id"))
        .def("drop_remote", &Engine::drop_remote, nb::arg("remote_id"), Release())
        .def("post", &post, nb::arg("write"), nb::arg("peer_id"), nb::arg("groups"), nb::arg("local_offsets"),
             nb::arg("remote_offsets"), nb::arg("lengths"), nb::arg("coalesce") = true)
        .def(
            "notify",
            [](Engine& engine, std::int64_t peer_id, const nb::bytes& payload) {
                std::string bytes = to_string(payload);
                nb::gil_scoped_release release;
                return engine.notify(peer_id, std::move(bytes));
            },
            nb::arg("peer_id"), nb::arg("payload"))
        .def("next_event", &next_event, nb::arg("timeout_s"))
        .def("wake", [](Engine& engine) { engine.events().wake(); })
        .def("stats", &stats)
        .def("close", &Engine::close, Release());
}

#endif

}  // namespace

void bind_comm(nb::module_& m) {
    m.def(
        "engine_built", [] { return static_cast<bool>(LLMSYS_ENGINE); },
        "Whether the module has Engine: it is built where the headers of UCX are found.");
    m.def("coalesce", &coalesce, nb::arg("local_offsets"), nb::arg("remote_offsets"), nb::arg("lengths"),
          nb::arg("write"), "Sorts ranges by destination and merges those adjacent on both sides.");
#if LLMSYS_ENGINE
    bind_request(m);
    bind_engine(m);
#endif
}
