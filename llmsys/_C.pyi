from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    compiler: str
    compiler_version: str
    cxx_standard: int
    cuda_toolchain: bool
    sanitize: str

class EngineInfo(TypedDict):
    library: str  # the file that was loaded
    version: str  # of UCX, such as "1.22.0"
    transports: list[str]  # what UCX may use here, as "tcp/eth0"
    tls: str  # UCX's own setting TLS, as asked for
    thread_safe: bool  # whether memory is registered by the calling thread (else by the progress thread)

class PeerState(TypedDict):
    name: str
    state: Literal["connecting", "established", "lost", "left"]
    reason: str  # why it is lost, else ""
    cma: bool  # whether its memory is reached by process_vm_readv
    transports: list[str]  # of UCX's connection, empty before the first use
    silent_s: float  # since the last sign of life of the peer
    lease_left_s: float  # how long this engine may still touch the peer's memory without another sign of life
    num_queued: int  # requests that have not ended
    num_outstanding: int  # UCX operations in flight

class EngineStats(TypedDict):
    progress_cpu_s: float
    num_wakeups: int
    num_batches: int
    num_segments: int
    num_operations: int  # system calls, copies and UCX operations that moved data
    num_notifications_sent: int
    num_notifications_received: int
    num_dropped_messages: int
    num_queued_events: int
    max_queued_events: int
    num_regions: int
    num_remotes: int
    num_peers: int
    shm_bytes: int
    cma_bytes: int
    ucx_bytes: int

class PartitionResult(TypedDict):
    feasible: bool
    ends: NDArray[np.int64]
    times_ms: NDArray[np.float64]
    objective_ms: float
    t_max_ms: float
    num_evaluations: int

class PartitionResults(PartitionResult):
    num_runs: int
    others: list[PartitionResult]

class SearchResult(TypedDict):
    feasible: bool
    kind: str
    permutation: NDArray[np.int32]
    orders: list[NDArray[np.int32]]
    makespan_ms: float
    peak_mb: NDArray[np.float64]
    overflow_mb: float
    num_evaluations: int

class ReplayResult(TypedDict):
    complete: bool
    makespan_ms: float
    peak_mb: NDArray[np.float64]
    start_ms: NDArray[np.float64]
    send_start_ms: NDArray[np.float64]

def build_info() -> BuildInfo:
    """How this module was built: compiler, C++ standard, whether a CUDA toolchain was found, sanitizers."""

class CostTable:
    """Costs of one layer on a grid of (lengths, micro-batch size): columns forward, backward, stored, peak."""

    def __init__(self, axes: Sequence[NDArray[np.float64]], columns: Sequence[NDArray[np.float64]]) -> None: ...

def partition_samples(
    encoder: CostTable | None,
    decoder: CostTable,
    head: CostTable,
    devices: NDArray[np.float64],
    encoder_len: NDArray[np.int64],
    decoder_len: NDArray[np.int64],
    pipeline_factor: float,
    num_replicas: float,
    max_size: int,
    extra_factors: Sequence[float] = (),
    extra_cutoff_ms: float = ...,
) -> PartitionResults:
    """Split an ordered sequence of samples into micro-batches; exact for DynaPipe's objective.

    ``others`` are the best when the longest micro-batch counts more by each of ``extra_factors``; none
    when the best objective is beyond ``extra_cutoff_ms``.

    ``devices`` has rows (encoder layers, decoder layers, has head, micro-batches in flight, available memory).
    """

def partition_runs(
    offset: NDArray[np.int64],
    times_ms: NDArray[np.float64],
    pipeline_factor: float,
    num_replicas: float,
    extra_factors: Sequence[float] = (),
    extra_cutoff_ms: float = ...,
) -> PartitionResults:
    """The same from given times: ``times_ms[offset[i] + k]`` is that of samples i to i + k, inf if it does not fit."""

