"""A loss in a loop over chunks of rows is the loss, and its gradients, of the whole."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F

import peft_fx
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.passes.graph.nodes import aten
from peft_fx.passes.loss import chunking
from peft_fx.records import records_of
from tests.support import joint, losses, peft_models
from tests.support.losses import LOSSES, Head, K, T, V
from tests.support.oracle import EAGER, Inputs, Run, assert_no_worse, exact, pooled, run, shuffle, to_dtype
from tests.support.strategies import same_at_every_run
from zoo.architectures import made

BF16 = torch.bfloat16
HEADS: dict[str, dict[str, Any]] = {"frozen": {}, "trained": {"train": True, "bias": True}, "adapted": {"rank": 2}}
SEVERAL = ("mean", "weighted_and_smoothed", "capped", "perplexity")  # of these every head
CASES = [(name, head) for name in LOSSES for head in HEADS if name in SEVERAL or head == "frozen"]


@pytest.fixture(autouse=True)
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small losses are worth it, and are done in three chunks."""
    monkeypatch.setattr(chunking, "LEAST", -(1 << 40))
    monkeypatch.setattr(chunking, "chunks", lambda *sizes: 3)
    return


def wide(graph: Graph, rows: int = T, vocabulary: int = V) -> list[Node]:
    """The values of a graph that are as large as the logits; constants take no memory."""
    found = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    large = [n for n in found if n.meta["val"].numel() >= rows * vocabulary and 0 not in n.meta["val"].stride()]
    return [n for n in large if n.target is not aten.full.default]


