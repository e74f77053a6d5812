"""A memory budget: what it may be, that the peak of the walk is within it in the least time, that nothing else changes,
and what is never made again."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

import peft_fx
from peft_fx import budgeting, compat, compiling, estimating
from peft_fx.options import parse
from peft_fx.passes.analyse.flow import is_tangent, returned
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.passes.graph.editor import SAVE
from peft_fx.passes.graph.nodes import aten
from peft_fx.step import budget, halves
from peft_fx.step.budget import Choice, Choices, Held, is_repeatable
from peft_fx.step.cut import ENDLESS, Network
from peft_fx.step.fusion import Fused, outputs
from peft_fx.step.memory import walk
from tests import joint, peft_models
from tests.oracle import EAGER, assert_bit_equal, integers, run
from tests.spellings import frozen, trained
from tests.test_backend import ROOT, key, python
from zoo.models import make_base, make_batch, setup_of, with_adapters

K, N, R, T = 16, 48, 2, 64
STEP = {"peft_fx.memory_budget_of": "step"}
HALF = torch._functorch.config.patch(activation_memory_budget=0.5)


class Block(nn.Module):
    """A residual layer of two adapted products, perhaps with dropout between them."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.V, self.W, self.p = frozen(K, N), frozen(N, K), p
        self.A, self.B, self.C, self.D = trained(K, R), trained(R, N), trained(N, R), trained(R, K)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.V + (x @ self.A) @ self.B)
        h = nn.functional.dropout(h, self.p, self.training)
        return x + (h @ self.W + (h @ self.C) @ self.D)


class Stateful(Block):
    """The same, with a buffer that scales the layer and is then written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones(K))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x * (self.n * 2))
        with torch.no_grad():
            self.n.add_(1)
        return y


class Checkpointed(Block):
    """The same, which the user has computed again in any case."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(*(Block() for _ in range(4))),
    "dropout": lambda: nn.Sequential(*(Block(0.5) for _ in range(3))),
    "stateful": lambda: nn.Sequential(*(Stateful() for _ in range(3))),
    "checkpointed": lambda: nn.Sequential(Block(), Checkpointed(), Block(), Block()),
}


def x_of(seed: int = 1) -> Tensor:
    return integers((torch.empty(T, K),), seed, bound=1)[0].requires_grad_()


@functools.cache
def traced(name: str) -> tuple[joint.Joint, Graph]:
    """A model's joint graph, and the same after the passes and Inductor's own."""
    found = joint.capture(MODELS[name](), x_of())  # Dynamo's: only there is a checkpoint one
    found.outputs = len(returned(found.graph)[0])
    return found, found.as_lowered(found.rewritten(lowering="aot_eager")[0])


@functools.cache
def choices_of(name: str) -> Choices:
    return choices_in(*traced(name))


def choices_in(found: joint.Joint, graph: Graph) -> Choices:
    seen: list[Choices] = []

    def choose(graph: Graph, alone: Callable[[float], list[Node]], share: float) -> list[Node]:
        values = alone(share)
        seen.append(budgeting.choices_in(graph, values, compat.hint_for(found.fake_mode), MACHINES["cpu"]))
        return values

    with compat.choosing(choose):
        found.split(graph)
    return seen[0]


def split(found: joint.Joint, graph: Graph, choices: Choices, chosen: Choice) -> tuple[GraphModule, GraphModule]:
    """Forward and backward as the partitioner makes them for a choice."""
    names = {n.name for n in budgeting.saved(choices, chosen.kept)}
    with compat.choosing(lambda graph, *_: [n for n in graph.nodes if n.name in names]):
        return found.split(graph)


def held_at_least(name: str) -> int:
    """The least budget, in bytes of a step, that can be held."""
    return choices_of(name).within(0).peak


def held_by(model: nn.Module) -> Held:
    """In the graph that takes most; there is one, but where transformers checkpoints layers."""
    records = compiling.records_of(model)
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
    roles = compiling.roles_in(graph, found.roles)
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


