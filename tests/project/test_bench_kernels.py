"""`python -m bench kernels`: it counts what another tool counts, and what can be counted by hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from bench.experiment import Session, in_a_worker
from bench.experiments import suites
from bench.results import ROOT, Results, request
from bench.variants import VARIANTS
from tests.support import interpreting, rehearsing
from zoo.models import setup_of

TOOL = ROOT.parent.parent / "shared" / "offline_cuda" / "model_kernels.py"
SIDES = ("forward", "backward")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def measured(name: str, attention: str, **sizes: Any) -> dict[str, Any]:
    setup = setup_of("llama-3.2-1b", vocab=512, device="cpu", **sizes)
    return in_a_worker(request("kernels", setup, [name], machine="h100", attention=attention), lambda text: None)


@pytest.mark.skipif(not TOOL.exists(), reason="the other tool is not here")
def test_calls_and_bytes_are_those_of_another_tool() -> None:
    """Apart from what goes between the two kernels of one op of ours, of which that tool does not know."""
    names = ("inductor", "peft_fx")
    sizes = ["--hidden", "256", "--inter", "1024", "--layers", "1", "--T", "1024", "--variants", ",".join(names)]
    command = [sys.executable, "-W", "ignore", str(TOOL), *sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    by_name = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {name: measured(name, "pointwise", hidden=256, layers=1, tokens=1024) for name in names}
    for name, side in itertools.product(names, SIDES):
        row, told = rows[name][side], by_name[name][side]
        assert row["calls"] == told["triton"] + told["products"] + told["other"]
        assert row["kinds"]["triton"] == told["triton"]
        between = row["bytes"] - round(1e9 * told["gigabytes"])
        assert 0 <= between <= (0.1 * row["bytes"] if (name, side) == ("peft_fx", "backward") else 0)


def test_the_weight_form_has_the_products_of_a_model_without_adapters() -> None:
    """In forward by shape and dtype, and three launches more, in which the seven weights are built."""
    frozen, ours = (measured(name, "flash", layers=1, tokens=8192)["forward"] for name in ("frozen", "peft_fx"))
    T, K, kv, N = 8192, 2048, 512, 8192
    by_hand = Counter({(K, K): 2, (K, kv): 3, (K, N): 2, (N, K): 1})  # q, o; k, v, a head of 512; gate, up; down
    assert ours["products"] == frozen["products"] == {f"{T}×{k}×{n} bfloat16": c for (k, n), c in by_hand.items()}
    assert ours["kinds"] == frozen["kinds"] | {"op": 3}
    weights = K * (2 * K + 2 * kv + 3 * N)
    factors = 16 * (2 * (K + K) + 2 * (K + kv) + 3 * (K + N))
    vector = 2 * 2 * T * K  # what the frozen model's is added to is written and read once more
    assert ours["bytes"] - frozen["bytes"] == pytest.approx(2 * 2 * weights + 4 * factors - vector, rel=0.02)


@pytest.mark.slow
def test_a_slice_of_the_gpu_suite_without_a_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is generated, and each kernel of ours that it calls gives its decomposition's bits; no times. All of it
    is stored."""
    asked = Namespace(toy=False, offline=True, device="cpu")
    (request,) = [r for r in suites.gpu(asked) if r["variants"] == ["peft_fx"] and not r["setup"]["dropout"]]
    request["setup"] |= {"layers": 1, "vocab": 512}
    request["variants"] += ["full"]  # the one whose embedding has a gradient
    session = Session(Results(tmp_path / "results.json", "cpu"), again=False)
    rehearsing.rehearse([request], session, in_a_worker)
    told = capsys.readouterr().out
    assert "Nothing was timed" in told
    counts = {op: found for op, *found in re.findall(r"^peft_fx::(\w+) +(\d+) +(\d+)$", told, re.M)}
    assert set(counts) == {"merge", "narrow_out", "narrow_in", "narrow_both"}
    assert all(int(right) and not int(wrong) for right, wrong in counts.values())
    monkeypatch.setattr(rehearsing, "interpreted", None)
    rehearsing.rehearse([request], session, by=None)  # type: ignore[arg-type]
    assert told == capsys.readouterr().out


def test_a_wrong_kernel_is_told() -> None:
    given = [{"shape": [4, 3], "stride": [1, 4], "dtype": "bfloat16"}, 2]

    def twice(t: Tensor, times: int) -> list[Tensor]:
        return [t * times]

    assert interpreting.same(twice, twice, given)
    assert not interpreting.same(twice, lambda t, times: [t + t.sum()], given)
    assert not interpreting.same(twice, lambda t, times: [(t * times).float()], given)


def test_each_case_of_the_gpu_suite_is_rehearsed() -> None:
    """Every compiled variant at every length, once."""
    asked = list(suites.gpu(Namespace(toy=False, offline=True, device="cpu")))
    found = [(one["variants"][0], one["setup"]["tokens"], one["setup"]["dropout"]) for one in rehearsing.cases(asked)]
    every = {(n, r["setup"]["tokens"], r["setup"]["dropout"]) for r in asked for n in r["variants"]}
    wanted = {(name, T, dropout if name != "frozen" else 0.0) for name, T, dropout in every if VARIANTS[name].compiled}
    assert len(found) == len(set(found))
    assert set(found) == wanted
