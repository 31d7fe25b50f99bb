import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def quick():
    """Tiny models run faster on one thread, and graphs are made faster where garbage is looked for less often, and not
    in what was imported."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
