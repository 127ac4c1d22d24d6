"""A plan as bytes, for plan stores: msgpack around one column of small numbers for each device.

Peers follow from the stages, so they are left out; a plan of 4 stages and 40 micro-batches takes under 10 kB.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import msgpack

from llmsys.core.errors import PlanError
from llmsys.dynapipe.config import Parallelism, StageLayers
from llmsys.dynapipe.plan.checks import check_plan, far_stage
from llmsys.dynapipe.plan.instructions import KINDS, BackwardPass, ForwardPass, Instruction, Transfer
from llmsys.dynapipe.plan.model import Estimate, MicroBatch, Plan, ReplicaPlan

VERSION = 1
_CHECKSUM_BYTES = 4
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


def to_bytes(plan: Plan) -> bytes:
    """All of a plan, compact, then a checksum (CRC-32). ``from_bytes(to_bytes(plan)) == plan``."""
    p = plan.parallelism
    packed: bytes = msgpack.packb(
        [
            VERSION,
            plan.planner,
            plan.num_samples,
            [p.data, p.pipeline, p.tensor, p.num_chunks, p.zero_stage],
            [[s.num_encoder, s.num_decoder, s.head] for s in plan.stages],
            list(plan.memory_limit_mb),
            [plan.attention, plan.decoder_extra_tokens],
            [_pack_replica(replica, p.pipeline) for replica in plan.replicas],
        ]
    )
    return packed + zlib.crc32(packed).to_bytes(_CHECKSUM_BYTES, "little")


def from_bytes(data: bytes) -> Plan:
    """The plan that ``to_bytes`` wrote; PlanError for other bytes, another version, or a plan that cannot run."""
    packed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if zlib.crc32(packed).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise _no_plan(data, "the checksum does not match")
    try:
        version, planner, num_samples, sizes, stages, limits, (attention, extra), replicas = msgpack.unpackb(packed)
        if version != VERSION:
            raise ValueError(f"version {version}")
        data_, pipeline, tensor, num_chunks, zero_stage = sizes
        plan = Plan(
            planner=planner,
            num_samples=num_samples,
            parallelism=Parallelism(
                data=data_, pipeline=pipeline, tensor=tensor, num_chunks=num_chunks, zero_stage=zero_stage
            ),
            stages=tuple(StageLayers(num_encoder=e, num_decoder=d, head=h) for e, d, h in stages),
            memory_limit_mb=tuple(limits),
            attention=attention,
            decoder_extra_tokens=extra,
            replicas=tuple(_unpack_replica(replica, pipeline) for replica in replicas),
        )
    except (ValueError, TypeError, IndexError, StopIteration, msgpack.exceptions.UnpackException) as error:
        raise _no_plan(data, str(error) or type(error).__name__) from error
    check_plan(plan)
    return plan


def _no_plan(data: bytes, problem: str) -> PlanError:
    return PlanError(
        "these bytes are no plan",
        expected=f"what to_bytes of plan version {VERSION} writes, whole",
        found=f"{len(data)} bytes: {problem}",
        fix="read the plan again from its store, or make it anew with this version",
    )


def _pack_replica(replica: ReplicaPlan, num_devices: int) -> list[object]:
    return [
        replica.recompute,
        replica.schedule,
        [replica.estimate.makespan_ms, *replica.estimate.peak_mb],
        [[m.encoder_len, m.decoder_len, [list(row) for row in m.rows]] for m in replica.micro_batches],
        [_pack_ops(ops, num_devices) for ops in replica.instructions],
    ]


def _unpack_replica(packed: list[object], num_devices: int) -> ReplicaPlan:
    recompute, schedule, estimate, micro_batches, devices = packed
    return ReplicaPlan(
        micro_batches=tuple(
            MicroBatch(rows=tuple(tuple(row) for row in rows), encoder_len=e, decoder_len=d)
            for e, d, rows in micro_batches  # type: ignore[attr-defined]
        ),
        recompute=recompute,  # type: ignore[arg-type]
        schedule=schedule,  # type: ignore[arg-type]
        estimate=Estimate(makespan_ms=estimate[0], peak_mb=tuple(estimate[1:])),  # type: ignore[index]
        instructions=tuple(tuple(_unpack_ops(ops, num_devices)) for ops in devices),  # type: ignore[attr-defined]
    )


def _pack_ops(ops: tuple[Instruction, ...], num_devices: int) -> bytes:
    """Each op: kind + 16 * chunk, micro-batch, buffers; all as base-128 numbers, low digits first."""
    out = bytearray()
    for op in ops:
        _put(out, _NUMBER[type(op)] + 16 * (op.stage // num_devices))
        _put(out, op.micro_batch)
        if isinstance(op, ForwardPass | BackwardPass):
            _put(out, len(op.reads) + 16 * len(op.writes))
            for buffer in (*op.reads, *op.writes):
                _put(out, buffer)
        else:
            _put(out, op.buffer)  # type: ignore[attr-defined]
    if ops:
        # The device's number, which every stage of it shares.
        _put(out, ops[0].stage % num_devices)
    return bytes(out)


def _unpack_ops(data: bytes, num_devices: int) -> Iterator[Instruction]:
    if not data:
        return
    numbers = list(_numbers(data))
    device, stream = numbers[-1], iter(numbers[:-1])
    for head in stream:
        kind, stage = KINDS[head % 16], head // 16 * num_devices + device
        micro_batch = next(stream)
        if kind is ForwardPass or kind is BackwardPass:
            counts = next(stream)
            reads = tuple(next(stream) for _ in range(counts % 16))
            writes = tuple(next(stream) for _ in range(counts // 16))
            yield kind(micro_batch=micro_batch, stage=stage, reads=reads, writes=writes)
        elif issubclass(kind, Transfer):
            probe = kind(micro_batch=micro_batch, stage=stage, buffer=next(stream), peer=0)
            yield kind(micro_batch=micro_batch, stage=stage, buffer=probe.buffer, peer=far_stage(probe) % num_devices)
        else:
            yield kind(micro_batch=micro_batch, stage=stage, buffer=next(stream))  # type: ignore[call-arg]


def _put(out: bytearray, number: int) -> None:
    while number >= 128:
        out.append(number % 128 + 128)
        number //= 128
    out.append(number)


def _numbers(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value += (byte % 128) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0
    if shift:
        raise ValueError("the last number is cut off")
