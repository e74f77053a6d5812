"""A memory budget: what it may be, that results are those without one, that it is told of, and faults."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import peft_fx
from peft_fx import budgeting
from peft_fx.inputs import roles_in
from peft_fx.options import parse
from peft_fx.records import records_of
from peft_fx.step import budget, halves
from peft_fx.step.budget import Choices, Held
from tests.support import joint, peft_models
from tests.support.choices import MODELS, STEP, K, N, R, held_at_least, traced, x_of
from tests.support.oracle import EAGER, assert_bit_equal, integers, run
from tests.support.stepping import ROOT, key, python
from zoo.models import make_base, make_batch, setup_of, with_adapters

HALF = torch._functorch.config.patch(activation_memory_budget=0.5)


def held_by(model: nn.Module) -> Held:
    """In the graph that takes most; there is one, but where transformers checkpoints layers."""
    records = records_of(model)
    assert len(records) == 1 or getattr(model, "is_gradient_checkpointing", False)
    found = [record.outcomes[-1].budget for record in records]
    return max((held for held in found if held), key=lambda held: held.peak["before"])


# ------------------------------------------------------------------------------------------------------------ options

BUDGETS = {
    1000: 1000,
    22e9: 22 * 10**9,
    "22GB": 22 * 10**9,
    "1.5 gib": 3 << 29,
    "900": 900,
    0.9: 0.9,
    "0.9": 0.9,
}


@pytest.mark.parametrize(("written", "meant"), BUDGETS.items(), ids=map(str, BUDGETS))
def test_a_budget_is_bytes_or_a_part_of_the_device(written: Any, meant: Any) -> None:
    assert parse({"peft_fx.memory_budget": written}).memory_budget == meant


@pytest.mark.parametrize("wrong", [0, -1, True, None, "", "22 apples", "GB", "1.2.3GB", "0.5B", float("nan"), [1]])
def test_another_budget_is_an_error_that_names_the_valid_ones(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"valid values: bytes, a number with a unit .*GiB.*'auto'"):
        parse({"peft_fx.memory_budget": wrong})


def test_a_budget_is_part_of_the_key() -> None:
    assert len({key(), key(memory_budget="1GB"), key(memory_budget="2GB"), key(memory_budget=0.5)}) == 4
    assert key(memory_budget="1GB") == key(memory_budget=10**9)


def test_everything_is_weights_states_and_the_step() -> None:
    """The gradients are the step's; what "auto" has left free the weights have taken already."""
    found, graph = traced("plain")
    roles = roles_in(graph, found.roles)
    trained_bytes, frozen_bytes = 4 * 4 * 2 * (K + N) * R, 4 * 4 * 2 * K * N
    for optimizer, times in (("adamw", 2), ("sgd", 0)):
        asked = parse({"peft_fx.memory_budget": "1GB", "peft_fx.optimizer": optimizer}).budget(joint.CPU)
        assert asked is not None
        expected = {"weights": trained_bytes + frozen_bytes, "optimiser states": times * trained_bytes}
        assert asked.fixed(roles) == expected
    auto = parse({"peft_fx.memory_budget": "auto"}).budget(joint.CPU)
    step = parse({"peft_fx.memory_budget": "1GB", **STEP}).budget(joint.CPU)
    assert auto is not None
    assert step is not None
    assert auto.fixed(roles)["weights"] == 0
    assert step.fixed(roles) == {}


# ------------------------------------------------------------------------------------------------------------ results


def both(model: nn.Module, share: float, inputs: Callable[[int], Any], **options: Any) -> Held:
    """Two steps with a budget and without one, bit for bit; what was done for the budget."""
    without, within = copy.deepcopy(model), copy.deepcopy(model)
    huge = {"peft_fx.memory_budget": "1TB", **STEP, **options}
    plain = torch.compile(copy.deepcopy(model), backend=peft_fx.backend, options=huge)
    seen = plain._orig_mod
    torch.manual_seed(5)
    run(plain, seen, inputs(1))
    small = {"peft_fx.memory_budget": int(held_by(seen).peak["after"] * share), **STEP, **options}
    f = torch.compile(without, backend=peft_fx.backend, options=options)
    g = torch.compile(within, backend=peft_fx.backend, options=small)
    for seed in (2, 3):
        torch.manual_seed(seed)
        want = run(f, without, inputs(seed))
        torch.manual_seed(seed)
        assert_bit_equal(run(g, within, inputs(seed)), want)
    for a, b in zip(without.buffers(), within.buffers(), strict=True):
        assert torch.equal(a, b)
    return held_by(within)


