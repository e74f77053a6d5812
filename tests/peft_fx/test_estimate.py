"""estimate(): what it says of graphs whose buffers can be counted by hand, and of small models."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch.fx.experimental.proxy_tensor import make_fx

import peft_fx
from peft_fx import compat, estimating
from peft_fx.cli.configs import without_mask
from peft_fx.cli.estimate import lengths
from peft_fx.estimates import Estimate, Row, quickest
from peft_fx.measuring import memory_of
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.step.fusion import Fused, outputs
from peft_fx.step.halves import gradients_of
from peft_fx.step.memory import PACKED, walk
from peft_fx.step.seconds import kernel_seconds
from tests.support.peft_models import adapt, llama_config

T, K, N = 64, 32, 48


def peak_of(f: Any, *inputs: torch.Tensor) -> int:
    """Bytes at the highest point of a function's graph beside its inputs, the result among them."""
    graph = traced(f, *inputs)
    return walk(Fused(graph, int), [], outputs(graph)).peak


def traced(f: Any, *inputs: torch.Tensor) -> Any:
    return make_fx(f, tracing_mode="fake")(*inputs).graph


def test_a_pointwise_chain_is_one_buffer() -> None:
    x = torch.randn(T, K)
    assert peak_of(lambda x: (x.sin() * 2 + 1).cos(), x) == 4 * T * K


def test_a_product_reads_what_exists() -> None:
    x, w = torch.randn(T, K), torch.randn(K, N)
    assert peak_of(lambda x, w: x @ w, x, w) == 4 * T * N
    assert peak_of(lambda x, w: (2 * x) @ w, x, w) == 4 * (T * K + T * N)


def test_a_kernel_writes_over_what_it_reads_last() -> None:
    x, w = torch.randn(T, K), torch.randn(K, N)
    assert peak_of(lambda x, w: (x @ w).sin(), x, w) == 4 * T * N


def test_two_products_are_alive_together() -> None:
    x, w = torch.randn(T, K), torch.randn(K, N)
    assert peak_of(lambda x, w: (x @ w) * ((x + 1) @ w), x, w) == 4 * (2 * T * N + T * K)


def test_a_product_that_is_only_added_is_never_there_by_itself() -> None:
    """Inductor's addmm. What the sum reads besides is there, and so is a product that something else reads."""
    x, w = torch.randn(T, K), torch.randn(K, N)
    assert kernels_of(lambda x, w, y: y + x @ w, x, w, torch.randn(T, N)) == [1]
    assert kernels_of(lambda x, w, y: y + x @ w, x, w, torch.randn(N)) == [1]
    assert peak_of(lambda x, w: x @ w + (x + 1) @ w, x, w) == 4 * 2 * T * N
    assert kernels_of(lambda x, w: ((y := x @ w) + 1, y), x, w) == [1, 1]
    assert kernels_of(lambda x, w, y: torch.add(y, x @ w, alpha=2), x, w, torch.randn(T, N)) == [1, 1]


def test_a_product_that_is_added_takes_its_seconds() -> None:
    x, w, y = torch.randn(T, K), torch.randn(K, N), torch.randn(T, N)
    graph = Fused(traced(lambda x, w, y: y + x @ w, x, w, y), int)
    (kernel,), machine = graph.kernels, MACHINES["cpu"]
    assert kernel_seconds(graph, kernel, machine) == machine.product(T, K, N, x.dtype, 1)


def test_a_long_sum_is_in_memory_on_its_way() -> None:
    """Inductor writes what reads more than so many values, and orders kernels by the first value that they write."""
    most = compat.most_reads("cpu")
    xs = torch.randn(most + 3, T, K).unbind()

    def f(*xs: torch.Tensor) -> torch.Tensor:
        return functools.reduce(torch.add, xs).sin()

    assert [str(n) for n in Fused(traced(f, *xs[:most]), int).made] == ["sin"]
    assert [str(n) for n in Fused(traced(f, *xs), int).made] == [f"add_{most - 1}", "sin"]


