"""What the ranks of test_training.py run: the same small model trained on English text eagerly and by plans."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.passes.planning import Planning
from llmsys.lancet.runtime import LancetBackend
from llmsys.models.moe import GPT2MoE, GPT2MoEConfig, MoEConfig, average_gradients
from llmsys.models.text import VOCAB_SIZE, text_batch
from tests.lancet.ranks_backend import Ones

Gradients = list[torch.Tensor]


def new_model(gate: str) -> GPT2MoE:
    layer = MoEConfig(
        hidden=32,
        ffn_hidden=64,
        num_experts=4,
        gate=gate,  # type: ignore[arg-type]
        top_k=1 if gate == "switch" else 2,
        capacity_factor=1.0,
    )
    config = GPT2MoEConfig(
        num_layers=2, num_heads=2, ffn_hidden=64, moe=layer, moe_every=1, vocab_size=VOCAB_SIZE, max_seq_len=16
    )
    return GPT2MoE(config, group=dist.group.WORLD)


class Run:
    """A model in training; ``backend`` None is eager."""

    def __init__(self, gate: str, backend: LancetBackend | None) -> None:
        self.model: nn.Module = new_model(gate)
        self.step = self.model if backend is None else torch.compile(self.model, backend=backend, fullgraph=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def train(self, number: int) -> tuple[float, Gradients]:
        """The loss and the gradients of one step."""
        tokens, targets = text_batch(
            number, batch_size=4, seq_len=16, rank=dist.get_rank(), num_ranks=dist.get_world_size()
        )
        self.optimizer.zero_grad()
        loss = self.step(tokens, targets)
        loss.backward()
        average_gradients(self.model, dist.group.WORLD)
        found = [parameter.grad.clone() for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.step()
        return float(loss.detach()), found


def planned(**config: object) -> LancetBackend:
    settings = PlannerConfig(**config)  # type: ignore[arg-type]
    return LancetBackend(costs=Ones(), planning=Planning(config=settings, timeout_s=120.0))


def same_gradients(gate: str, num_steps: int) -> tuple[int, list[int]]:
    """How many all-to-alls hide weight gradients, and the steps in which loss or gradients differ in a bit."""
    backend = planned(partition="none")
    eager, overlapped = Run(gate, None), Run(gate, backend)
    different = []
    for number in range(num_steps):
        (loss, want), (planned_loss, got) = eager.train(number), overlapped.train(number)
        if loss != planned_loss or len(want) != len(got) or not all(map(torch.equal, want, got)):
            different.append(number)
    (step,) = backend.steps
    return sum(map(bool, step.plan.hidden_under.values())), different


def loss_curves(gate: str, num_steps: int) -> tuple[int, list[float], list[float]]:
    """How many ranges run in parts, and the mean losses of all ranks: eager, and planned with everything."""
    backend = planned(max_parts=2)
    runs = Run(gate, None), Run(gate, backend)
    curves = torch.tensor([[run.train(number)[0] for number in range(num_steps)] for run in runs])
    dist.all_reduce(curves)
    curves /= dist.get_world_size()
    return len(backend.steps[0].plan.regions), curves[0].tolist(), curves[1].tolist()
