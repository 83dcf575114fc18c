"""Random numbers that a failure can be repeated with."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's generator, fresh in every test; torch's is seeded alike. The seed is printed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"random seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)