def differences(case: joint.Joint, graph: Graph, tangent: float = 1.0) -> list[float]:
    """The relative distance of each output from that of the graph as it was; None-ness, dtypes and strides agree."""
    found = []
    for a, b in zip(case.run_on_given(case.graph, tangent), case.run_on_given(graph, tangent), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            found.append(((a - b).norm() / a.norm().clamp_min(1e-300)).item())
    return found


@pytest.mark.parametrize(("name", "head"), CASES)
def test_loss_and_gradients_are_those_of_the_whole(name: str, head: str) -> None:
    """In fp64, to the last digits; and nothing as large as the logits is left in the graph outside of the body."""
    module = Head(LOSSES[name], **HEADS[head]).double()
    case = joint.capture(module, *losses.inputs())
    graph, outcome = case.rewritten()
    assert not outcome.refusals
    (done,) = outcome.losses
    assert (done.name, done.rows, done.vocabulary, done.chunks) == ("head", T, V, 3)
    assert wide(case.graph)
    assert not wide(graph)
    assert max(differences(case, graph, 1.5)) < 1e-14


def under_scale(scale: float, module: nn.Module, args: Inputs, seed: int, *compiled: Callable) -> tuple[Run, ...]:
    """In fp64 and compiled, with other parameters for each seed, and the loss times a scale."""
    shuffle(module, seed)
    ref = exact(module)
    ref64 = run(ref, ref, to_dtype(args, torch.float64), [torch.tensor(scale, dtype=torch.float64)])
    return ref64, *(run(f, module, args, [torch.tensor(scale)]) for f in compiled)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_gradients_in_half_precision_are_no_worse(name: str, head: str) -> None:
    """Within 1.25 of the unchunked graph's own error, over draws of the parameters."""
    module = Head(LOSSES[name], **HEADS[head]).to(BF16)
    args = losses.inputs((4, 60), BF16)
    on, off = (
        torch.compile(module, backend=peft_fx.backend, options=EAGER | {"peft_fx.chunk_loss": chosen})
        for chosen in (True, False)
    )
    assert_no_worse(*pooled(lambda seed: under_scale(1.0, module, args, seed, off, on), seeds=6))


@pytest.mark.parametrize(
    ("name", "codes"),
    [("mean", []), ("sum", []), ("by_a_number_of_items", []), ("smoothed", ["dtype"]), ("with_z_loss", ["dtype"])],
)
def test_fp16_under_a_loss_scale_is_no_worse(name: str, codes: list[str]) -> None:
    """Of many tokens the mean's gradient would be too small for fp16, were it not for the scale: the loop's is that of
    a sum, and there is none where that cannot be."""
    module = Head(LOSSES[name]).half()
    args = losses.inputs((8, 512), torch.float16)
    on, off = (
        torch.compile(module, backend=peft_fx.backend, options=EAGER | {"peft_fx.chunk_loss": chosen})
        for chosen in (True, False)
    )
    assert_no_worse(*pooled(lambda seed: under_scale(65536.0, module, args, seed, off, on), seeds=4))
    assert [r.code for r in peft_fx.explain(on).refusals] == codes


def test_ignored_rows_have_no_gradient() -> None:
    """Exactly zero, every fifth row."""
    module, (x, y) = Head(LOSSES["mean"]), losses.inputs(dtype=torch.float32)
    case = joint.capture(module, x, y)
    graph, _ = case.rewritten()
    (dx,) = (g for g in case.run_on_given(graph) if g is not None and g.shape == x.shape)
    ignored = y == -100
    assert torch.equal(dx[ignored], torch.zeros_like(dx[ignored]))
    assert dx[~ignored].abs().sum(-1).min() > 0


@same_at_every_run(25)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """T, V, chunks, reduction, and which rows are ignored."""
    rows, vocabulary = data.draw(st.integers(2, 40)), data.draw(st.integers(2 * K + 1, 40))
    count = data.draw(st.integers(2, rows))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    smoothing = data.draw(st.sampled_from([0.0, 0.3]))
    labels = data.draw(st.lists(st.integers(-1, vocabulary - 1), min_size=rows, max_size=rows))
    trained = data.draw(st.booleans())

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(K, vocabulary, bias=trained).double().requires_grad_(trained)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            each = F.cross_entropy(self.head(x), y, ignore_index=-1, reduction=reduction, label_smoothing=smoothing)
            return each.square().sum()  # of a row's loss; of the mean it is known behind the last row only

    torch._dynamo.reset()
    x = torch.randn(rows, K, dtype=torch.float64, requires_grad=True)
    case = joint.capture(Drawn(), x, torch.tensor(labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "chunks", lambda *sizes: count)
        graph, outcome = case.rewritten()
    assert outcome.losses
    different = case.run_on_given(case.graph), case.run_on_given(graph)
    for a, b in zip(*different, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_dynamic_sizes_share_a_graph() -> None:
    """Any number of tokens from two for each chunk on, in any shape."""
    module = Head(LOSSES["with_z_loss"], train=True, bias=True).double()
    f = torch.compile(module, backend=peft_fx.backend, options=EAGER, dynamic=True)
    for tokens in ((2, 12), (3, 17), (5, 8)):
        x, y = losses.inputs(tokens)
        one = torch.ones((), dtype=torch.float64)
        assert_no_worse(run(module, module, (x, y), [one]), *[run(f, module, (x, y), [one])] * 2, floor=64)
    assert len(records_of(module)) == 1
    assert peft_fx.explain(f).losses[0].chunks == 3


# ----------------------------------------------------------------------------------------------------- whole models

VOCABULARY = 640
SIZES = {"hidden": 32, "ffn": 48, "layers": 1, "heads": 4, "kv_heads": 2, "head": 8, "vocab": VOCABULARY, "tokens": 64}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: made("LlamaForCausalLM", SIZES),
    "gemma2": lambda: made("Gemma2ForCausalLM", SIZES, final_logit_softcapping=5.0),
    "gemma3": lambda: made("Gemma3ForCausalLM", SIZES),
    "qwen3": lambda: made("Qwen3ForCausalLM", SIZES, tie_word_embeddings=True),
    "gpt2": lambda: made("GPT2LMHeadModel", SIZES),
    "t5": lambda: tf.T5ForConditionalGeneration(peft_models.t5_config(32, 48, 1, VOCABULARY)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str) -> None:
    """Done in chunks where the loss alone is returned, and refused with the cure where the logits are, too."""
    torch.manual_seed(0)
    model = peft_fx.loss_only(peft_models.adapt(MODELS[name](), dtype=torch.float64))
    ids = torch.randint(3, VOCABULARY, (2, 20))
    labels = ids.masked_fill(torch.arange(20) < 5, -100)
    case = joint.capture(model, input_ids=ids, labels=labels)
    graph, outcome = case.rewritten()
    assert [loss.chunks for loss in outcome.losses] == [3]
    assert not outcome.refusals
    assert not wide(graph, 40, VOCABULARY)
    assert max(differences(case, graph)) < 1e-12

    torch._dynamo.reset()
    report = peft_fx.explain(peft_fx.restore(model), input_ids=ids, labels=labels)
    (refusal,) = report.refusals
    assert refusal.code == "logits_returned"
    assert "peft_fx.loss_only(model)" in refusal.detail
    assert not report.losses


def test_all_weights_trained_and_tied() -> None:
    """The embeddings' gradient is that of the lookup and of the logits together."""
    torch.manual_seed(0)
    model = peft_fx.loss_only(MODELS["qwen3"]().double())
    ids = torch.randint(3, VOCABULARY, (2, 20))
    case = joint.capture(model, input_ids=ids, labels=ids)
    graph, outcome = case.rewritten()
    assert outcome.losses
    assert max(differences(case, graph, 0.5)) < 1e-12


def test_without_labels_and_without_gradients_a_model_returns_all() -> None:
    """And its class, its name and its signature are what they were."""
    model = MODELS["llama"]()
    before, signature = type(model), inspect.signature(model.forward)
    assert peft_fx.loss_only(peft_fx.loss_only(model)) is model
    assert isinstance(model, before)
    assert type(model).__name__ == before.__name__
    assert inspect.signature(model.forward) == signature
    ids = torch.randint(3, VOCABULARY, (1, 8))
    assert set(model(input_ids=ids, labels=ids)) == {"loss"}
    assert len(model(input_ids=ids, labels=ids, return_dict=False)) == 1
    assert model(input_ids=ids).logits is not None
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).logits is not None
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)
    assert type(peft_fx.restore(model)) is before
    with pytest.raises(TypeError, match="not yet compiled"):
        peft_fx.loss_only(torch.compile(model))


# ------------------------------------------------------------------------------------------------ what is not done


class Other(Head):
    """A head whose result is not a loss alone."""

    def __init__(self, of: Callable[[Tensor, Tensor, Tensor], Any]):
        super().__init__(of)


NOT_DONE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str, str]] = {
    "returned": (lambda z, y, o: (F.cross_entropy(z, y), z), "logits_returned", "compile a function"),
    "returned in another dtype": (lambda z, y, o: (F.cross_entropy(z, y), z.half()), "logits_returned", "40×50"),
    "an op without a rule": (lambda z, y, o: F.cross_entropy(z.sort(-1).values, y), "unknown_op", "aten.sort"),
    "a mean over rows": (lambda z, y, o: F.cross_entropy(z - z.mean(0), y), "nonlinear", "aten.mean"),
    "a sum over rows": (lambda z, y, o: F.cross_entropy(z / z.exp().sum(0), y), "nonlinear", "aten.sum"),
    "a largest of all": (lambda z, y, o: F.cross_entropy(z - z.amax(), y), "nonlinear", "aten.amax"),
    "sums along rows": (lambda z, y, o: F.cross_entropy(z.cumsum(0), y), "nonlinear", "aten.cumsum"),
    "transposed": (lambda z, y, o: F.cross_entropy(z.reshape(V, -1).t(), y), "shape", "aten.view"),
}