@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_without_a_budget(name: str) -> None:
    model = integers(MODELS[name](), 0, bound=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "peft_fx cannot hold")
        held = both(model, 0.7, lambda seed: (x_of(seed),), **EAGER)
    assert held.rebuilt > 0
    assert held.kept["after"] < held.kept["before"]


def test_a_models_results_are_those_without_a_budget() -> None:
    """Not only of integers: what is made again is made by the same ops."""
    model, inputs = peft_models.llama()
    model = peft_models.adapt(model, r=4, target_modules="all-linear")
    held = both(model, 0.85, lambda seed: inputs | {"labels": inputs["input_ids"]}, **EAGER)
    assert held.is_held
    assert held.rebuilt > 0


def test_layers_that_transformers_checkpoints_stay_so() -> None:
    """Not even for a budget that cannot be held is one of their values kept, or made once more than before."""
    model, inputs = peft_models.llama()
    model = peft_models.adapt(model, r=4, target_modules="all-linear")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.warns(RuntimeWarning, match="cannot hold"):
        held = both(model, 0.5, lambda seed: inputs | {"labels": inputs["input_ids"]}, **EAGER)
    assert held.kept["after"] <= held.kept["before"] < held.peak["before"] / 2


def test_checkpointed_layers_in_one_graph_stay_so() -> None:
    """What one layer hands to the next is inside a checkpoint there: it is not for us to keep."""
    model, inputs = peft_models.llama()
    model = peft_models.adapt(model, r=4, target_modules="all-linear")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"peft_fx.memory_budget": 1000, **STEP}
    with pytest.warns(RuntimeWarning, match="cannot hold"):
        report = peft_fx.explain(peft_fx.prepare(model), options=options, **inputs, labels=inputs["input_ids"])
    (held,) = report.budgets
    assert held.kept["after"] <= held.kept["before"]


def test_explain_tells_what_was_done_for_a_budget() -> None:
    """Of a call that is only traced, and of a compile that ran: the same."""
    model = integers(MODELS["plain"](), 0, bound=1)
    least = held_at_least("plain")
    options = {"peft_fx.memory_budget": least, **STEP, **EAGER}
    f = torch.compile(model, backend=peft_fx.backend, options=options)
    run(f, model, (x_of(),))
    (held,) = peft_fx.explain(f).budgets
    assert held == held_by(model)
    assert held.is_held
    assert held.asked == held.budget == least
    assert held.peak["after"] < held.peak["before"]
    traced_only = peft_fx.explain(copy.deepcopy(model), x_of(), options=options)
    assert traced_only.to_dict()["budgets"] == [held.to_dict()]
    assert f"{least / 1e3:.1f} kB" in str(traced_only)
    assert f"{held.rebuilt} values" in str(traced_only)
    assert not peft_fx.explain(copy.deepcopy(model), x_of()).budgets


@pytest.mark.parametrize("model", ["llama-tiny", "opt", "roberta"])
def test_a_budget_tells_of_the_peak_that_an_estimate_does(model: str) -> None:
    """Two walks, of a joint graph's halves to be and of those that a partitioner made. Logits that the model returns
    are kept, returned as a view and the caller's: no kernel of backward may write over them."""
    setup = setup_of(model, layers=2, hidden=64, tokens=64, vocab=4096, dtype="fp32")
    adapted, batch = with_adapters(make_base(setup), setup), make_batch(setup)
    (row,) = peft_fx.estimate(adapted, variants=["peft_fx"], **batch).rows
    options = {"peft_fx.memory_budget": "1TB", **STEP}
    (held,) = peft_fx.explain(adapted, options=options, **batch).budgets
    step = row.peak_bytes - row.weight_bytes - row.optimizer_bytes
    assert held.peak["before"] == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_without_pytorchs_budget(name: str) -> None:
    """Which is held by this choice wherever there is an adapter."""
    model = integers(MODELS[name](), 0, bound=1)
    other = copy.deepcopy(model)
    plain = torch.compile(model, backend=peft_fx.backend, options=EAGER)
    within = torch.compile(other, backend=peft_fx.backend, options=EAGER)
    torch.manual_seed(5)
    want = run(plain, model, (x_of(),))
    torch.manual_seed(5)
    torch._dynamo.reset()  # which would run the one's code for the other
    with HALF, patch.object(budgeting, "within_share", wraps=budgeting.within_share) as chosen:
        assert_bit_equal(run(within, other, (x_of(),)), want)
    assert chosen.call_count == 1


def test_less_is_kept_within_pytorchs_budget() -> None:
    """With an adapter; without one the partitioner's own choice is left to it."""
    model, inputs = peft_models.llama()
    adapted = peft_models.adapt(copy.deepcopy(model), r=4, target_modules="all-linear")
    plain = peft_fx.explain(adapted, **inputs)
    with HALF:
        half = peft_fx.explain(adapted, **inputs)
        with patch.object(budgeting, "within_share", side_effect=AssertionError):
            peft_fx.explain(model, **inputs)
    assert half.kept_bytes["after"] < 0.6 * plain.kept_bytes["after"]
    assert not half.budgets


