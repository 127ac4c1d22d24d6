"""Training on English text over gloo processes: what plans must not change, over many steps."""

from __future__ import annotations

import numpy as np
import pytest

from llmsys.comm.launch import launch
from tests.lancet import ranks_training as ranks

NUM_EQUAL_STEPS = 50
NUM_STEPS = 200


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "gate"), [(2, "top_k"), (4, "switch")])
def test_gradients_stay_bit_equal_with_weight_gradients_moved(num_ranks: int, gate: str) -> None:
    for num_hidden, different in launch(ranks.same_gradients, num_ranks, gate, NUM_EQUAL_STEPS, timeout_s=250.0):
        assert num_hidden > 0
        assert different == []


@pytest.mark.slow
def test_loss_curves_coincide_with_everything_on() -> None:
    for num_regions, eager, planned in launch(ranks.loss_curves, 2, "switch", NUM_STEPS, timeout_s=250.0):
        assert num_regions > 0
        # Sums are taken in parts, and rounding grows with training; a changed route or drop would move it far more.
        np.testing.assert_allclose(planned, eager, rtol=2e-3)
        assert np.mean(eager[-20:]) < np.mean(eager[:20]) - 0.5