def test_the_order_is_the_one_of_the_lowest_peak() -> None:
    x, w = torch.randn(T, K), torch.randn(3, K, N)

    def f(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = [x @ w[i] for i in range(3)]
        return tuple(y.sum() for y in made)

    assert peak_of(f, x, w) == 4 * (T * N + 3)  # one product at a time, and the sums


def kernels_of(f: Any, *inputs: torch.Tensor) -> list[int]:
    """How many values each kernel of a function's graph makes."""
    return [len(kernel.nodes) for kernel in Fused(traced(f, *inputs), int).kernels]


def test_what_shares_an_input_is_one_kernel() -> None:
    x, w = torch.randn(T, K), torch.randn(K, N)
    assert kernels_of(lambda x, w: (x.sin() @ w, x.cos()), x, w) == [2, 1]


def test_no_kernel_waits_for_itself() -> None:
    x, w = torch.randn(T, K), torch.randn(K, K)

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        return (h @ w).cos() + h

    assert kernels_of(f, x, w) == [1, 1, 1]


@pytest.mark.parametrize(("dim", "there"), [(1, 0), (0, 4 * T * K)])
def test_a_sum_over_rows_reads_what_is_in_memory(dim: int, there: int) -> None:
    """A sum over features runs in the kernel of what it sums."""
    x = torch.randn(T, K)
    sums = 4 * (T, K)[1 - dim]

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dear = x.exp()
        return dear.sum(dim), dear.sin()

    assert peak_of(f, x) == 4 * T * K + there + sums


def test_attention_has_blocks_of_scores_for_each_thread() -> None:
    q = torch.randn(1, 2, 32, 16)
    graph = traced(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), q)
    without, within = (walk(Fused(graph, int), [], outputs(graph), m).peak for m in (None, MACHINES["cpu"]))
    assert within - without == torch.get_num_threads() * 4 * (32 * 32 + 32 * (16 + 2))


def test_what_the_caller_has_too_is_not_written_over() -> None:
    graph = traced(lambda dy: dy.sin(), torch.randn(T, K))
    (dy,) = graph.find_nodes(op="placeholder")
    assert walk(Fused(graph, int), [dy], outputs(graph)).peak == 4 * T * K
    assert walk(Fused(graph, int), [dy], outputs(graph), lent=[dy]).peak == 2 * 4 * T * K


def test_what_the_caller_does_not_let_go_of_is_there_to_the_end() -> None:
    """As autograd has a gradient that another graph made until backward is over."""
    graph = traced(lambda dy: (dy.sin() @ dy.T).cos().sum(), torch.randn(T, K))
    (dy,) = graph.find_nodes(op="placeholder")
    free = walk(Fused(graph, int), [dy], outputs(graph), lent=[dy])
    held = walk(Fused(graph, int), [dy], outputs(graph), lent=[dy], held=[dy])
    assert (free.late, held.late) == (4 * (T * T + 1), 4 * (T * T + 1 + T * K))
    assert free.planned == held.planned


def test_a_gradient_is_another_graphs_where_there_is_no_loss() -> None:
    def tangents(*shapes: tuple[int, ...]) -> list[torch.fx.Node]:
        graph = torch.fx.Graph()
        made = [graph.placeholder(f"tangents_{i}") for i in range(len(shapes))]
        for node, shape in zip(made, shapes, strict=True):
            node.meta["val"] = torch.empty(shape)
        return made

    loss, logits = tangents((), (T, K))
    assert gradients_of([loss, logits], int) == [loss]
    y, z = tangents((T, K), (K, N))
    assert gradients_of([y, z], int) == [y, z]


def test_a_cast_to_the_same_dtype_is_nothing() -> None:
    x, w = torch.randn(T, K), torch.randn(K, N)
    assert peak_of(lambda x, w: torch.ops.prims.convert_element_type(x, torch.float32) @ w, x, w) == 4 * T * N


def test_a_row_has_its_numbers_in_the_loop_over_it() -> None:
    """A softmax: one kernel, and no row's logarithm computed once for each of its features."""
    x, w = torch.randn(T, K), torch.randn(K, K)

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = x.sum(1, keepdim=True).log()
        return (x - rows) @ w

    graph = Fused(traced(f, x, w), int)
    assert [len(kernel.nodes) for kernel in graph.kernels] == [3, 1]
    assert [str(node) for node in graph.made][:2] == ["sum_1", "log"]


def test_rows_that_are_summed_again_are_another_loop() -> None:
    x = torch.randn(T, K)
    assert kernels_of(lambda x: x.sum(1).exp().sum(), x) == [1, 1]


