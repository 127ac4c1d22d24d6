"""Small planning problems that always run, and the real files where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmsys.core.specs import Architecture
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.workload import Samples
from tests.dynapipe.synthetic import ARCHITECTURES, toy_cost_model, toy_samples


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """The directory of the real files (data.root); tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("LLMSYS_DATA_ROOT", Path(__file__).resolve().parents[2] / "../shared/data"))
    if not (root / "dynapipe_reference.json").is_file():
        pytest.skip(f"no dynapipe_reference.json in {root}: set LLMSYS_DATA_ROOT to the directory of the real files")
    return root


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    chosen: Architecture = request.param
    return chosen


@pytest.fixture
def cost_model(architecture: Architecture) -> CostModel:
    """Two replicas of three devices, eight layers: stages of 3, 3 and 2."""
    return toy_cost_model(architecture, data=2, pipeline=3)


@pytest.fixture
def samples(architecture: Architecture) -> Samples:
    """48 samples."""
    return toy_samples(np.random.default_rng(7), architecture, 48)
