"""Communication planning: from pass orders to instruction lists that cannot deadlock.

All transfers of a replica are put into one global order, that of their planned start. Each end lists its start at that
place between its passes, so any two devices list their common transfers in the same order, and a wait only ever
depends on starts that come earlier in the global order.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.dynapipe.costs import MicroBatchCosts
from llmsys.dynapipe.plan.instructions import (
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    RecvActivationFinish,
    RecvActivationStart,
    RecvGradFinish,
    RecvGradStart,
    SendActivationFinish,
    SendActivationStart,
    SendGradFinish,
    SendGradStart,
)

# What a buffer holds; with micro-batch and stage it names one buffer of the plan.
_LOADED, _INPUT, _OUTPUT, _OUTPUT_GRAD, _INPUT_GRAD = range(5)
_Name = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Planned times in ms, shape (M, V, 2); the last index is 1 for backward passes.

    ``send_start_ms`` is when the pass's result starts to travel; it counts only where the next stage is elsewhere.
    """

    start_ms: NDArray[np.float64]
    send_start_ms: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Send:
    place: tuple[float, int]  # start in ms, and rank of the pass that it follows: the global order
    end_ms: float
    micro_batch: int
    from_stage: int
    to_stage: int

    @property
    def backward(self) -> bool:
        return self.to_stage < self.from_stage


def plan_instructions(
    orders: Sequence[NDArray[np.int32]],
    times: PassTimes,
    costs: MicroBatchCosts,
    input_stages: frozenset[int],
) -> tuple[tuple[Instruction, ...], ...]:
    """The instruction list of each device.

    ``orders``: rows (micro-batch, stage, backward) for each device. ``input_stages``: the stages that load token ids.
    """
    num_devices, num_stages = len(orders), costs.forward_ms.shape[1]
    ranks = _causal_ranks(orders, num_devices, num_stages)
    sends = _all_sends(ranks, times, costs, num_devices, num_stages)
    events: list[list[_Send]] = [[] for _ in orders]
    for send in sends:
        events[send.from_stage % num_devices].append(send)
        events[send.to_stage % num_devices].append(send)
    starts = times.start_ms.tolist()
    result: list[tuple[Instruction, ...]] = []
    for device, order in enumerate(orders):
        writer = _Writer(device, num_devices, num_stages, input_stages)
        pending = deque(events[device])
        for micro_batch, stage, backward in order.tolist():
            start_ms = starts[micro_batch][stage][backward]
            here = (start_ms, ranks[micro_batch, stage, backward])
            while pending and pending[0].place < here:
                writer.transfer(pending.popleft())
            writer.finish_grad_sends(start_ms)
            writer.run_pass(micro_batch, stage, bool(backward))
        while pending:
            writer.transfer(pending.popleft())
        writer.finish_grad_sends(np.inf)
        result.append(tuple(writer.instructions))
    return tuple(result)


def _causal_ranks(
    orders: Sequence[NDArray[np.int32]], num_devices: int, num_stages: int
) -> dict[tuple[int, int, int], int]:
    """A number for each pass (micro-batch, stage, backward), above those of all passes it has to wait for.

    It settles what comes first at equal times: passes and transfers may take no time.
    """
    lists = [[(m, v, b) for m, v, b in order.tolist()] for order in orders]
    position = [0] * num_devices
    ranks: dict[tuple[int, int, int], int] = {}
    runnable = list(range(num_devices))
    while runnable:
        device = runnable.pop()
        while position[device] < len(lists[device]):
            m, v, backward = op = lists[device][position[device]]
            source = (m, v + 1, 1) if backward else (m, v - 1, 0)
            if backward and v == num_stages - 1:
                source = (m, v, 0)
            if source[1] >= 0 and source not in ranks:
                break
            ranks[op] = len(ranks)
            position[device] += 1
            runnable.append((v - 1 if backward else v + 1) % num_devices)
    return ranks


def _all_sends(
    ranks: dict[tuple[int, int, int], int],
    times: PassTimes,
    costs: MicroBatchCosts,
    num_devices: int,
    num_stages: int,
) -> list[_Send]:
    """Every transfer between two devices, in the global order."""
    send_starts = times.send_start_ms.tolist()
    durations = (costs.send_forward_ms.tolist(), costs.send_backward_ms.tolist())
    sends = []
    for (micro_batch, stage, backward), rank in ranks.items():
        to_stage = stage - 1 if backward else stage + 1
        if not 0 <= to_stage < num_stages or to_stage % num_devices == stage % num_devices:
            continue
        start_ms = send_starts[micro_batch][stage][backward]
        sends.append(
            _Send(
                place=(start_ms, rank),
                end_ms=start_ms + durations[backward][micro_batch][stage],
                micro_batch=micro_batch,
                from_stage=stage,
                to_stage=to_stage,
            )
        )
    sends.sort(key=lambda send: send.place)
    return sends


