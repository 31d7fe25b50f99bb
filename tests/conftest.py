import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def quick():
    """Tiny models run faster on one thread, and copies of them when what was imported is no longer looked through."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
