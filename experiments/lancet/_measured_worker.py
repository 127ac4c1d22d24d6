"""One rank of a measured training step, in a network namespace of its own. `_measured_run` starts it.

It reads a `Job` from a file, measures its models one after another, and writes a line of JSON to standard output for
each message: rank 0 asks for the rate of the link, and waits for an answer on standard input, before each model.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from functorch.compile import default_partition, make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from experiments.lancet._measured_job import NUM_CHOICES, Job, Model, Sample
from experiments.lancet._measured_systems import plan_as_captured, plan_of
from experiments.network import DEVICE
from llmsys.core.config import build
from llmsys.lancet.passes.capture import Captured, capture
from llmsys.lancet.passes.rewrite import rewrite
from llmsys.lancet.plan import Plan, from_text, to_text
from llmsys.lancet.runtime import irregular
from llmsys.lancet.runtime.measure import Result, Step, measured_timeline
from llmsys.lancet.runtime.measured_costs import MeasuredCosts, measure_costs
from llmsys.lancet.runtime.messages import measure_all_to_all
from llmsys.lancet.runtime.profile_cache import ProfileCache
from llmsys.lancet.runtime.profiler import Bench, BenchSettings
from llmsys.lancet.runtime.replay import replay
from llmsys.lancet.simulator import simulate
from llmsys.models.moe import GPT2MoE, GPT2MoEConfig, MoEConfig

_WARM_UP = 2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traced:
    """A model's step: its modules and inputs, and the loss and gradients that eager execution has for these."""

    captured: Captured
    inputs: tuple[Any, ...]
    loss: torch.Tensor
    gradients: dict[int, torch.Tensor]  # by the address of the parameter
    eager_ms: float