TWICE = """
    import hashlib, json, warnings, torch
    torch.set_num_threads(1)
    import peft_fx
    from peft_fx.records import records_of
    from tests.support.oracle import integers, run
    from tests.support.choices import MODELS, STEP, x_of

    model = integers(MODELS["plain"](), 0, bound=1)
    warnings.filterwarnings("ignore", "peft_fx cannot hold")
    f = torch.compile(model, backend=peft_fx.backend, options={"peft_fx.memory_budget": BUDGET, **STEP})
    result = run(f, model, (x_of(),))
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in result.items() if t is not None)).hexdigest()
    passes = sum(len(r.outcomes) for r in records_of(model))
    print(json.dumps({"passes": passes, "digest": digest, "budgets": peft_fx.explain(f).to_dict()["budgets"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["held", "not held"])
def test_what_a_warm_cache_answers_is_told_of_like_what_was_chosen(tmp_path: Path, share: float) -> None:
    """In a second process, where no pass runs: the same bits, and the same row of the budget."""
    code = TWICE.replace("BUDGET", str(int(held_at_least("plain") * share)))
    cold, warm = (json.loads(python(code, tmp_path, PYTHONPATH=str(ROOT)).stdout.splitlines()[-1]) for _ in range(2))
    assert (cold["passes"], warm["passes"]) == (1, 0)
    assert warm["digest"] == cold["digest"]
    (held,) = warm["budgets"]
    assert warm["budgets"] == cold["budgets"]
    assert held["is_held"] == (share == 1.0)
    assert held["rebuilt"] > 0


def test_inductor_draws_the_same_masks_again() -> None:
    """From the seeds, which are kept."""
    model = integers(MODELS["dropout"](), 0, bound=1)
    fresh = torch._inductor.config.patch(force_disable_caches=True)  # what a cache answers is not chosen again
    with fresh, pytest.warns(RuntimeWarning, match="peft_fx cannot hold a memory budget"):
        held = both(model, 0.01, lambda seed: (x_of(seed),))
    assert held.rebuilt > 0


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("owner", "name"), [(halves, "walk"), (budget, "taken"), (Choices, "_cut"), (budgeting, "saved")], ids=str
)
def test_a_fault_is_no_budget_and_a_warning(owner: Any, name: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("injected")

    model = integers(MODELS["plain"](), 0, bound=1)
    other, options = copy.deepcopy(model), {"peft_fx.memory_budget": 1000, **STEP, **EAGER}
    with patch.object(owner, name, fail), pytest.warns(RuntimeWarning, match="without its memory budget.*injected"):
        got = run(torch.compile(other, backend=peft_fx.backend, options=options), other, (x_of(),))
    assert_bit_equal(got, run(torch.compile(model, backend=peft_fx.backend, options=EAGER), model, (x_of(),)))


def test_a_fault_within_pytorchs_budget_is_that_budget_alone() -> None:
    model = integers(MODELS["plain"](), 0, bound=1)
    other = copy.deepcopy(model)
    with HALF, patch.object(budgeting, "within_share", side_effect=RuntimeError("injected")):
        f = torch.compile(other, backend=peft_fx.backend, options=EAGER)
        with pytest.warns(RuntimeWarning, match="without its memory budget.*injected"):
            got = run(f, other, (x_of(),))
    torch._dynamo.reset()  # which would run the one's code for the other
    assert_bit_equal(got, run(torch.compile(model, backend=peft_fx.backend, options=EAGER), model, (x_of(),)))


def test_a_budget_that_cannot_be_held_is_told_of_with_the_least() -> None:
    model = integers(MODELS["plain"](), 0, bound=1)
    options = {"peft_fx.memory_budget": "30kB", **EAGER}
    f = torch.compile(model, backend=peft_fx.backend, options=options)
    with pytest.warns(RuntimeWarning, match=r"budget of 30.0 kB: .* is \d+.\d kB .*weights \d+.\d kB"):
        run(f, model, (x_of(),))
    held = held_by(model)
    assert not held.is_held
    assert held.peak["after"] < held.peak["before"]


def test_without_a_budget_nothing_is_looked_at() -> None:
    def hold(*args: Any) -> Any:
        raise AssertionError("no budget was asked for")

    model = integers(MODELS["plain"](), 0, bound=1)
    with patch.object(budgeting, "hold", hold):
        run(torch.compile(model, backend=peft_fx.backend, options=EAGER), model, (x_of(),))
