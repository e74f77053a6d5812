"""What few tokens leave alone; and the sweep's way to predict, against what the passes themselves decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph

import peft_fx
from bench.experiments import sweep
from bench.experiments.sweep import AGAIN, INDUCTOR, Cell
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import MACHINES
from tests.support import joint
from zoo.models import Layer


def described(graph: Graph) -> list[Any]:
    """Every op and what it reads."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [torch.fx.map_arg((n.args, n.kwargs), place.get) for n in graph.nodes]
    return [(n.op, str(n.target), i) for n, i in zip(graph.nodes, inputs, strict=True)]


@pytest.mark.parametrize("dtype", sweep.DTYPES)
def test_few_tokens_leave_every_op_as_it_was(dtype: str) -> None:
    """Where `auto` leaves every adapter in activation form, the graph is what Inductor would have had, op by op; only
    what backward rebuilds is marked."""
    layer = Layer(64, 96, 4, dtype)
    x, _ = layer.batch(32)
    captured = joint.capture(layer.build(), x)
    for form, same in (("auto", True), ("weight", False)):
        graph, outcome = captured.rewritten(form=form)
        assert len(outcome.sites) == 1
        assert (described(graph) == described(captured.graph)) is same, form
        assert outcome.rebuilt


@pytest.mark.parametrize("dtype", sweep.DTYPES)
@pytest.mark.parametrize("T", [16, 200, 512, 4096])
def test_the_sweep_predicts_what_explain_decides(dtype: str, T: int) -> None:
    """The same sizes, dtypes and prices as the passes find in the graph."""
    layer = Layer(256, 384, 4, dtype)
    x, _ = layer.batch(T)
    (site,) = peft_fx.explain(layer.build(), x).sites
    decided = price.decide(MACHINES["cpu"], *sweep.shapes(layer, T), training=True, in_place=True)
    assert (site.forward, site.input_grad, site.reason) == (decided.forward, decided.input_grad, decided.reason)


def test_both_forms_are_chosen_in_that() -> None:
    """Else the test above could not tell them apart."""
    for dtype in sweep.DTYPES:
        layer = Layer(256, 384, 4, dtype)
        decided = [
            price.decide(MACHINES["cpu"], *sweep.shapes(layer, T), training=True, in_place=True) for T in (16, 4096)
        ]
        assert [d.forward for d in decided] == ["activation", "weight"]


def test_every_cell_is_asked_for() -> None:
    """At least 120 cells over the sizes that the sweep is for; each T in one regime."""
    layers = [Layer(*sizes, dtype) for sizes in sweep.SIZES for dtype in sweep.DTYPES]
    assert len(layers) * len(sweep.TOKENS) >= 120
    for layer in layers:
        regimes = sweep._regimes(layer, sweep.TOKENS, MACHINES["cpu"])
        assert sorted(T for regime in regimes for T in regime) == list(sweep.TOKENS)
    for sides, ends in ((("K", "N"), (128, 2048)), (("r",), (1, 256))):
        found = [getattr(layer, side) for layer in layers for side in sides]
        assert (min(found), max(found)) == ends
    assert (min(sweep.TOKENS), max(sweep.TOKENS)) == (16, 8192)


def test_regret_is_against_the_best() -> None:
    """Of the chosen form, whichever it is."""
    forms = (*price.FORMS, "mix")
    cells = [Cell(Layer(1, 1, 1, "fp32"), 1, {}, ratio, 1.0, {}, form) for ratio in (0.5, 2.0) for form in forms]
    assert [(c.chosen, c.taken, c.regret) for c in cells] == [
        ("weight", 0.5, 1.0),
        ("activation", 1.0, 2.0),
        ("mix", 1.0, 2.0),
        ("weight", 2.0, 2.0),
        ("activation", 1.0, 1.0),
        ("mix", 2.0, 2.0),
    ]


def test_ranks_correlate() -> None:
    """1 for the same order, -1 for the reverse, whatever the distances; ties share a rank."""
    assert sweep.spearman([1, 2, 30], [4, 50, 600]) == pytest.approx(1)
    assert sweep.spearman([1, 2, 30], [6, 5, -4]) == pytest.approx(-1)
    assert sweep.spearman([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert abs(sweep.spearman([1, 2, 3, 4], [2, 1, 4, 3])) < 0.9


def test_the_tables_and_the_figure_of_a_sweep(tmp_path: Any) -> None:
    """Of made-up times: plain Inductor takes 1, the weight form T/100."""
    pytest.importorskip("matplotlib")
    layer = {"K": 128, "N": 128, "r": 4, "dtype": "peft"}
    names = {INDUCTOR: 1.0, AGAIN: 1.02, "peft_fx activation": 1.1}
    rows = []
    for T in (16, 8192):
        times = {name: [t, t, t] for name, t in {**names, "peft_fx weight": 100 / T}.items()}
        rows.append({"layer": layer, "cells": [{"T": T, "times": times}]})
    cells = sweep.cells_of(rows, MACHINES["cpu"])
    assert [c.chosen for c in cells] == ["activation", "weight"]
    assert [c.regret for c in cells] == [1, 1]
    said = sweep.summary(cells)
    assert "2 cells, 100.0 %" in said
    assert "more than 5 %: 0 cells" in said
    assert sweep.table(cells).count("\n") == 3
    sweep.draw(cells, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
