"""Each Triton kernel beside its decomposition, on CPU tensors: for a process with TRITON_INTERPRET=1, which
test_kernels.py starts. The interpreter knows of no input precision, and cuts to bfloat16 where a card rounds."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph

from peft_fx.graphs import copy_graph
from peft_fx.kernels import library, trial, triton_merge, triton_narrow
from peft_fx.kernels.merge import WIDER, merge
from peft_fx.kernels.narrow import narrow_both, narrow_in, narrow_out
from peft_fx.passes.graph.nodes import CAST
from peft_fx.retargeting import GPU
from tests.passes.keep.test_in_place_reads import R, Siblings
from tests.peft_fx.test_retargeting import with_products_of_a_cpu
from tests.support import joint
from tests.support.spellings import K, N, trained

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
some = settings(max_examples=6, deadline=None, derandomize=True)
sizes = st.integers(1, 100)


@st.composite
def merges(draw: st.DrawFn, bound: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[int]]:
    """Arguments of a merge: up to three weights of up to two terms, in either order of strides; integers up to a
    bound."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(list(WIDER)))

    def matrix(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        turned = draw(st.booleans())
        size = (cols, rows) if turned else (rows, cols)
        numbers = torch.randint(-bound, bound + 1, size, generator=generator) if bound else None
        found = (torch.randn(size, generator=generator) if numbers is None else numbers).to(dtype)
        return found.t() if turned else found

    weights, left, right, terms = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        M, N = draw(sizes), draw(st.sampled_from([1, 100, 200]))
        weights.append(matrix(M, N, dtype))
        terms.append(draw(st.integers(0, 2)))
        for _ in range(terms[-1]):
            r = draw(st.sampled_from([1, 3, 16, 40]))
            left.append(matrix(M, r, draw(st.sampled_from([FP32, dtype]))))
            right.append(matrix(r, N, draw(st.sampled_from([FP32, dtype]))))
    scales = [draw(st.sampled_from([1.0, -0.5, 2.0 if bound else 1 / 3])) for _ in left]
    return weights, left, right, scales, terms


def merged(arguments: tuple) -> list[Tensor]:
    outs = [torch.full_like(W, float("nan")) for W in merge(*arguments)]
    triton_merge.launch(outs, *arguments)
    return outs


def one_by_one(arguments: tuple) -> Iterator[tuple]:
    """The same, each weight by itself."""
    weights, *rest, terms = arguments
    ends = list(itertools.accumulate(terms))
    for W, n, end in zip(weights, terms, ends, strict=True):
        yield [W], *(own[end - n : end] for own in rest), [n]


@some
@given(merges(bound=2))
def test_merge_is_exact_on_integers(arguments: tuple) -> None:
    assert all(map(torch.equal, merged(arguments), merge(*arguments)))


@some
@given(merges())
def test_merges_in_one_launch_are_each_as_alone(arguments: tuple) -> None:
    """To the bit, and so by the decomposition."""
    for by in (merged, lambda given: merge(*given)):
        alone = [W for one in one_by_one(arguments) for W in by(one)]
        assert all(map(torch.equal, by(arguments), alone))


@some
@given(merges())
def test_merge_rounds_once(arguments: tuple) -> None:
    """What the exact sum is rounded to, or its neighbour where the wider dtype is on another side of the middle."""
    for one in one_by_one(arguments):
        rounds_once(one)


def rounds_once(arguments: tuple) -> None:
    weights, left, right, scales, terms = arguments
    wide = ([t.double() for t in ts] for ts in (weights, left, right))
    exact = decomposed_in_fp64(*wide, scales, terms)
    (got,) = merged(arguments)
    narrow = torch.finfo(got.dtype)
    unit, inner = narrow.eps / 2, torch.finfo(WIDER[got.dtype]).eps / 2
    # of a sum of up to 40 products and 2 terms: half a unit of the wider dtype for each, of the sum of their sizes
    size = decomposed_in_fp64(
        *([t.double().abs() for t in ts] for ts in (weights, left, right)), list(map(abs, scales)), terms
    )
    allowed = unit * exact.abs() * (1 + unit) + 50 * inner * size + unit * narrow.tiny
    assert ((got.double() - exact).abs() <= allowed).all()


def decomposed_in_fp64(
    weights: list[Tensor], left: list[Tensor], right: list[Tensor], scales: list[float], terms: list[int]
) -> Tensor:
    rest = list(zip(left, right, scales, strict=True))
    rows = []
    for W, n in zip(weights, terms, strict=True):
        rows.append(W + sum(s * (L @ R) for L, R, s in rest[:n]))
        rest = rest[n:]
    return torch.cat(rows)


def test_what_is_no_number_stays_what_it_is() -> None:
    """Infinities and NaN of W, and in fp16 what would leave the range stays at its end."""
    for dtype, large in ((BF16, 3e38), (FP16, 65504.0)):
        W = torch.tensor([[float("inf"), -float("inf"), float("nan"), large]], dtype=dtype)
        L, R = torch.ones(1, 1), torch.tensor([[1.0, 1.0, 1.0, 8.0]])
        (got,), (want,) = merged(([W], [L], [R], [1.0], [1])), merge([W], [L], [R], [1.0], [1])
        assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), want.nan_to_num(7.0, 8.0, 9.0))
        assert got[0, 3] == W[0, 3]


