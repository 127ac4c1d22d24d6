"""megatron-core's MoE layer computes what ours does, from the same weights."""

from __future__ import annotations

import sys

import pytest
import torch

from llmsys.comm.launch import launch
from llmsys.core.errors import ConfigError
from llmsys.models.megatron import MegatronMoE, on_this_device
from llmsys.models.moe import MoEConfig, MoELayer
from tests.models import ranks_megatron

SIZES = {"hidden": 8, "ffn_hidden": 12, "num_experts": 4}


@pytest.mark.slow
def test_outputs_and_gradients_agree() -> None:
    """To float32, in which megatron-core's router computes its scores."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (extra 'megatron')")
    for found in launch(ranks_megatron.run_checks, 2, timeout_s=240.0):
        assert len(found) == 2 * len(ranks_megatron.LAYERS)
        wrong = {(layer, what): e for layer, of in found.items() for what, e in of.items() if e > 1e-6}
        assert wrong == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
def test_nothing_stays_replaced() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (extra 'megatron')")
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def state() -> list[object]:
        names = ("current_device", "current_stream", "synchronize", "stream", "Stream")
        dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
        return [
            *(getattr(torch.cuda, name) for name in names),
            dispatcher.cuda_dtoh_stream,
            token_dispatcher.all_to_all,
            hasattr(moe_utils, "te_general_gemm"),
        ]

    before = state()
    with pytest.raises(ZeroDivisionError), on_this_device():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert all(ours is not theirs for ours, theirs in zip(state()[:-1], before[:-1], strict=True))
        raise ZeroDivisionError
    assert state() == before


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"gate": "random"}, {"capacity_factor": 1.0}, {"capacity_factor": None, "aux_loss_weight": 0.1}):
        with pytest.raises(ConfigError, match="something else"):
            MegatronMoE(MoELayer(MoEConfig(**SIZES, **settings)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no default group"):
        MegatronMoE(MoELayer(MoEConfig(**SIZES, capacity_factor=None)))
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.moe.token_dispatcher", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="extra 'megatron'"), on_this_device():
        pass