def test_products_of_half_precision_pack_blocks() -> None:
    x = torch.randn(T, T, dtype=torch.bfloat16)
    graph = traced(lambda x: x @ x, x)
    without, within = (walk(Fused(graph, int), [], outputs(graph), m).peak for m in (None, MACHINES["cpu"]))
    assert within - without == torch.get_num_threads() * PACKED


# -------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def found() -> tuple[Any, Estimate]:
    model = tiny()
    return model, peft_fx.estimate(
        model, machine="cpu", variants=["inductor", "peft_fx"], seq_lens=[64, 128], **batch(64)
    )


def tiny() -> Any:
    return adapt(tf.LlamaForCausalLM(llama_config(64, 128, 2)))


def batch(tokens: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": ids}


def test_parts_add_up(found: tuple[Any, Estimate]) -> None:
    for row in found[1].to_dict()["variants"]:
        parts = ("weight_bytes", "adapter_grad_bytes", "optimizer_bytes", "kept_bytes", "transient_bytes")
        assert row["peak_bytes"] == sum(row[p] for p in parts)
        assert row["kept_bytes"] == sum(row["components"].values())


def test_eager_keeps_what_autograd_does() -> None:
    """Of a model without a mask of T×T, whose two dimensions Dynamo computes at once and eager mode does not keep."""
    model = without_mask(tiny())
    row = peft_fx.estimate(model, machine="cpu", variants=["eager"], **batch(64)).rows[0]
    ids = torch.zeros(1, 64, dtype=torch.long)
    kept = memory_of(lambda: model(input_ids=ids, labels=ids).loss, model.zero_grad, torch.device("cpu")).kept
    assert row.kept_bytes == pytest.approx(kept, rel=0.001)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="this torch tells no sizes of an op under a checkpoint")
def test_attention_under_a_checkpoint_takes_its_time() -> None:
    """Of long sequences it is nearly all: two products in forward, five in backward, and two again. Where a generator's
    state is saved for it, the op is an argument of another."""
    seconds = [
        peft_fx.estimate(without_mask(tiny()), machine="h100", variants=[name], **batch(65536)).rows[0].seconds
        for name in ("inductor", "inductor-ckpt")
    ]
    assert seconds[1] > 8 / 7 * seconds[0]