@pytest.mark.parametrize("case", NOT_DONE)
def test_refused_by_code_and_name(case: str) -> None:
    """The graph stays as it was."""
    f, code, text = NOT_DONE[case]
    captured = joint.capture(Other(f).double(), *losses.inputs((2, 20)))
    graph, outcome = captured.rewritten()
    assert not outcome.losses
    (refusal,) = outcome.refusals
    assert (refusal.name, refusal.code) == ("loss of head", code)
    assert text in refusal.detail
    assert max(differences(captured, graph)) == 0


def test_switched_off() -> None:
    case = joint.capture(Head(LOSSES["mean"]), *losses.inputs(dtype=torch.float32))
    graph, outcome = case.rewritten(chunk_loss=False)
    assert not outcome.losses
    assert wide(graph)


def test_a_graph_without_a_loss_is_not_refused() -> None:
    """A layer that makes rows longer is no loss that could be cured."""
    _, outcome = joint.capture(nn.Linear(K, V), torch.randn(T, K, requires_grad=True)).rewritten()
    assert not outcome.refusals


def test_evaluation_is_done_in_chunks_too() -> None:
    """A graph without gradients."""
    module, args = Head(LOSSES["smoothed"]).double().requires_grad_(False), losses.inputs()
    with torch.no_grad():
        f = torch.compile(module, backend=peft_fx.backend, options=EAGER)
        torch.testing.assert_close(f(*args), module(*args))
    assert peft_fx.explain(f).losses


