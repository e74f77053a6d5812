"""A loss in a loop over chunks of rows is the loss, and its gradients, of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F

import peft_fx
from peft_fx.passes import chunked_loss
from peft_fx.passes.nodes import aten
from tests import joint, losses
from tests.losses import LOSSES, Head, K, T, V
from tests.oracle import EAGER, assert_no_worse, exact, run, shuffle, stack, to_dtype

BF16 = torch.bfloat16
HEADS: dict[str, dict[str, Any]] = {"frozen": {}, "trained": {"train": True, "bias": True}, "adapted": {"rank": 2}}


@pytest.fixture(autouse=True)
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small losses are worth it, and are done in three chunks."""
    monkeypatch.setattr(chunked_loss, "LEAST", -(1 << 40))
    monkeypatch.setattr(chunked_loss, "chunks", lambda *sizes: 3)
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


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
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


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_half_precision_are_no_worse(name: str, head: str) -> None:
    """Within 1.25 of the unchunked graph's own error, over draws of the parameters."""
    module = Head(LOSSES[name], **HEADS[head]).to(BF16)
    args = losses.inputs((4, 60), BF16)
    on, off = (
        torch.compile(module, backend=peft_fx.backend, options=EAGER | {"peft_fx.chunk_loss": chosen})
        for chosen in (True, False)
    )
    runs = []
    for seed in range(6):
        shuffle(module, seed)
        ref = exact(module)
        ref64 = run(ref, ref, to_dtype(args, torch.float64), [torch.ones((), dtype=torch.float64)])
        runs.append((ref64, *(run(f, module, args, [torch.ones(())]) for f in (off, on))))
    assert_no_worse(*(stack(list(column)) for column in zip(*runs, strict=True)))


def test_ignored_rows_have_no_gradient() -> None:
    """Exactly zero, every fifth row."""
    module, (x, y) = Head(LOSSES["mean"]), losses.inputs(dtype=torch.float32)
    case = joint.capture(module, x, y)
    graph, _ = case.rewritten()
    (dx,) = (g for g in case.run_on_given(graph) if g is not None and g.shape == x.shape)
    ignored = y == -100
    assert torch.equal(dx[ignored], torch.zeros_like(dx[ignored]))
    assert dx[~ignored].abs().sum(-1).min() > 0


@settings(max_examples=30, deadline=None)
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
        patch.setattr(chunked_loss, "chunks", lambda *sizes: count)
        graph, outcome = case.rewritten()
    assert outcome.losses
    different = case.run_on_given(case.graph), case.run_on_given(graph)
    for a, b in zip(*different, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, equal_nan=True)
