"""One graph for many layers, and caches: what answers without the passes is told like what ran them."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import peft_fx
from peft_fx import compiling, machines
from peft_fx.options import Options
from tests.support.oracle import WEIGHT, assert_bit_equal, run, weight_form
from tests.support.stepping import ROOT, key, python
from tests.system.test_surroundings import BOTH, Net, every_layer, forms, made


def compiled_one_by_one(net: Net) -> nn.Module:
    for block in net.layers:
        block.compile(backend="peft_fx", options=WEIGHT)
    return net


def compiled_by_accelerate(net: Net) -> nn.Module:
    from accelerate.utils import compile_regions

    return compile_regions(net, backend="peft_fx", options=WEIGHT)


@pytest.mark.parametrize("compiled", [compiled_one_by_one, compiled_by_accelerate])
def test_layers_compiled_one_by_one(compiled: Any) -> None:
    """Dynamo compiles the first alone; each is told by its own name in the model, and by itself."""
    net, inputs = made()
    want = run(net, net, inputs)
    f = compiled(net)
    assert_bit_equal(run(f, net, inputs), want)
    report = peft_fx.explain(f)
    assert report.graphs == 1
    assert forms(report) == every_layer(*BOTH)
    assert forms(peft_fx.explain(net.layers[1])) == {"up.W": BOTH, "down.W": BOTH}


def test_another_model_of_the_same_code_is_not_told_of() -> None:
    """One graph serves both; each report has its own layers alone, and outlives the other model."""
    (one, inputs), (other, _) = made(), made()
    f, g = weight_form(one), weight_form(other)
    run(f, one, inputs)
    gone = weakref.ref(one.layers[0].up.A)
    run(g, other, inputs)
    assert forms(peft_fx.explain(f)) == forms(peft_fx.explain(g)) == every_layer(*BOTH)
    del one, f
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert forms(peft_fx.explain(g)) == every_layer(*BOTH)


# ------------------------------------------------------------------------------------------------------------ keys


OTHER = {
    "form": "weight",
    "adapter_grad": "low_rank",
    "numerics": "strict",
    "rounding": "dithered",
    "keep": "velora",
    "keep_rounding": "stochastic",
    "velora_group": 8,
    "keep_layers": ["*.up"],
    "chunk_loss": False,
    "memory_weight": 0.5,
    "memory_budget": "1GB",
    "memory_budget_of": "step",
    "optimizer": "sgd",
    "kernels": "off",
}


def test_every_option_is_part_of_the_key() -> None:
    """Of those that decide; a new one fails this test until it has its value here."""
    decides = {f.name for f in fields(Options)} - {"inductor", "machine", "lowering"}
    assert set(OTHER) == decides
    keys = [key(), *(key(**{name: value}) for name, value in OTHER.items())]
    assert len(set(keys)) == len(keys)


def test_the_key_is_of_the_machine_that_the_graph_is_on(monkeypatch) -> None:
    """Also of a graph compiled without a record, as for the errors of a lossy keep."""
    asked: list[str] = []
    resolve = machines.resolve
    monkeypatch.setattr(machines, "resolve", lambda chosen, device: asked.append(device.type) or resolve("cpu", device))
    monkeypatch.setattr(compiling, "_lower", lambda gm, inputs, options, ours: ours.uuid())
    graph = Graph()
    graph.output(graph.placeholder("x"))
    assert compiling.lower(GraphModule({}, graph), [torch.zeros(1, device="meta")], Options())
    assert asked == ["meta"]


# ------------------------------------------------------------------------------------------------- a second process


REGIONS = """
    import hashlib, json, torch
    torch.set_num_threads(1)
    import peft_fx
    from peft_fx import compiling
    from peft_fx.records import records_of
    from torch._dynamo.utils import counters
    from tests.support.oracle import run
    from tests.system.test_surroundings import Net, as_region

    torch.manual_seed(0)
    net, x = Net(as_region), torch.randn(64, 32, requires_grad=True)
    f = torch.compile(net, backend=peft_fx.backend, options={"peft_fx.form": "weight"})
    with torch.autocast("cpu", torch.bfloat16):
        result = run(f, net, (x,))
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in result.items() if t is not None)).hexdigest()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    passes = sum(len(r.outcomes) for r in records_of(net))
    print(json.dumps({"hits": hits, "passes": passes, "digest": digest, "report": peft_fx.explain(f).to_dict()}))
"""


@pytest.mark.slow
def test_a_warm_cache_answers_for_regions_under_autocast(tmp_path) -> None:
    """In a second process: a hit, no pass run, the same bits, and the same report, made outside of the autocast."""
    cold, warm = (json.loads(python(REGIONS, tmp_path, PYTHONPATH=str(ROOT)).stdout.splitlines()[-1]) for _ in range(2))
    assert (cold["hits"], warm["hits"], warm["passes"]) == (0, 1, 0)
    assert cold["passes"] >= 2
    assert warm["digest"] == cold["digest"]
    assert warm["report"] == cold["report"]
    assert {(s["name"], s["forward"], s["dtype"]) for s in warm["report"]["sites"]} == {
        (name, "weight", "bfloat16") for name in every_layer()
    }
