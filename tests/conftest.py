"""Every test starts from a fresh compiler and fixed seeds; peft_fx falling back to the untouched graph is a failure."""

import logging
import warnings

import pytest
import torch

logging.getLogger("torch.__trace").propagate = False  # else pytest captures megabytes of it per failure
torch.set_num_threads(1)  # on two busy cores a pool of two makes small products 20 times slower


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No compiled code, no randomness and no fallback passes from one test to the next; and no calibration of this
    machine's."""
    monkeypatch.setenv("PEFT_FX_CACHE_DIR", str(tmp_path / "peft_fx"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="peft_fx", category=RuntimeWarning)
        yield
    torch._dynamo.reset()
