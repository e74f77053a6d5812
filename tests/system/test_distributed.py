"""Two processes on gloo: whatever shares a model out, both train as one process does, and both report the same."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.ranks import IN_A_BUDGET, LAYERS, WAYS

ROOT = pathlib.Path(__file__).parents[2]
LAYER_NAMES = {f"base_model.model.{i}.{name}" for i in range(LAYERS) for name in ("up", "down")}


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict]]:
    """By way, those of both ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.support.ranks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {way: [r for r in lines if r["way"] == way] for way in WAYS}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_process(way: str, results: dict[str, list[dict]]) -> None:
    """Losses and adapters, in float64, after three steps."""
    assert [r["rank"] for r in sorted(results[way], key=lambda r: r["rank"])] == [0, 1]
    assert all(r["error"] < 1e-12 for r in results[way])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_decide_alike(way: str, results: dict[str, list[dict]]) -> None:
    """Every adapter is told of once, as the same on both ranks, by its name in the whole model."""
    first, second = (r["report"] for r in results[way])
    for kind in ("sites", "refusals", "failures", "graphs"):
        assert first[kind] == second[kind]
    assert first["failures"] == []
    names = [s["name"].removeprefix("module.") for s in first["sites"] + first["refusals"]]
    assert sorted(names) == sorted(LAYER_NAMES)


@pytest.mark.slow
def test_what_is_rewritten(results: dict[str, list[dict]]) -> None:
    """All of it, but for adapters that a bucket's border cuts, and those whose base product is summed over ranks before
    the adapter is added."""
    reports = {way: found[0]["report"] for way, found in results.items()}
    forms = {way: {s["name"].removeprefix("module."): s["forward"] for s in r["sites"]} for way, r in reports.items()}
    for way in ("data_parallel", "accelerated", "sharded"):
        assert forms[way] == dict.fromkeys(LAYER_NAMES, "weight"), way
    assert set(forms["in_buckets"].values()) == {"weight"}
    assert {r["code"] for r in reports["in_buckets"]["refusals"]} == {"different_input"}
    assert reports["in_buckets"]["graphs"] == 4
    assert all(forms[f.__name__] == forms[f.__name__.removesuffix("_in_a_budget")] for f in IN_A_BUDGET)
    assert {name.rpartition(".")[2]: form for name, form in forms["tensor_parallel"].items()} == {
        "up": "weight",
        "down": "none",
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", [f.__name__ for f in IN_A_BUDGET])
def test_each_rank_holds_its_budget(way: str, results: dict[str, list[dict]]) -> None:
    """In the same way, and by making something again that it would keep."""
    first, second = (r["report"]["budgets"] for r in results[way])
    assert first == second
    assert all(held["is_held"] for held in first)
    assert any(held["rebuilt"] for held in first)
