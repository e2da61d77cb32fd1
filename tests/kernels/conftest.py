"""Memory that torch.empty gives is filled with NaN, or the largest integer: an element that nothing writes shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)