class _Writer:
    """Writes one device's list and hands out its buffer slots, the lowest free number first."""

    def __init__(self, device: int, num_devices: int, num_stages: int, input_stages: frozenset[int]) -> None:
        self.instructions: list[Instruction] = []
        self._device = device
        self._num_devices = num_devices
        self._num_stages = num_stages
        self._input_stages = input_stages
        self._slots: dict[_Name, int] = {}
        self._free: list[int] = []
        self._num_slots = 0
        self._unfinished: deque[_Send] = deque()  # gradient sends under way, in order

    def _local(self, stage: int) -> bool:
        return 0 <= stage < self._num_stages and stage % self._num_devices == self._device

    def _allocate(self, name: _Name) -> int:
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = self._num_slots
            self._num_slots += 1
        self._slots[name] = slot
        return slot

    def _release(self, name: _Name) -> None:
        slot = self._slots.pop(name)
        heapq.heappush(self._free, slot)
        _, micro_batch, stage = name
        self.instructions.append(FreeBuffer(micro_batch=micro_batch, stage=stage, buffer=slot))

    def transfer(self, send: _Send) -> None:
        """Start this device's end of a transfer."""
        m, start_kind = send.micro_batch, None
        if send.from_stage % self._num_devices == self._device:
            kind = _INPUT_GRAD if send.backward else _OUTPUT
            slot, stage = self._slots[kind, m, send.from_stage], send.from_stage
            peer = send.to_stage % self._num_devices
            start_kind = SendGradStart if send.backward else SendActivationStart
            if send.backward:
                self._unfinished.append(send)
            self.instructions.append(start_kind(micro_batch=m, stage=stage, buffer=slot, peer=peer))
        else:
            kind = _OUTPUT_GRAD if send.backward else _INPUT
            slot, stage = self._allocate((kind, m, send.to_stage)), send.to_stage
            peer = send.from_stage % self._num_devices
            receive_kind = RecvGradStart if send.backward else RecvActivationStart
            self.instructions.append(receive_kind(micro_batch=m, stage=stage, buffer=slot, peer=peer))

    def finish_grad_sends(self, now_ms: float) -> None:
        """End and free the gradient sends that are over by ``now_ms`` in the plan, so they cost no wait."""
        while self._unfinished and self._unfinished[0].end_ms <= now_ms:
            send = self._unfinished.popleft()
            name = (_INPUT_GRAD, send.micro_batch, send.from_stage)
            self.instructions.append(
                SendGradFinish(
                    micro_batch=send.micro_batch,
                    stage=send.from_stage,
                    buffer=self._slots[name],
                    peer=send.to_stage % self._num_devices,
                )
            )
            self._release(name)

    def run_pass(self, m: int, stage: int, backward: bool) -> None:
        if backward:
            self._run_backward(m, stage)
        else:
            self._run_forward(m, stage)

    def _inputs(self, m: int, stage: int) -> list[_Name]:
        names: list[_Name] = [(_LOADED, m, stage)] if stage in self._input_stages else []
        if stage > 0:
            names.append((_OUTPUT, m, stage - 1) if self._local(stage - 1) else (_INPUT, m, stage))
        return names

    def _run_forward(self, m: int, stage: int) -> None:
        if stage in self._input_stages:
            slot = self._allocate((_LOADED, m, stage))
            self.instructions.append(LoadInput(micro_batch=m, stage=stage, buffer=slot))
        if stage > 0 and not self._local(stage - 1):
            slot, peer = self._slots[_INPUT, m, stage], (stage - 1) % self._num_devices
            self.instructions.append(RecvActivationFinish(micro_batch=m, stage=stage, buffer=slot, peer=peer))
        reads = tuple(self._slots[name] for name in self._inputs(m, stage))
        last = stage == self._num_stages - 1
        writes = () if last else (self._allocate((_OUTPUT, m, stage)),)
        self.instructions.append(ForwardPass(micro_batch=m, stage=stage, reads=reads, writes=writes))

    def _run_backward(self, m: int, stage: int) -> None:
        names = self._inputs(m, stage)
        ended = [name for name in names if name[2] == stage]  # a local predecessor's output is its own to free
        if stage < self._num_stages - 1:
            output: _Name = (_OUTPUT, m, stage)
            local = self._local(stage + 1)
            grad: _Name = (_INPUT_GRAD, m, stage + 1) if local else (_OUTPUT_GRAD, m, stage)
            if not local:
                peer = (stage + 1) % self._num_devices
                self.instructions.append(
                    SendActivationFinish(micro_batch=m, stage=stage, buffer=self._slots[output], peer=peer)
                )
                self.instructions.append(
                    RecvGradFinish(micro_batch=m, stage=stage, buffer=self._slots[grad], peer=peer)
                )
            names = [*names, output, grad]
            ended += [output, grad]
        reads = tuple(self._slots[name] for name in names)
        writes = (self._allocate((_INPUT_GRAD, m, stage)),) if stage > 0 else ()
        self.instructions.append(BackwardPass(micro_batch=m, stage=stage, reads=reads, writes=writes))
        for name in ended:
            self._release(name)