# --------------------------------------------------------------------------------------------------------- the choice


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.floats(0.0, 1.0))
def test_the_partitioner_makes_what_was_chosen(name: str, share: float) -> None:
    """The same values kept, and the same peak."""
    found, graph = traced(name)
    choices = choices_of(name)
    chosen = choices.within(int(share * choices.of(frozenset(choices.before)).peak))
    assume(chosen.kept != choices.before)  # views are kept for what they are of
    assert_made(found, graph, choices, chosen)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.randoms(use_true_random=False))
def test_what_nobody_reads_is_not_kept(name: str, chance: Any) -> None:
    """Where more is kept, what was read to make it again is read no more."""
    choices = choices_of(name)
    able = [n for n in choices.nodes if choices.bytes[n] < math.inf]
    asked = frozenset(choices.before) | {n for n in able if chance.random() < 0.5}
    chosen = choices.of(asked)
    assert chosen.kept <= asked
    assert_made(*traced(name), choices, chosen)


def assert_made(found: joint.Joint, graph: Graph, choices: Choices, chosen: Choice) -> None:
    forward, backward = split(found, graph, choices, chosen)
    given_ = {n.name for n in graph.find_nodes(op="placeholder")}
    kept = [n for n in backward.graph.find_nodes(op="placeholder") if n.name not in given_]
    assert {n.name for n in kept} == {n.name for n in chosen.kept}
    made = [*kept, *(n for n in backward.graph.find_nodes(op="placeholder") if is_tangent(n))]
    hint, machine = choices.hint, choices.machine
    lent = [n for n in made if is_tangent(n) or n.name in {r.name for r in forward.graph.output_node().args[0][:1]}]
    held = halves.gradients_of([n for n in made if is_tangent(n)], hint)
    peaks = [
        walk(Fused(forward.graph, hint), [], outputs(forward.graph), machine).peak,
        walk(Fused(backward.graph, hint), made, outputs(backward.graph), machine, lent, held).peak,
    ]
    assert max(peaks) == chosen.peak


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_budget_takes_no_more_memory_and_a_larger_one_no_more_time(name: str) -> None:
    choices = choices_of(name)
    before = choices.of(frozenset(choices.before))
    found = [choices.within(int(before.peak * share / 20)) for share in range(20, 0, -1)]
    assert found[0] is before
    for larger, smaller in itertools.pairwise(found):
        assert smaller.peak <= larger.peak
        assert smaller.seconds >= larger.seconds
    least = found[-1]
    for share, choice in zip(range(20, 0, -1), found, strict=True):
        assert choice.peak <= before.peak * share / 20 or choice.peak == least.peak
    assert least.peak < before.peak or name == "checkpointed"


