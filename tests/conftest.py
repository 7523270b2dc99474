"""Every test starts from the same seed, one CPU thread, and memory filled with NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # torch.empty() gives NaN under these two, so a kernel that reads what it never wrote is caught.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