def trace(model: GPT2MoE, tokens: torch.Tensor, targets: torch.Tensor) -> Traced:
    start_s = time.perf_counter()
    loss = model(tokens, targets)
    loss.backward()
    eager_ms = (time.perf_counter() - start_s) * 1e3
    gradients = {p.data_ptr(): p.grad for p in model.parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    kept: dict[str, Any] = {}

    def keep(name: str) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
        def compiler(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            kept[name] = module

            def run(*args: Any) -> Any:
                kept.setdefault(f"inputs of {name}", args)
                return module(*args)

            return make_boxed_func(run)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=default_partition)
    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(tokens, targets).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return Traced(
        captured=capture(kept["forward"], kept["backward"]),
        inputs=kept["inputs of forward"],
        loss=loss.detach(),
        gradients=gradients,
        eager_ms=eager_ms,
    )


class Measurement:
    """All systems on one model, in turn in every round, so that what changes on the machine changes all of them."""

    def __init__(self, job: Job, model: Model, ask: Callable[[dict[str, Any]], None]) -> None:
        self._job, self._model = job, model
        torch.manual_seed(job.seed)
        moe = MoEConfig(
            hidden=model.hidden, ffn_hidden=4 * model.hidden, num_experts=2 * dist.get_world_size(), gate=model.gate
        )
        config = GPT2MoEConfig(
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            ffn_hidden=4 * model.hidden,
            moe=moe,
            vocab_size=model.vocab_size,
            max_seq_len=model.seq_len,
        )
        net = GPT2MoE(config, group=dist.group.WORLD, seed=job.seed)
        shape = (model.batch_size, model.seq_len)
        draw = torch.Generator().manual_seed(job.seed + 1 + dist.get_rank())
        tokens, targets = (torch.randint(0, model.vocab_size, shape, generator=draw) for _ in range(2))
        self._traced = trace(net, tokens, targets)
        graph = self._traced.captured.graph
        self._sizes = [graph.tensors[graph.ops[op].inputs[0]].size_bytes for op in graph.comm_ops("all_to_all")]
        link_bytes = sum(self._sizes) * (1 - 1 / dist.get_world_size())
        step = self._step(plan_as_captured(self._traced.captured))
        for _ in range(NUM_CHOICES):
            ask({**self._captured_order(step), "link_bytes": link_bytes})
        self._costs = self._measured_costs()

    def _captured_order(self, step: Step) -> dict[str, float]:
        """Computation and waits of the captured order over the link as it is."""
        runs = [step.run(self._traced.inputs) for _ in range(_WARM_UP + 3)][_WARM_UP:]
        compute_ms = statistics.median(run.step_ms - run.waited_ms for run in runs)
        waited_ms = statistics.median(run.waited_ms for run in runs)
        return {"compute_ms": agreed(compute_ms, _mean), "waited_ms": agreed(waited_ms, _mean)}

    def _measured_costs(self) -> MeasuredCosts:
        smallest = 4096 * 2 * dist.get_world_size()
        sizes = {max(size // k, smallest) for size in self._sizes for k in (1, 2, 4, 8)} | {smallest, 2 * smallest}
        link = measure_all_to_all(sorted(sizes), row_bytes=4 * self._model.hidden)
        cache = ProfileCache(Path(self._job.cache_file) if self._job.cache_file else None)
        bench = Bench(cache, settings=BenchSettings(budget_ms=self._job.bench_ms, min_repeats=3))
        captured = self._traced.captured
        links = dict.fromkeys(captured.groups, link)
        return measure_costs(captured, bench, links, num_parts=self._job.part_counts)

    def _step(self, plan: Plan) -> Step:
        captured = self._traced.captured
        forward, backward = rewrite(captured, plan, irregular)
        assert backward is not None and captured.backward is not None
        return Step(forward, backward, signature=(captured.forward, captured.backward))

    def _plan(self, system: str) -> Plan:
        """The first rank's: a solver with a limit of time may find another plan elsewhere."""
        texts = [to_text(plan_of(system, self._traced.captured, self._costs)) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(texts)
        return from_text(texts[0])

    def samples(self) -> list[Sample]:
        plans: dict[str, Plan] = {}
        planning_s: dict[str, float] = {}
        for system in self._job.systems:
            start_s = time.perf_counter()
            plans[system] = self._plan(system)
            planning_s[system] = time.perf_counter() - start_s
        steps = {system: self._step(plan) for system, plan in plans.items()}
        found = []
        for round_number in range(-_WARM_UP, self._job.num_repeats):
            for place in range(len(steps)):
                system = self._job.systems[(place + round_number) % len(steps)]
                dist.barrier()
                result = steps[system].run(self._traced.inputs)
                if round_number >= 0:
                    found.append(self._sample(system, round_number, plans[system], result, planning_s[system]))
                    self._write_trace(system, round_number, result)
        return found

    def _sample(self, system: str, number: int, plan: Plan, result: Result, planning_s: float) -> Sample:
        graph = self._traced.captured.graph
        predicted = simulate(graph, plan, self._costs)
        put_back = replay(graph, plan, result.recorded, self._costs)
        again = simulate(graph, plan, put_back.costs, durations_ms=put_back.durations_ms)
        return Sample(
            model=self._model.name,
            system=system,
            repeat=number,
            step_ms=agreed(result.step_ms, max),
            waited_ms=agreed(result.waited_ms, _mean),
            predicted_ms=predicted.step_ms,
            predicted_exposed_ms=predicted.exposed_comm_ms,
            replay_error=agreed(abs(again.step_ms / result.step_ms - 1), max),
            gradient_error=agreed(self._gradient_error(result), max),
            loss_error=agreed(float((result.loss - self._traced.loss).abs() / self._traced.loss.abs()), max),
            num_regions=len(plan.regions),
            max_parts=max((region.num_parts for region in plan.regions), default=1),
            num_moved=sum(len(ops) for ops in plan.hidden_under.values()),
            planning_s=planning_s,
            notes="; ".join(plan.notes),
        )

    def _gradient_error(self, result: Result) -> float:
        """The greatest difference to eager's gradient of the same parameter, over that gradient's greatest element."""
        errors = []
        for parameter, gradient in zip(self._traced.inputs, result.gradients, strict=True):
            if gradient is not None:
                expected = self._traced.gradients[parameter.data_ptr()]
                errors.append(float((gradient - expected).abs().max() / expected.abs().max().clamp(min=1e-30)))
        if len(errors) != len(self._traced.gradients):
            raise RuntimeError(f"{len(errors)} gradients, eager execution has {len(self._traced.gradients)}")
        return max(errors)

    def _write_trace(self, system: str, number: int, result: Result) -> None:
        if self._job.trace_directory and number == 0:
            name = f"{self._model.name}-{system}-rank{dist.get_rank()}.json".replace(" ", "_").replace("/", "_")
            timeline = measured_timeline(self._traced.captured.graph, result)
            timeline.write_chrome_trace(Path(self._job.trace_directory) / name)


def agreed(value: float, by: Callable[[Sequence[float]], float]) -> float:
    """One number for all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return by(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(job_file: str, rank: int, num_ranks: int, master: str, parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    job = build(Job, json.loads(Path(job_file).read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    limit = timedelta(seconds=job.timeout_s)
    store = dist.TCPStore(master, job.port, num_ranks, is_master=rank == 0, timeout=limit)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)

    def ask(message: dict[str, Any]) -> None:
        if rank == 0:
            print(json.dumps(message), flush=True)
            if not sys.stdin.readline():
                raise RuntimeError("the process that started this rank has ended")
        dist.barrier()

    for model in job.models:
        samples = Measurement(job, model, ask).samples()
        if rank == 0:
            print(json.dumps({"samples": [asdict(sample) for sample in samples]}), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
