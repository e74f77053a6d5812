"""Values chosen to be kept: the walk's peak is within a budget in the least time. And what is never made again."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph

from peft_fx import variants
from peft_fx.passes.analyse.flow import is_tangent
from peft_fx.passes.graph.editor import SAVE
from peft_fx.passes.graph.nodes import aten
from peft_fx.step import halves
from peft_fx.step.budget import Choice, Choices
from peft_fx.step.fusion import Fused, outputs
from peft_fx.step.memory import walk
from peft_fx.step.repeats import is_repeatable
from tests.support import joint
from tests.support.choices import MODELS, K, choices_in, choices_of, choices_of_a_model, split, traced, x_of
from tests.support.spellings import trained


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
    told = [choices.of(choices.at(price / choices.machine.bandwidth)) for price in variants.PRICES[1:]]
    least = choices.within(0)
    assert least.peak <= min(choice.peak for choice in told)
    assert least.peak < replace(choices, handed_on=frozenset()).within(0).peak


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