def micro_batch_times(
    encoder: CostTable | None,
    decoder: CostTable,
    head: CostTable,
    devices: NDArray[np.float64],
    encoder_len: NDArray[np.int64],
    decoder_len: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Times of micro-batches on their slowest device, infinite where they do not fit."""

def search_schedule(
    columns: Sequence[NDArray[np.float64]],
    num_devices: int,
    kinds: Sequence[str],
    permutations: NDArray[np.int64],
    memory_limit_mb: NDArray[np.float64],
    max_in_flight: int,
    max_moves: int,
    seed: int,
) -> SearchResult:
    """Best schedule kind and micro-batch order found for one replica."""

def replay(
    columns: Sequence[NDArray[np.float64]], num_devices: int, orders: Sequence[NDArray[np.int32]]
) -> ReplayResult:
    """Run device orders, rows (micro-batch, stage, backward), with real durations."""

def open_path(x: NDArray[np.int64], y: NDArray[np.int64], max_kicks: int, seed: int) -> NDArray[np.int32]:
    """Visiting order of a short open L1 path through points."""

def pipeline_times(
    roles: NDArray[np.int64],
    lanes: NDArray[np.int64],
    waits: tuple[NDArray[np.int64], NDArray[np.int64]],
    slices: tuple[NDArray[np.int64], NDArray[np.int64]],
    joins: NDArray[np.int64],
    uses: tuple[NDArray[np.int64], NDArray[np.int64]],
    num_parts: NDArray[np.int64],
    ops_ms: NDArray[np.float64],
    starts_ms: NDArray[np.float64],
    waits_ms: NDArray[np.float64],
    slices_ms: NDArray[np.float64],
    joins_ms: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Times of a range of a Lancet graph in each of ``num_parts`` parts, bit for bit those of ``pipeline.walk``.

    Pairs are (offsets, values) of one list for each op. Times have one row for each of ``num_parts``.
    """

def cover_ranges(
    num_groups: int, firsts: NDArray[np.int64], ends: NDArray[np.int64], costs_ms: NDArray[np.float64]
) -> tuple[float, NDArray[np.int64]]:
    """The cheapest cover of 0 .. num_groups by candidates [first, end): the total, inf for none, and which they are.

    Of equals the first in the list.
    """

def engine_built() -> bool:
    """Whether the module has ``Engine``: it is built where the headers of UCX are found."""

def coalesce(
    local_offsets: NDArray[np.int64], remote_offsets: NDArray[np.int64], lengths: NDArray[np.int64], write: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sort ranges by destination (remote if ``write``, else local) and merge those adjacent on both sides.

    Returns (local offsets, remote offsets, lengths). Zero lengths are left out. ValueError where two destination
    ranges overlap.
    """

def copy_ranges(
    destination_address: int,
    source_address: int,
    destination_offsets: NDArray[np.int64],
    source_offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> float:
    """memcpy of ranges, one after the other, by the calling thread; the seconds it took. Addresses are not checked.

    The limit that transfers within a host are compared with.
    """

Event: TypeAlias = (
    tuple[Literal["notification"], int, int, bytes]  # peer, id (1, 2, 3... for each peer), payload
    | tuple[Literal["established"], int]  # peer
    | tuple[Literal["lost"], int, str, bool]  # peer, reason, whether it left in good order
    | tuple[Literal["done"], int]  # request that was watched
)

class Request:
    """One batch or notification. It ends exactly once; all members may be read from any thread."""

    @property
    def id(self) -> int: ...
    @property
    def peer_id(self) -> int: ...
    @property
    def kind(self) -> Literal["read", "write", "notify"]: ...
    @property
    def num_entries(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def paths(self) -> list[Literal["shm", "cma", "ucx"]]: ...
    @property
    def posted_ns(self) -> int:
        """CLOCK_MONOTONIC, which is time.monotonic_ns(); so are the next two, which are 0 before it happened."""
    @property
    def started_ns(self) -> int: ...
    @property
    def finished_ns(self) -> int: ...
    def done(self) -> bool: ...
    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most ``timeout_s``. Releases Python's lock; Ctrl-C ends the wait."""
    def error(self) -> str | None:
        """None before the end and after success, else what was going on, with which peer, and why it failed."""
    def error_kind(self) -> Literal["", "lost", "transport", "cancelled", "closed"]:
        """lost: the peer; transport: this operation; cancelled: by remove_peer; closed: by close."""
    def watch(self) -> None:
        """Ask for one ("done", id) event; it is queued at once if the request has already ended."""

class Engine:
    """Reads, writes and notifications between this process and its peers, by one native progress thread.

    Every method may be called from any thread and releases Python's lock while it blocks. ValueError: an argument
    (which, and its value). RuntimeError: UCX's own error, or the engine is closed. Arrays over memory that
    ``allocate`` gave must not be used after ``release`` or ``close``.
    """

    def __init__(
        self,
        library_path: str,
        *,
        ucx_config: Mapping[str, str] = ...,
        spin: bool = False,
        heartbeat_s: float = 1.0,
        lease_s: float = 10.0,
        shm: bool = True,
        cma: bool = True,
        max_message_bytes: int = 1048576,
        slice_bytes: int = 4194304,
        window: int = 256,
        num_copy_threads: int = 1,
        huge_pages: bool = True,
        test_slice_delay_us: int = 0,
    ) -> None:
        """``library_path`` is a libucp.so.0 of UCX 1.14 or newer. ``ucx_config`` has names without UCX_.

        A peer that is not heard for ``lease_s`` is lost. ``slice_bytes``: most that is done for one peer before
        others are looked at, by each copying thread. ``window``: UCX operations in flight for one peer.
        ``num_copy_threads`` share copies within the host, the progress thread included. ``huge_pages``: ask the kernel
        to put registered memory that is in use into huge pages, which takes 0.4 s a GiB or more at registration.
        ``test_slice_delay_us`` sleeps after
        each slice, so that tests can act in the middle of a batch.
        """

    def info(self) -> EngineInfo: ...
    def worker_address(self) -> bytes: ...
    def probe(self) -> tuple[int, int, bytes]:
        """(pid, address, 16 random bytes that lie there), by which a peer finds out whether it can read us."""

    def register_memory(self, address: int, size_bytes: int, device: str = "cpu") -> int:
        """Make memory usable in ``post``, here and by peers. The caller keeps it alive until ``release``."""

    def allocate(self, size_bytes: int) -> tuple[int, int]:
        """(region, address) of new memory, zeroed, that peers on this host can map."""

    def remote_key(self, region_id: int) -> bytes: ...
    def release(self, region_id: int) -> None:
        """ValueError while a request uses it. Peers' keys for it are invalid from here on."""

    def add_peer(
        self,
        name: str,
        fd: int,
        worker_address: bytes,
        token_in: int,
        token_out: int,
        peer_lease_s: float,
        probe: tuple[int, int, bytes] | None = None,
    ) -> int:
        """A peer from a connected, authenticated stream socket.

        ``fd`` belongs to the engine from this call on, also where it fails: pass ``socket.detach()``. Returns at
        once; an "established" event follows when the peer has answered. Requests may be posted before. Without
        ``probe``, as for a peer on another host, only UCX is used.
        """

    def remove_peer(self, peer_id: int) -> None:
        """Say goodbye, end its requests as cancelled and forget its remotes; no event. Blocks until all is drained."""

    def peer_state(self, peer_id: int) -> PeerState: ...
    def import_remote(self, peer_id: int, remote_key: bytes, address: int, size_bytes: int, device: str = "cpu") -> int:
        """A window (address, size) of a peer's region. ValueError where the key is not one of that peer."""

    def remote_path(self, remote_id: int) -> Literal["shm", "cma", "ucx"]:
        """How CPU memory here and that remote are joined; a batch with CUDA memory here always goes by ucx."""

    def drop_remote(self, remote_id: int) -> None:
        """ValueError while a request uses it."""

    def post(
        self,
        write: bool,
        peer_id: int,
        groups: NDArray[np.int64],
        local_offsets: NDArray[np.int64],
        remote_offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        coalesce: bool = True,
    ) -> Request:
        """Queue one batch. Rows of ``groups`` are (region, remote, begin, end): entries begin to end between the two.

        Groups may share entries, such as all layers with one list of blocks. Offsets are bytes from the start of
        region and remote. All is checked here; ValueError leaves nothing queued. Requests of one peer end in the
        order of posting. A read has ended when its bytes are here, a write when they are at the peer.
        """

    def notify(self, peer_id: int, payload: bytes) -> Request:
        """Queue a message, sent when all earlier requests of that peer have ended, done when the peer has it queued.

        Consecutive notifications are pipelined. If an earlier batch failed it is still sent, unless the peer is lost.
        """

    def next_event(self, timeout_s: float) -> Event | None:
        """The oldest event, waiting for one up to ``timeout_s``. Several threads may wait; each event goes to one."""

    def wake(self) -> None:
        """Make one ``next_event`` return None: one that waits, else the next that would."""

    def stats(self) -> EngineStats: ...
    def close(self) -> None:
        """Say goodbye to all peers, end all requests as closed, join the thread, give back all memory. Idempotent."""
