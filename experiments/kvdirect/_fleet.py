"""The workers of the fault rounds, by name: started, replaced, counted; and whole requests between two of them."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from experiments.kvdirect._worker_settings import FaultSettings
from experiments.kvdirect._workers import Call, Nursery, Worker, free_port
from llmsys.comm.transports.ucx_library import find_ucx_library
from llmsys.core.errors import TransportError

MODULE = "experiments.kvdirect._fault_worker"
START_TIMEOUT_S = 60.0
# What a worker may have more than at its first census: connections come and go, and UCX keeps some of their buffers.
ALLOWANCES = {"num_fds": 24, "num_threads": 8, "num_shared_mappings": 12, "resident_mib": 128.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A request that a holder made a ticket for. call: the initiator's command; None while it has none."""

    request_id: str
    holder: str
    initiator: str
    ticket: str
    call: Call | None = None

    @property
    def command(self) -> Call:
        assert self.call is not None
        return self.call


class Fleet:
    """Holders h0, h1, ... and initiators i0, i1, ...; every second initiator uses UCX over TCP only.

    settings: of every worker, but for its name, port and paths. A restarted worker has its old name and port.
    A context manager: leaving it ends all of them at once.
    """

    def __init__(self, nursery: Nursery, settings: FaultSettings, *, num_holders: int, num_initiators: int) -> None:
        self._nursery = nursery
        self._settings = settings
        self.holders = tuple(f"h{index}" for index in range(num_holders))
        self.initiators = tuple(f"i{index}" for index in range(num_initiators))
        self.workers: dict[str, Worker] = {}
        self.addresses: dict[str, str] = {}
        self._first_census: dict[str, dict[str, Any]] = {}
        self._spare: Worker | None = None
        try:
            for name in (*self.holders, *self.initiators):
                self._start(nursery.spawn(name), free_port())
        except BaseException:
            self.end()
            raise

    def uses_tcp(self, initiator: str) -> bool:
        return self.initiators.index(initiator) % 2 == 1

    def _start(self, worker: Worker, port: int) -> None:
        name = worker.name
        self.workers[name] = worker
        fast = name not in self.initiators or not self.uses_tcp(name)
        settings = dataclasses.replace(self._settings, name=name, port=port, fast_paths=fast)
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        self.addresses[name] = worker.ask("start", START_TIMEOUT_S, **values)["address"]
        self._first_census.pop(name, None)

    def restart(self, name: str) -> None:
        """A new process in the place of one that has ended; one that has loaded its libraries in advance."""
        self.workers[name].join()
        worker = self._spare or self._warm_worker()
        worker.name = name
        self._start(worker, int(self.addresses[name].rpartition(":")[2]))
        self._spare = self._warm_worker()

    def _warm_worker(self) -> Worker:
        worker = self._nursery.spawn("spare")
        worker.call("warm", library=self._settings.library)
        return worker

    def hold(
        self, request_id: str, *, holder: str, initiator: str, access: str, kind: str, num_blocks: int
    ) -> Exchange:
        answer = self.workers[holder].ask(
            "hold", request=request_id, peer=initiator, access=access, kind=kind, num_blocks=num_blocks
        )
        return Exchange(request_id=request_id, holder=holder, initiator=initiator, ticket=answer["ticket"])

    def begin(
        self,
        exchange: Exchange,
        *,
        connect_timeout_s: float,
        seed: int,
        pause_at: str = "",
        pipelined: bool = True,
    ) -> Exchange:
        """Lets the initiator carry the request out; see `FaultWorker.transfer`."""
        call = self.workers[exchange.initiator].call(
            "transfer",
            ticket=exchange.ticket,
            pause_at=pause_at,
            pipelined=pipelined,
            connect_timeout_s=connect_timeout_s,
            seed=seed,
        )
        return dataclasses.replace(exchange, call=call)

    def settle(self, exchange: Exchange, timeout_s: float) -> Call:
        return self.workers[exchange.holder].call("settle", ticket=exchange.ticket, timeout_s=timeout_s)

    def wait_nothing_held(self, timeout_s: float) -> str | None:
        """None when no worker holds blocks other than quarantined ones; else which worker still has what."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            counts = {name: worker.ask("census") for name, worker in self.workers.items()}
            busy = {
                name: count
                for name, count in counts.items()
                if count["num_held"] or count["num_missing"] != count["num_quarantined"]
            }
            if not busy:
                return self._leak_in(counts)
            if time.monotonic() > deadline_s:
                return f"after {timeout_s:.3g} s blocks are still held or missing: {busy}"
            time.sleep(0.01)

    def _leak_in(self, counts: dict[str, dict[str, Any]]) -> str | None:
        for name, count in counts.items():
            first = self._first_census.setdefault(name, count)
            for key, allowance in ALLOWANCES.items():
                if count[key] > first[key] + allowance:
                    return f"worker {name} leaks: {key} grew from {first[key]:.5g} to {count[key]:.5g}"
        return None

    def close(self) -> None:
        """Lets every worker end in good order; TransportError if memory of peers stays mapped in one."""
        for name, worker in self.workers.items():
            left = worker.ask("close")
            if left["num_shared_mappings"]:
                raise TransportError(
                    f"worker {name} closed its endpoint but left memory mapped",
                    expected="no shared memory of UCX in /proc/self/maps",
                    found=f"{left['num_shared_mappings']} mappings",
                    fix="see UcxTransport.close",
                )

    def end(self) -> None:
        for worker in (*self.workers.values(), *([self._spare] if self._spare else [])):
            worker.kill()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()


def worker_settings(
    *, lease_s: float, unclaimed_timeout_s: float, quarantine_s: float, num_blocks: int, block_bytes: int, sabotage: str
) -> FaultSettings:
    """Settings of all workers of a fleet; names, ports and paths are the fleet's to set."""
    return FaultSettings(
        name="",
        port=0,
        # Looked up once: asking the system's linker takes longer than starting an endpoint.
        library=find_ucx_library().path,
        lease_s=lease_s,
        unclaimed_timeout_s=unclaimed_timeout_s,
        quarantine_s=quarantine_s,
        fast_paths=True,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        slice_bytes=2 * block_bytes,
        slice_delay_us=500,
        sabotage=sabotage,
    )