class Tiny(nn.Module):
    """Few values: everything that could be kept can be tried."""

    def __init__(self, *widths: int):
        super().__init__()
        self.weights = nn.ParameterList(trained(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = torch.sigmoid(x @ w)
        return x


@pytest.mark.parametrize("widths", [(K, 8, 32, 8), (K, 64, 4, 64), (K, 16, 16, 16)], ids=str)
def test_there_is_no_better_choice(widths: tuple[int, ...]) -> None:
    """Of all sets of values that can be kept: none has as few bytes as a choice, and is quicker."""
    found = joint.trace(Tiny(*widths), x_of())
    graph = found.as_lowered(found.rewritten()[0])
    choices = choices_in(found, graph)
    could = [n for n in choices.nodes if choices.bytes[n] < float("inf")]
    sets = [frozenset(s) for n in range(len(could) + 1) for s in itertools.combinations(could, n)]
    lines = [choices._line(s) for s in sets]
    prices = [0.0, *(s / b for s in choices.seconds.values() for b in choices.bytes.values() if 0 < b < float("inf"))]
    seen = set()
    for price in prices:
        bytes_, seconds = choices._line(choices._cut(price))
        best = min(s + price * b for b, s in lines)
        assert seconds + price * bytes_ <= best * (1 + 1e-6)
        assert seconds <= min(s for b, s in lines if b <= bytes_) * (1 + 1e-6)
        seen.add(bytes_)
    assert len(could) >= 8
    assert len(seen) > 1


@pytest.mark.parametrize("widths", [(K, 8, 32), (K, 64, 4), (K, 48, 16), (K, 8, 64)], ids=str)
def test_no_set_of_values_fits_in_less_time(widths: tuple[int, ...]) -> None:
    """Of all that could be kept, each walked: where one fits a budget, the choice does, and is as quick as any
    that does."""
    found = joint.trace(Tiny(*widths), x_of())
    choices = choices_in(found, found.as_lowered(found.rewritten()[0]))
    could = [n for n in choices.nodes if choices.bytes[n] < float("inf")]
    sets = (frozenset(s) for n in range(len(could) + 1) for s in itertools.combinations(could, n))
    tried = [(choice.peak, choice.seconds) for choice in map(choices.of, sets)]
    budgets = {peak for peak, _ in tried}
    assert len(tried) == 256
    assert len(budgets) > 3
    for least in budgets:
        chosen = choices.within(least)
        assert chosen.peak <= least
        assert chosen.seconds <= min(s for peak, s in tried if peak <= least) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.floats(0.0, 1.1), st.floats(0.0, 1.1))
def test_of_two_budgets_the_smaller_takes_no_more_memory(name: str, one: float, other: float) -> None:
    choices = choices_of(name)
    whole = choices.of(frozenset(choices.before)).peak
    smaller, larger = (choices.within(int(share * whole)) for share in sorted((one, other)))
    assert smaller.peak <= larger.peak
    assert smaller.seconds >= larger.seconds


@pytest.mark.parametrize("name", MODELS)
def test_a_share_of_what_is_kept_never_takes_more_memory(name: str) -> None:
    """PyTorch's activation_memory_budget: no more kept than so much, or the least that can be; and no higher peak."""
    choices = choices_of(name)
    before = choices.of(frozenset(choices.before))
    found = [choices.keeping(share / 20) for share in range(21)]
    assert found[20] is before
    kept = [choices._line(choice.kept)[0] for choice in found]
    fits = [choice for share, choice in enumerate(found) if kept[share] <= kept[20] * share / 20]
    for share, choice in enumerate(found):
        assert choice in fits or kept[share] == kept[0]
        assert choice.peak <= before.peak
    for smaller, larger in itertools.pairwise(fits):
        assert smaller.seconds >= larger.seconds
    assert kept[0] < kept[20] or name == "checkpointed"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), max_size=14))
def test_a_cut_is_the_least_and_nearest_to_the_sink(edges: list[tuple[int, int, int]]) -> None:
    """Of all sets of vertices that have the source and not the sink; of several the one with all that any has."""
    network = Network(7)
    numbers = [network.edge(a, b) for a, b, _ in edges]
    left = [0] * len(network.ends)
    for number, (_, _, capacity) in zip(numbers, edges, strict=True):
        left[number] = capacity
    found = network.apart(0, 1, left)
    sides = [(True, False, *rest) for rest in itertools.product((False, True), repeat=5)]
    costs = {side: sum(c for a, b, c in edges if side[a] and not side[b]) for side in sides}
    least = min(costs.values())
    assert tuple(found) == tuple(map(any, zip(*(s for s in sides if costs[s] == least), strict=True)))


def test_what_nothing_parts_is_an_error() -> None:
    network = Network(2)
    network.edge(0, 1)
    with pytest.raises(ValueError, match="no cut"):
        network.apart(0, 1, [ENDLESS, 0])


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


def choices_of_a_model(model: str, **sizes: int) -> Choices:
    """With adapters, as Dynamo and the passes make its graph."""
    setup = setup_of(model, dtype="fp32", **sizes)
    with patch.object(budgeting, "choices_in", wraps=budgeting.choices_in) as made:
        options = {"peft_fx.memory_budget": "1TB", "peft_fx.machine": "cpu", **STEP}
        peft_fx.explain(with_adapters(make_base(setup), setup), options=options, **make_batch(setup))
    (call,) = made.call_args_list
    return budgeting.choices_in(*call.args)


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