@st.composite
def activations(draw: st.DrawFn, tokens: int) -> tuple[list[Tensor], list[list[int]], torch.Generator]:
    """Up to three activations of so many tokens, in either order of strides, and the ranks of what each is multiplied
    by."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    us = []
    for _ in range(draw(st.integers(1, 3))):
        u = torch.randint(-3, 4, (draw(sizes), tokens), generator=generator).to(BF16).t()
        us.append(u if draw(st.booleans()) else u.contiguous())
    return us, [draw(st.lists(st.sampled_from([1, 3, 16, 20]), min_size=1, max_size=2)) for _ in us], generator


def integers(rows: int, ranks: list[int], generator: torch.Generator, dtype: torch.dtype = FP32) -> list[Tensor]:
    """Narrow matrices that are columns of one, of 11 bits: bfloat16 holds 8, and two of them all."""
    whole = torch.randint(-1000, 1000, (rows, sum(ranks)), generator=generator).to(dtype)
    return list(whole.split(ranks, 1))


@some
@given(st.data(), st.integers(0, 90))
def test_narrow_out_is_exact(data: st.DataObject, tokens: int) -> None:
    us, ranks, generator = data.draw(activations(tokens))
    dtype = data.draw(st.sampled_from([FP32, BF16]))
    factors = [F for u, own in zip(us, ranks, strict=True) for F in integers(u.shape[1], own, generator, dtype)]
    scales = [2.0 ** (i - 1) for i in range(len(factors))]
    want = narrow_out(us, factors, [len(own) for own in ranks], scales)
    got = [torch.full_like(t, float("nan")) for t in want]
    if tokens:
        triton_narrow.launch_out(got, us, factors, [len(own) for own in ranks], scales)
    read = (u for u, own in zip(us, ranks, strict=True) for _ in own)
    for u, F, s, a, b in zip(read, factors, scales, want, got, strict=True):
        assert torch.equal(a, (u.double() @ F.double() * s).to(dtype))  # rounded once
        assert torch.equal(a, b)


@some
@given(st.data(), st.sampled_from([1, 63, 300, 600]))
def test_narrow_in_is_exact(data: st.DataObject, tokens: int) -> None:
    """Also where the tokens are split, from 512 on."""
    us, ranks, generator = data.draw(activations(tokens))
    dtype = data.draw(st.sampled_from([FP32, BF16]))
    zs = [z for own in ranks for z in integers(tokens, own, generator, dtype)]
    turned = [i % 2 == 0 for i in range(len(zs))]
    scales = [2.0 ** (i - 1) for i in range(len(zs))]
    want = narrow_in(us, zs, [len(own) for own in ranks], scales, turned)
    got = [torch.full_like(t, float("nan")) for t in want]
    triton_narrow.launch_in(got, us, zs, [len(own) for own in ranks], scales, turned)
    read = (u for u, own in zip(us, ranks, strict=True) for _ in own)
    for u, z, s, turn, a, b in zip(read, zs, scales, turned, want, got, strict=True):
        exact = (z.double().t() @ u.double() * s).to(dtype)
        assert torch.equal(a, exact.t() if turn else exact)
        assert torch.equal(a, b)


@some
@given(st.data(), st.sampled_from([1, 63, 300, 600]), st.sampled_from([8192, 1024]))
def test_narrow_both_is_both(data: st.DataObject, tokens: int, block: int) -> None:
    """To the bit, on integers: with features in one part, and in several."""
    us, ranks, generator = data.draw(activations(tokens))
    factors = [F for u, own in zip(us, ranks, strict=True) for F in integers(u.shape[1], own, generator)]
    dtype = data.draw(st.sampled_from([FP32, BF16]))
    zs = [z for own in ranks for z in integers(tokens, own[::-1], generator, dtype)]
    turned, scales = [i % 2 == 0 for i in range(len(zs))], [2.0 ** (i - 1) for i in range(len(zs))]
    counts = [len(own) for own in ranks]
    asked = factors, counts, scales, zs, counts, scales[::-1], turned
    want = narrow_both(us, *asked)
    assert all(map(torch.equal, want, [*narrow_out(us, *asked[:3]), *narrow_in(us, *asked[3:])]))
    got = [torch.full_like(t, float("nan")) for t in want]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_narrow, "BLOCK", block)
        triton_narrow.launch_both(got[: len(factors)], got[len(factors) :], us, *asked)
    assert all(map(torch.equal, got, want))


class Two(nn.Module):
    """Siblings, an activation function between them and one that reads it: what one rounds reaches the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Siblings(3), Siblings(1)
        self.second.W[0] = nn.Parameter(self.second.W[0].t().contiguous(), requires_grad=False)
        self.second.A[0], self.second.B[0] = trained(N, R), trained(R, K, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.first(x)
        (y,) = self.second(nn.functional.silu(a) * b + c)
        return x + y


def in_fp64(graph: Graph) -> Graph:
    """A joint graph that computes, and reads, nothing coarser."""
    exact = copy_graph(graph)
    for node in exact.find_nodes(op="call_function", target=CAST):
        node.args = (node.args[0], torch.float64)
    return exact


def test_the_gate_holds_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64, y and every gradient err at most 1.25 times as much as in the graph as it was written, where the
    kernels themselves compute all W' and all narrow products."""
    monkeypatch.setattr(library, "has_triton", lambda: True)
    traced = joint.trace(Two(), torch.randn(150, K, dtype=BF16, requires_grad=True))
    graph, _ = traced.rewritten(GPU, form="weight")
    own = [n for n in graph.nodes if n.target in library.KERNELS]
    assert {n.target for n in own} == {merge, narrow_out, narrow_in, narrow_both}
    for node in own:
        node.target = library.KERNELS[node.target][1]
    graphs = in_fp64(traced.graph), traced.graph, with_products_of_a_cpu(graph)
    errors: dict[int, list[Tensor]] = defaultdict(list)
    for seed in range(8):  # the errors in one draw are few and correlated
        inputs = [t / t.shape[-1] ** 0.5 if t.ndim > 1 else t for t in traced.inputs(seed, normal=True)]
        ref, eager, got = (traced.call(g, [t.double() for t in inputs] if g is graphs[0] else inputs) for g in graphs)
        for i, (r, e, o) in enumerate(zip(ref, eager, got, strict=True)):
            if r is not None:
                errors[i].append(torch.stack([(e - r).square().mean(), (o - r).square().mean()]))
    assert len(errors) == 1 + 1 + 8  # y, and the gradients of x, A and B
    for both in errors.values():
        eager, own_error = torch.stack(both).mean(0).sqrt()
        assert own_error <= 1.25 * eager


def test_the_parts_of_a_sum_are_as_many_as_occupy_a_card() -> None:
    """Of few features many, of many features none, and none of few tokens."""
    for wide, T, parts in ((512, 8192, 4), (4096, 8192, 1), (512, 256, 1)):
        u, z, out = torch.empty(T, wide, dtype=BF16), torch.empty(T, 16), torch.empty(16, wide)
        grid, _, constants = triton_narrow.in_arguments([out], [u], [z], [1], [1.0], [False])
        assert (grid[2], constants["SPLIT"]) == (parts, parts > 1)


def test_the_trial_of_a_device() -> None:
    """Sound kernels pass it."""
    assert trial.failure(torch.device("cpu")) == ""