def test_the_report_has_a_row() -> None:
    """Rows x vocabulary, chunks, bytes; and no adapter counted that is none."""
    model = Head(LOSSES["mean"])
    report = peft_fx.explain(model, *losses.inputs(dtype=torch.float32))
    assert "24×50" in str(report)
    assert report.to_dict()["losses"][0]["saved"] == (24 - 8) * 50 * 4 * 2
    assert "0 of 0 adapters" in str(report)
    refused = peft_fx.explain(Other(NOT_DONE["returned"][0]), *losses.inputs(dtype=torch.float32))
    assert "0 of 0 adapters" in str(refused)
    assert "logits_returned" in str(refused)


# --------------------------------------------------------------------------------------------------- how many chunks

CHUNKS, LEAST = chunking.chunks, chunking.LEAST  # as they are, without the fixture


@pytest.mark.parametrize("dynamic", [False, True])
def test_few_rows_are_no_refusal(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to gain, there is nothing to cure; also where more rows may come."""
    monkeypatch.setattr(chunking, "chunks", CHUNKS)
    monkeypatch.setattr(chunking, "LEAST", LEAST)
    f = torch.compile(Other(NOT_DONE["returned"][0]), backend=peft_fx.backend, options=EAGER, dynamic=dynamic)
    f(*losses.inputs(dtype=torch.float32))[0].backward()
    assert not peft_fx.explain(f).refusals


@pytest.mark.parametrize(
    ("machine", "rows", "k", "vocabulary"),
    [("cpu", 2048, 512, 128256), ("cpu", 1024, 256, 64000), ("h100", 8192, 2048, 128256), ("cpu", 8192, 2048, 128256)],
)
def test_chunks_by_bytes_and_by_price(
    machine: str, rows: int, k: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk's logits, fp32 copy and gradient fit the budget, or twice as many chunks would cost a sixteenth more."""
    monkeypatch.setattr(chunking, "LEAST", LEAST)
    of = MACHINES[machine]
    n = CHUNKS(rows, k, vocabulary, BF16, 8 * vocabulary, of)
    assert n >= 4
    assert rows % n == 0
    fits = rows // n * vocabulary * 8 <= max(LEAST, rows * vocabulary * 2 // 16)
    price = [chunking._price(of, m, rows, k, vocabulary, BF16) for m in (1, n, 2 * n)]
    assert price[1] <= chunking.DEARER * price[0]
    assert fits or price[2] > chunking.DEARER * price[0]


def test_a_gigabyte_is_worth_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more seconds it is worth the more chunks there are, up to what the bytes ask for; and then none of them costs
    more than the bytes that it saves."""
    monkeypatch.setattr(chunking, "LEAST", LEAST)
    T, K, V, of = 2048, 512, 128256, MACHINES["h100"]
    worth = [0, 1e-3, 2e-3, math.inf]
    counts = [CHUNKS(T, K, V, BF16, 8 * V, of, w) for w in worth]
    assert counts == sorted(set(counts))
    assert counts[-1] == 64
    for w, n in list(zip(worth, counts, strict=True))[:-1]:
        whole, looped = (chunking._price(of, m, T, K, V, BF16) for m in (1, n))
        assert looped - chunking.DEARER * whole <= w * (1 - 1 / n) * T * V * 8e-9


def test_small_logits_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fit the budget as they are."""
    monkeypatch.setattr(chunking, "LEAST", LEAST)
    assert CHUNKS(512, 64, 1000, torch.float32, 8000, MACHINES["cpu"]) == 1