@pytest.mark.parametrize(("model", "streams"), [("llama-tiny", 1), ("roberta", 1), ("t5", 2)])
def test_what_layers_hand_on_is_what_a_checkpoint_keeps(model: str, streams: int) -> None:
    """No mask, no bias of positions, no rotation: none has a product in it. What T5's decoder reads of the encoder is
    made again pointwise."""
    layers, T, hidden = 3, 48, 64
    choices = choices_of_a_model(model, layers=layers, hidden=hidden, tokens=T, vocab=512)
    assert len(choices.handed_on) == streams * (layers - 1)
    assert {tuple(n.meta["val"].shape)[-2:] for n in choices.handed_on} == {(T, hidden)}


def test_layers_by_themselves_reach_less_than_all_at_once() -> None:
    """What is told of at any price can be held, and by what layers hand on the least of a deep model is lower."""
    choices = choices_of_a_model("roberta", layers=6, hidden=128, tokens=512, vocab=512)
    told = [choices.of(choices.at(price / choices.machine.bandwidth)) for price in estimating.PRICES[1:]]
    least = choices.within(0)
    assert least.peak <= min(choice.peak for choice in told)
    assert least.peak < replace(choices, handed_on=frozenset()).within(0).peak


TWICE = """
    import hashlib, json, warnings, torch
    torch.set_num_threads(1)
    import peft_fx
    from peft_fx import compiling
    from tests.oracle import run
    from tests.step.test_budget import MODELS, STEP, integers, x_of

    model = integers(MODELS["plain"](), 0, bound=1)
    warnings.filterwarnings("ignore", "peft_fx cannot hold")
    f = torch.compile(model, backend=peft_fx.backend, options={"peft_fx.memory_budget": BUDGET, **STEP})
    result = run(f, model, (x_of(),))
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in result.items() if t is not None)).hexdigest()
    passes = sum(len(r.outcomes) for r in compiling.records_of(model))
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


def test_what_backward_reads_of_a_written_buffer_is_its_copy() -> None:
    """The copy is kept whatever the budget, and nothing that is made again reads the buffer."""
    choices = choices_of("stateful")
    copies = [n for n in choices.nodes if n.meta.get("recompute") is SAVE]
    written = {n.args[0] for n in choices.graph.find_nodes(op="call_function", target=aten.copy_.default)}
    assert len(written) == 3
    assert len(copies) == 3
    for turn in choices._turns():
        assert turn.after.rebuilt.isdisjoint(copies)
        assert not any(n in written for node in turn.after.rebuilt for n in node.all_input_nodes)


def test_a_region_that_the_user_checkpoints_stays_as_it_is() -> None:
    """None of its values is kept, and backward makes again what it would without a budget."""
    found, graph = traced("checkpointed")
    choices = choices_of("checkpointed")
    theirs = {n.name for n in choices.nodes if "ac_graph_id" in n.meta}
    _, without = found.split(graph)
    made = theirs & {n.name for n in without.graph.nodes if n.op != "placeholder"}
    assert made
    for share in (0.8, 0.0):
        chosen = choices.within(int(share * choices.of(frozenset(choices.before)).peak))
        _, backward = split(found, graph, choices, chosen)
        assert {n.name for n in backward.graph.nodes} & theirs == made
        assert theirs.isdisjoint(n.name for n in chosen.kept)


# ---------------------------------------------------------------------------------------------------- what never is


def test_neither_chance_nor_effects_nor_unknown_ops_are_repeated() -> None:
    graph, q = Graph(), torch.empty(1, 2, 8, 4)
    made = functools.partial(graph.call_function)
    x = graph.placeholder("x")
    x.meta["val"] = q
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert is_repeatable(made(aten.mul.Tensor, (x, x)))
    assert is_repeatable(made(attention, (x, x, x, 0.0, True)))
    assert not is_repeatable(made(attention, (x, x, x, 0.1, True)))
    assert not is_repeatable(made(aten.rand.default, ([2],)))
    assert not is_repeatable(made(aten.copy_.default, (x, x)))
    assert not is_repeatable(made(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0")))
    weight, size = graph.placeholder("w"), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert not is_repeatable(made(aten.convolution.default, (x, weight, None, *size)))  # of the image itself
    assert is_repeatable(made(aten.convolution.default, (made(aten.mul.Tensor, (x, x)), weight, None, *size)))
    kept = made(aten.mul.Tensor, (x, x))
    kept.meta["recompute"] = SAVE
    assert not is_repeatable(kept)


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