class Broken(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(K, N, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        torch._dynamo.graph_break()
        return y.sin().sum()


def test_what_an_earlier_graph_hands_on_is_kept() -> None:
    (row,) = peft_fx.estimate(Broken(), torch.randn(T, K), machine="cpu", variants=["inductor"]).rows
    assert row.kept_bytes == 4 * T * N


def test_more_tokens_need_more(found: tuple[Any, Estimate]) -> None:
    for name in ("inductor", "peft_fx"):
        short, long = (r for r in found[1].rows if r.name == name)
        assert short.kept_bytes < long.kept_bytes
        assert short.peak_bytes < long.peak_bytes
        assert short.seconds < long.seconds


def test_kept_bytes_are_those_that_explain_tells(found: tuple[Any, Estimate]) -> None:
    report = peft_fx.explain(found[0], options={"peft_fx.machine": "cpu"}, **batch(128))
    kept = {r.name: r.kept_bytes for r in found[1].rows if r.tokens == 128}
    assert kept == {"inductor": report.kept_bytes["before"], "peft_fx": report.kept_bytes["after"]}


def test_a_model_without_weights_gives_the_same_figures(found: tuple[Any, Estimate]) -> None:
    ghost = tiny().to("meta")
    again = peft_fx.estimate(ghost, machine="cpu", variants=["peft_fx"], **batch(64, "meta"))
    assert again.rows == [r for r in found[1].rows if (r.name, r.tokens) == ("peft_fx", 64)]


def deep() -> Any:
    return adapt(tf.LlamaForCausalLM(llama_config(64, 128, 8)))


@pytest.fixture(scope="module")
def choices() -> Estimate:
    given = {"peft_fx.memory_budget": 1, "peft_fx.memory_budget_of": "step"}
    names = ["peft_fx", "peft_fx-budget"]
    return peft_fx.estimate(deep(), machine="cpu", options=given, variants=names, **batch(256))


def test_choices_of_a_deep_model_are_those_of_all_its_layers(
    choices: Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What turns at a price turns in every layer, so two depths tell of any."""
    monkeypatch.setattr(estimating, "DEEP", 100)
    whole = peft_fx.estimate(deep(), machine="cpu", variants=["peft_fx-budget"], **batch(256))
    kept = [r.kept_bytes for r in choices.frontier]
    assert kept == [r.kept_bytes for r in whole.frontier]
    assert len(set(kept)) > 2


def test_an_estimate_as_data_is_the_same_again(choices: Estimate) -> None:
    assert Estimate.from_dict(json.loads(choices.to_json())) == choices


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_a_budget_is_held_as_estimated(choices: Estimate, share: float) -> None:
    """The choice that is made for the whole model takes no longer than what is told of."""
    plain = next(r for r in choices.rows if r.name == "peft_fx")
    beside = plain.weight_bytes + plain.optimizer_bytes
    budget = int(share * (plain.peak_bytes - beside))
    row = next(r for r in choices.within(budget + beside).rows if r.name == "peft_fx-budget")
    assert row.peak_bytes - beside <= budget
    given = {"peft_fx.machine": "cpu", "peft_fx.memory_budget": budget, "peft_fx.memory_budget_of": "step"}
    (held,) = peft_fx.explain(deep(), options=given, **batch(256)).budgets
    assert held.is_held
    assert 0 < held.seconds <= row.seconds - plain.seconds


@pytest.mark.parametrize(
    ("given", "names"),
    [({"optimizer": "adamx"}, "adamw"), ({"variants": ["peft"]}, "inductor"), ({"machine": "h1000"}, "h100")],
)
def test_errors_name_what_is_valid(given: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        peft_fx.estimate(torch.nn.Linear(4, 4), torch.ones(2, 4), **given)


# ------------------------------------------------------------------------------------------------------ conclusions


def rows(name: str, peaks: dict[int, int]) -> list[Row]:
    return [Row(name, tokens, 0, 0, 0, peak, 0, 1.0) for tokens, peak in peaks.items()]


def test_what_fits_and_what_crosses() -> None:
    estimate = Estimate([*rows("inductor", {10: 100, 20: 200}), *rows("full", {10: 150, 20: 160})], "cpu")
    assert estimate.crossover() == 20
    assert estimate.largest(150) == {"inductor": 15, "full": 10}
    assert estimate.largest(50) == {"inductor": 0, "full": 0}


def choice(peak: int, seconds: float) -> Row:
    return Row("peft_fx-budget", 10, 5, 1, 2, peak - 9, 1, seconds, {"MLP": peak - 9})


CHOICES = [choice(100, 1.0), choice(90, 5.0), choice(60, 2.0), choice(80, 1.2), choice(95, 1.5), choice(70, 9.0)]


def test_the_quickest_choices_are_a_line_that_bends_one_way() -> None:
    assert [(r.peak_bytes, r.seconds) for r in quickest(CHOICES)] == [(100, 1.0), (80, 1.2), (60, 2.0)]


@pytest.mark.parametrize(
    ("budget", "peak", "seconds"),
    [(200, 100, 1.0), (100, 100, 1.0), (90, 90, 1.1), (80, 80, 1.2), (70, 70, 1.6), (60, 60, 2.0), (50, 60, 2.0)],
)
def test_within_a_budget_some_layers_are_as_in_one_choice_and_some_as_in_another(
    budget: int, peak: int, seconds: float
) -> None:
    (row,) = Estimate([], "cpu", frontier=CHOICES).within(budget).rows
    assert (row.peak_bytes, row.seconds) == (peak, pytest.approx(seconds))
    assert row.kept_bytes == sum(row.components.values())


def test_what_fits_with_a_budget_is_what_the_least_choice_lets_fit() -> None:
    shorter = [replace(row, tokens=5, kept_bytes=row.kept_bytes // 2) for row in CHOICES]
    estimate = Estimate(rows("peft_fx", {5: 60, 10: 100}), "cpu", frontier=[*shorter, *CHOICES])
    assert estimate.largest(60) == {"peft_fx": 5, "peft_fx-budget": 10}


def test_lengths_double() -> None:
    assert lengths("2048") == [2048]
    assert lengths("2048:10000") == [2048, 4096, 8192, 10000]
