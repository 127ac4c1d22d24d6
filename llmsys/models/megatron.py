"""An MoE layer of megatron-core with the weights of one of ours: a peer to compare outputs and times with.

megatron-core (version 0.16; the extra "megatron") is made for GPUs. `on_this_device` gives it what it asks CUDA for
where there is none, for as long as a block of code runs, so that its all-to-all layers run on CPU tensors and gloo.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from llmsys.core.errors import ConfigError
from llmsys.models.moe.config import MoEConfig
from llmsys.models.moe.layer import MoELayer

_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"gelu": partial(F.gelu, approximate="tanh"), "swiglu": F.silu}


class MegatronMoE(nn.Module):
    """megatron-core's MoELayer with the "alltoall" dispatcher, and copies of the weights of ``layer``.

    The group of ``layer`` becomes its expert-parallel group; without one, torch.distributed must be ready all the same,
    and this rank is a group of its own. Only gates "switch" and "top_k" without drops (``capacity_factor=None``) and
    without a load-balancing loss. Forward and backward run within `on_this_device`. Its scores are float32 whatever the
    weights are, so results agree to about 1e-7. Raises ConfigError.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        config = layer.config
        _require_comparable(config)
        specs = _module("models.gpt.moe_module_specs")
        spec = specs.get_moe_module_spec(use_te=False, num_experts=config.num_experts, moe_grouped_gemm=False)
        with on_this_device():
            peer = spec.module(
                _megatron_config(layer), submodules=spec.submodules, layer_number=1, pg_collection=_groups(layer)
            )
        self.peer: nn.Module = peer
        with torch.no_grad():
            self._copy_weights(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden) to (T, hidden)."""
        y: torch.Tensor = self.peer(x[:, None, :])[0]
        return y[:, 0, :]

    def weight_pairs(self, layer: MoELayer) -> list[tuple[torch.Tensor, nn.Parameter, int | None]]:
        """Each of our weights, its peer, which is transposed if it is an expert's, and the place of that expert."""
        peer: Any = self.peer
        pairs: list[tuple[torch.Tensor, nn.Parameter, int | None]] = []
        for place, expert in enumerate(peer.experts.local_experts):
            pairs.append((layer.up, expert.linear_fc1.weight, place))
            pairs.append((layer.down, expert.linear_fc2.weight, place))
        assert layer.router is not None
        pairs.append((layer.router, peer.router.weight, None))
        if layer.shared is not None:
            pairs.append((layer.shared.up.weight, peer.shared_experts.linear_fc1.weight, None))
            pairs.append((layer.shared.down.weight, peer.shared_experts.linear_fc2.weight, None))
        return pairs

    def _copy_weights(self, layer: MoELayer) -> None:
        for ours, theirs, place in self.weight_pairs(layer):
            theirs.data = (ours if place is None else ours[place].T).detach().clone()


@contextmanager
def on_this_device() -> Iterator[None]:
    """Let megatron-core run where torch has no CUDA; with CUDA nothing is changed.

    Functions of torch.cuda and of megatron-core are replaced until the block ends, in all threads: run nothing else
    in it that looks for CUDA.
    """
    if torch.cuda.is_available():
        yield
        return
    dispatcher, moe_utils = _module("transformer.moe.token_dispatcher"), _module("transformer.moe.moe_utils")
    stream = _Stream()
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (torch.cuda, "current_stream", lambda: stream),
            (torch.cuda, "synchronize", lambda: None),
            (torch.cuda, "stream", lambda _: nullcontext()),
            (torch.cuda, "Stream", _Stream),
            (dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", stream),
            # gloo takes lists of sizes; on a GPU they have been brought to the host at this place.
            (dispatcher, "all_to_all", partial(_with_lists, dispatcher.all_to_all)),
            # Not even defined without Transformer Engine, although the router asks whether it is None.
            (moe_utils, "te_general_gemm", None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


class _Stream:
    """Stands for a CUDA stream, and for its events: what was queued on it is done."""

    def wait_stream(self, other: object) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _with_lists(all_to_all: Callable[..., torch.Tensor], group: Any, rows: torch.Tensor, *sizes: Any) -> torch.Tensor:
    return all_to_all(group, rows, *(size.tolist() if isinstance(size, torch.Tensor) else size for size in sizes))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"megatron.core.{name}")
    except ImportError as missing:
        raise ConfigError(
            "megatron-core cannot be imported",
            expected="megatron-core 0.16",
            found=str(missing),
            fix="install the extra 'megatron', or leave this peer out",
        ) from missing


def _require_comparable(config: MoEConfig) -> None:
    found = {name: getattr(config, name) for name in ("gate", "capacity_factor", "aux_loss_weight")}
    if config.gate not in ("switch", "top_k") or config.capacity_factor is not None or config.aux_loss_weight:
        raise ConfigError(
            "megatron-core's layer would compute something else",
            expected="gate 'switch' or 'top_k', capacity_factor=None, aux_loss_weight=0",
            found=", ".join(f"{name}={value!r}" for name, value in found.items()),
            fix="compare layers without drops",
        )
    if not dist.is_initialized():
        raise ConfigError(
            "megatron-core needs process groups",
            expected="torch.distributed initialised, also for one rank",
            found="no default group",
            fix="start the ranks with llmsys.comm.launch.launch or torchrun",
        )


def _megatron_config(layer: MoELayer) -> Any:
    config = layer.config
    return _module("transformer.transformer_config").TransformerConfig(
        num_layers=1,
        hidden_size=config.hidden,
        num_attention_heads=1,
        ffn_hidden_size=config.ffn_hidden,
        moe_ffn_hidden_size=config.ffn_hidden,
        num_moe_experts=config.num_experts,
        expert_model_parallel_size=layer.num_ranks,
        moe_router_topk=config.top_k,
        # A softmax over the chosen experts only is one over all, with weights that are made to add up to 1.
        moe_router_pre_softmax=not config.renormalise,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=config.shared_ffn_hidden or None,
        gated_linear_unit=config.activation == "swiglu",
        activation_func=_ACTIVATIONS[config.activation],
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=layer.up.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _groups(layer: MoELayer) -> Any:
    """Expert parallelism over the layer's group; every other kind of parallelism has this rank alone."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    experts = alone if layer.group is None else layer.group
    groups = _module("process_groups_config").ProcessGroupCollection()
    for name in ("tp", "cp", "tp_cp", "tp_dp_cp", "expt_tp", "expt_dp", "dp", "dp_cp"):
        setattr(groups, name, alone)
    groups.ep = groups.tp_ep = experts
    return groups
