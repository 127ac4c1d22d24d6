"""What the ranks of test_expert_parallel.py run: expert parallelism against the same model in one process.

The model in one process has all experts and sees the tokens of one rank after another, with that rank's capacity, as
the ranks do. Its loss is the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from llmsys.core.errors import InputError
from llmsys.models.moe import GPT2MoE, GPT2MoEConfig, MoEConfig, MoELayer, average_gradients, check_capacity

NUM_TOKENS, HIDDEN, NUM_EXPERTS = 24, 8, 8

LAYERS: dict[str, MoEConfig] = {
    name: MoEConfig(hidden=HIDDEN, ffn_hidden=12, num_experts=NUM_EXPERTS, init_std=0.4, **settings)  # type: ignore[arg-type]
    for name, settings in {
        "switch": {"capacity_factor": 0.75, "aux_loss_weight": 0.1},
        "top_k": {"gate": "top_k", "top_k": 3, "capacity_factor": None, "renormalise": True},
        "random": {"gate": "random", "top_k": 2, "capacity_factor": 1.0},
        "batch_prioritized": {"gate": "batch_prioritized", "top_k": 2, "capacity_factor": 0.5},
        "expert_choice": {"gate": "expert_choice", "top_k": 2, "capacity_factor": 1.0},
        "shared": {"gate": "top_k", "top_k": 2, "activation": "swiglu", "shared_ffn_hidden": 6},
    }.items()
}


def tokens_of(rank: int) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + rank))


def loss_of(layer: MoELayer, x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rank)  # for the random gate
    y, aux_loss = layer(x)
    loss = (y * y.detach().cos()).sum()
    return y, loss if aux_loss is None else loss + aux_loss


def max_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape and expected.any()
    return float((found - expected).abs().max() / expected.abs().max())


def compare_layers(config: MoEConfig, change: Callable[[MoELayer, torch.Tensor, int], None] | None = None) -> float:
    """The greatest relative difference in outputs and gradients between this rank and the model in one process."""
    group = dist.group.WORLD
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    whole, layer = MoELayer(config).double(), MoELayer(config, group=group).double()
    batches = [tokens_of(other).requires_grad_() for other in range(num_ranks)]
    for other, x in enumerate(batches):
        if change is not None:
            change(whole, x, other)
    mine = batches[rank].detach().clone().requires_grad_()
    if change is not None:
        change(layer, mine, rank)

    expected, losses = zip(*(loss_of(whole, x, other) for other, x in enumerate(batches)), strict=True)
    (sum(losses) / num_ranks).backward()
    y, loss = loss_of(layer, mine, rank)
    loss.backward()
    assert mine.grad is not None and batches[rank].grad is not None
    errors = [max_error(y, expected[rank]), max_error(mine.grad / num_ranks, batches[rank].grad)]
    average_gradients(layer, group)
    held = slice(layer.expert_ids.start, layer.expert_ids.stop)
    wanted = dict(whole.named_parameters())
    for name, parameter in layer.named_parameters():
        other = wanted[name]
        assert torch.equal(parameter, other[held] if name in ("up", "down") else other)
        grad = other.grad[held] if name in ("up", "down") else other.grad
        if grad.any():
            errors.append(max_error(parameter.grad, grad))
        else:
            assert not parameter.grad.any()
    return max(errors)


def send_elsewhere(layer: MoELayer, x: torch.Tensor, rank: int) -> None:
    """Tokens of even ranks go to the upper half of the experts, those of odd ranks to the lower half."""
    lift(layer, torch.arange(NUM_EXPERTS) >= NUM_EXPERTS // 2)
    with torch.no_grad():
        x[:, 0] = 1.0 if rank % 2 == 0 else -1.0


def leave_experts_idle(layer: MoELayer, x: torch.Tensor, rank: int) -> None:
    """All tokens of all ranks go to the first expert, so all ranks but the first compute on nothing."""
    lift(layer, torch.arange(NUM_EXPERTS) == 0)
    with torch.no_grad():
        x[:, 0] = 1.0


def lift(layer: MoELayer, experts: torch.Tensor) -> None:
    assert layer.router is not None
    with torch.no_grad():
        layer.router[:, 0] = torch.where(experts, 9.0, -9.0)


def compare_models() -> float:
    config = GPT2MoEConfig(
        num_layers=4, num_heads=2, ffn_hidden=16, vocab_size=40, max_seq_len=12, moe=LAYERS["switch"]
    )
    group, rank, num_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    whole, model = GPT2MoE(config, seed=5).double(), GPT2MoE(config, group=group, seed=5).double()
    batches = [
        torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(other)) for other in range(num_ranks)
    ]
    sum(whole(batch[:, :-1], batch[:, 1:]) / num_ranks for batch in batches).backward()
    model(batches[rank][:, :-1], batches[rank][:, 1:]).backward()
    average_gradients(model, group)
    experts = {id(p): layer for layer in model.moe_layers for p in layer.expert_parameters()}
    errors = []
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        layer = experts.get(id(parameter))
        held = slice(None) if layer is None else slice(layer.expert_ids.start, layer.expert_ids.stop)
        assert parameter.grad is not None and other.grad is not None
        errors.append(max_error(parameter.grad, other.grad[held]))
    return max(errors)


def compiled_is_equal_to_eager() -> bool:
    """The whole layer, with its all-to-alls, as one graph: the same bits in outputs and gradients."""
    found = []
    for compile_it in (False, True):
        layer = MoELayer(LAYERS["shared"], group=dist.group.WORLD)
        x = tokens_of(dist.get_rank()).float().requires_grad_()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compile_it else layer
        y, _ = run(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def capacities() -> tuple[int, str]:
    """The capacity that all agree on, and what is said when the last rank has fewer tokens."""
    layer = MoELayer(LAYERS["switch"], group=dist.group.WORLD)
    agreed = check_capacity(layer, 64)
    last = dist.get_rank() == dist.get_world_size() - 1
    try:
        check_capacity(layer, 40 if last else 64)
    except InputError as error:
        return agreed, str(error)
    return agreed, "nothing"


def run_checks() -> tuple[dict[str, float], tuple[int, str], bool]:
    errors = {name: compare_layers(config) for name, config in LAYERS.items()}
    errors["a rank whose tokens all leave"] = compare_layers(LAYERS["switch"], send_elsewhere)
    errors["ranks whose experts get nothing"] = compare_layers(LAYERS["switch"], leave_experts_idle)
    errors["model"] = compare_models()
    # Compiling takes each rank seconds, and is the same for any number of ranks.
    return errors, capacities(), dist.get_world_size() > 2 or compiled_is_equal_to_eager()
