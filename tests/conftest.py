"""Every test starts from a fresh compiler and fixed seeds; peft_fx falling back to the untouched graph is a failure."""

import gc
import logging
import warnings

import pytest
import torch

from peft_fx import machines
from peft_fx.kernels import library
from peft_fx.passes.decide import machine

logging.getLogger("torch.__trace").propagate = False  # else pytest captures megabytes of it per failure
torch.set_num_threads(1)  # on two busy cores a pool of two makes small products 20 times slower


def pytest_collection_finish() -> None:
    """What was imported by now stays: the collector need not walk through all of it every few thousand nodes of a
    graph, an eighth of a test's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No compiled code, no randomness and no fallback passes from one test to the next; and nothing known of this
    machine: whatever it is, the price reckons with the table's CPU, and no kernel of ours is used."""
    monkeypatch.setenv("PEFT_FX_CACHE_DIR", str(tmp_path / "peft_fx"))
    monkeypatch.setattr(machine, "WIDE", {torch.backends.cpu.get_cpu_capability()})
    monkeypatch.setattr(machines, "probed", lambda device: machines.table_entry(device))
    monkeypatch.setattr(machines, "_probes", {})
    monkeypatch.setattr(library, "has_triton", lambda: False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="peft_fx", category=RuntimeWarning)
        yield
    torch._dynamo.reset()
