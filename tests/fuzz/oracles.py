"""What must hold of a rewritten joint graph: the oracles of the fuzzer.

The same graph in fp64 is the truth. Where the graph as it was agrees with it bit for bit, nothing was rounded, and the
rewritten graph must agree too: integers in `exact` and most of `mixed`. Elsewhere it may err little more than the graph
as it was, and than that graph would were each of its ops rounded another way.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.nodes import is_random
from peft_fx.passes.keep import by_chunks
from tests.support import joint
from tests.support.oracle import Run, assert_bit_equal, integers, run, weight_form

EXACT = 2.0**50
DRAWS, MORE = 3, 16
FACTOR, NOISE = 1.25, 4.0  # the gate: an error over eager's own, and over what few numbers leave to chance
SEED = 3  # of what a graph draws
HALVES = {torch.float32, torch.bfloat16, torch.float16}


Results = list["Tensor | None"]


class Invalid(Exception):
    """No program: eager refuses it, or its numbers grow too large to be exact."""


class Failure(AssertionError):
    """An oracle that does not hold; the message says which and where."""


@dataclass
class Case:
    """A program, loaded."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    kind: str
    options: dict[str, str]
    other: Callable[[], nn.Module] | None = None  # the same model in other words
    _traced: joint.Joint | None = field(default=None, repr=False)

    @classmethod
    def of(cls, source: str, name: str = "<fuzz>") -> Case:
        space: dict[str, Any] = {"__name__": name}
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        exec(compile(source, name, "exec"), space)
        return cls(space["Model"], space["inputs"], space["KIND"], space["OPTIONS"], space.get("Other"))

    def module(self) -> nn.Module:
        module, generator = integers(self.make(), seed=1), torch.Generator().manual_seed(4)
        for buffer in module.buffers():
            buffer.copy_(torch.randint(-2, 3, buffer.shape, generator=generator))
        return module

    @property
    def traced(self) -> joint.Joint:
        if self._traced is None:
            try:
                self._traced = joint.trace(self.module(), *integers(self.inputs(), seed=2))
            except Exception as error:
                raise Invalid(str(error)) from error
        return self._traced

    def rewritten(self) -> tuple[Graph, Outcome]:
        """The graph after the passes; copies are made by chunks however small they are."""
        try:
            with patch.object(by_chunks, "LEAST", 0):
                return self.traced.rewritten(**self.options)
        except Invalid:
            raise
        except Exception as error:
            raise Failure(f"the passes raise {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Verdict:
    """What the passes did to a case that passed."""

    rewritten: bool
    refused: bool


def judge(case: Case) -> Verdict:
    """Raises Failure, or Invalid; otherwise says what the passes did."""
    traced = case.traced
    draws = _draws(traced, case.kind)
    graph, outcome = case.rewritten()
    after = [traced.call(graph, d.inputs, SEED) for d in draws]
    for draw, results in zip(draws, after, strict=True):
        _same_kinds(draw.before, results)
        if draw.truth is None:
            _all_equal(draw.before, results)
    if draws[0].truth is not None:
        try:
            _no_worse(draws, after)
        except Failure:  # what one rounding in each place may do is little to go by where a result is a few numbers
            _no_worse([replace(d, noise=_noise(traced, d.inputs, range(MORE))) for d in draws], after)
    if not any(role.trainable for role in traced.roles.values()) and any(s.method == "affine" for s in outcome.sites):
        raise Failure("what is row-wise is told of as an adapter, and nothing is trained")
    weight = any("weight" in (s.forward, s.input_grad) for s in outcome.sites)
    kept_as_it_was = case.options["keep"] == "inductor" or case.options["numerics"] == "strict"
    if not weight and not outcome.factored and (kept_as_it_was or not (outcome.sites or outcome.refusals)):
        inputs = traced.inputs(4, normal=True)
        _all_equal(traced.call(traced.graph, inputs, SEED), traced.call(graph, inputs, SEED), "an untouched graph's ")
    return Verdict(weight, bool(outcome.refusals))


def same_in_other_words(case: Case) -> None:
    """Two spellings of one model are reported alike, whatever each costs as it is written."""
    if case.other is None:
        return
    options = case.options | {"form": "weight"}
    both = replace(case, options=options), replace(case, options=options, make=case.other, _traced=None)
    reports = [_report(c.rewritten()[1]) for c in both]
    if reports[0] != reports[1]:
        raise Failure(f"in other words the report differs: {reports[0]} and {reports[1]}")


def _report(outcome: Outcome) -> Any:
    return sorted((s.name, s.forward) for s in outcome.sites), sorted((r.name, r.code) for r in outcome.refusals)


def holds_compiled(case: Case) -> None:
    """Through torch.compile and the backend: outputs, gradients and buffers of two steps of an exact program equal
    eager's, or AOTAutograd's where those are others: it has zeros for an input that is changed in place and then read
    by nothing; or where eager cannot derive what was written over."""
    torch._dynamo.reset()
    inputs = integers(case.inputs(), seed=2)
    options = {f"peft_fx.{k}": v for k, v in case.options.items()}

    def steps(compiled: Callable[[nn.Module], Callable[..., Any]]) -> list[Run]:
        module = case.module()
        f, found = compiled(module), []

        def call(*args: Any) -> Any:
            torch.manual_seed(SEED)
            return f(*(a.clone() for a in args))  # one may be changed in place

        for _ in range(2):
            step = run(call, module, inputs)
            found.append(replace(step, params=step.params | {n: b.clone() for n, b in module.named_buffers()}))
        return found

    def differ(want: list[Run]) -> AssertionError | None:
        try:
            for ours, theirs in zip(got, want, strict=True):
                assert_bit_equal(ours, theirs)
        except AssertionError as error:
            return error
        return None

    got = steps(lambda module: weight_form(module, **options))
    try:
        unlike = differ(steps(lambda module: module))
    except RuntimeError as error:
        unlike = AssertionError(str(error))
    if unlike is not None:
        torch._dynamo.reset()
        try:
            unlike = differ(steps(lambda module: torch.compile(module, backend="aot_eager")))
        except RuntimeError:  # it keeps the input itself, and finds that it was written
            unlike = None
    if unlike is not None:
        raise Failure(f"compiled, {unlike}") from unlike


def splits(case: Case) -> None:
    """Through Inductor's joint passes and cut in two by its partitioner, the rewritten graph computes what it does in
    one piece: two steps in a row, and two forwards before two backwards."""
    traced = case.traced
    graph, _ = case.rewritten()
    if not traced.outputs or any(is_random(n) for n in graph.nodes):
        return
    inputs = traced.inputs(5)
    try:
        lowered = traced.as_lowered(graph)
        halves = traced.split(lowered)
    except Exception as error:
        raise Failure(f"to lower it raises {type(error).__name__}: {error}") from error
    want = traced.steps(traced.graph if case.kind == "exact" else lowered, inputs, SEED)
    for together in (False, True) if traced.written else (False,):
        _all_equal(want, traced.steps_of(halves, inputs, together), "split, ")


# ------------------------------------------------------------------------------------------------------------ comparing


@dataclass
class Draw:
    """Numbers for a graph's inputs, and what comes of them: from the graph as it was, from the same in fp64 (None where
    the graph as it was is exact), and from that with each op rounded anew."""

    inputs: list[Tensor]
    before: Results
    truth: Results | None = None
    noise: tuple[Results, ...] = ()


def _draws(traced: joint.Joint, kind: str) -> list[Draw]:
    if kind == "exact":
        draws = [Draw(given := traced.inputs(seed), traced.call(traced.graph, given, SEED)) for seed in range(2)]
        if any(not t.abs().max() < EXACT for d in draws for t in d.before if t is not None and t.numel()):
            raise Invalid("numbers too large to be exact")
        return draws
    wide, draws = in_fp64(traced.graph), []
    for seed in range(DRAWS):
        inputs = traced.inputs(seed, bound=1, normal=kind == "real")
        doubled = [t.double() if t.is_floating_point() else t for t in inputs]
        truth = traced.call(wide, doubled, SEED)
        noise = _noise(traced, inputs, [seed])
        draws.append(Draw(inputs, traced.call(traced.graph, inputs, SEED), truth, noise))
    exact = all(_equal(b, t) for d in draws for b, t in zip(d.before, d.truth or [], strict=True))
    if exact and not any(_rounds_in_another_order(traced, d.before) for d in draws):
        return [Draw(d.inputs, d.before) for d in draws]
    return draws


def _noise(traced: joint.Joint, inputs: list[Tensor], seeds: Iterable[int]) -> tuple[Results, ...]:
    """What the graph gives where it rounds at random."""
    wide = GraphModule(traced.module, in_fp64(traced.graph))
    found = []
    for seed in seeds:
        torch.manual_seed(SEED)
        given = [t.double() if t.is_floating_point() else t for t in joint.copies(inputs)]
        found.append([*Rounding(wide, seed).run(*given), *(given[i] for i in traced.written)])
    return tuple(found)


def _rounds_in_another_order(traced: joint.Joint, results: Results) -> bool:
    """Whether sums as large as these results may be inexact in the coarsest dtype of the graph."""
    vals = [n.meta["val"] for n in traced.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    coarsest = max(torch.finfo(v.dtype).eps for v in vals if v.is_floating_point())
    return any(t.abs().max() > 1 / coarsest for t in results if t is not None and t.numel())


class Rounding(torch.fx.Interpreter):
    """A graph in fp64 with each result off by up to half a rounding of the dtype that it had."""

    def __init__(self, module: GraphModule, seed: int):
        super().__init__(module)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: Node) -> Any:
        result, val = super().run_node(n), n.meta.get("val")
        if not isinstance(result, Tensor) or not isinstance(val, Tensor) or not val.is_floating_point():
            return result
        if is_random(n):
            return result
        off = torch.rand(result.shape, generator=self.generator, dtype=result.dtype) * 2 - 1
        return result * (1 + torch.finfo(val.dtype).eps / 2 * off)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or bool((a.double() == b.double()).all())


def _same_kinds(before: Results, after: Results) -> None:
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        kinds = [None if t is None else (t.dtype, t.shape, _steps(t)) for t in (b, a)]
        if kinds[0] != kinds[1]:
            raise Failure(f"result {i} is {kinds[1]}, was {kinds[0]}")


def _steps(t: Tensor) -> list[int]:
    """The strides that something is multiplied by."""
    return [m for n, m in zip(t.shape, t.stride(), strict=True) if n > 1 and t.numel()]


def _all_equal(before: Results, after: Results, prefix: str = "") -> None:
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        if b is not None and not _same(b, a):
            far = f"up to {(b.double() - a.double()).abs().max():.3g} of {b.double().abs().max():.3g}"
            raise Failure(f"{prefix}result {i} of {len(before)} differs by {far}")


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, and where one is no number the other is none."""
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _no_worse(draws: list[Draw], after: list[Results]) -> None:
    """Errors of each result over all draws, which are few and small."""

    def error(i: int, results: list[tuple[Results, ...]]) -> float:
        off = [(r[i].double() - d.truth[i]).flatten() for d, rs in zip(draws, results, strict=True) for r in rs]
        return torch.cat(off).square().mean().sqrt().item() if off[0].numel() else 0.0

    before, noise, made = [(d.before,) for d in draws], [d.noise for d in draws], [(r,) for r in after]
    for i, first in enumerate(draws[0].before):
        if first is None or not first.is_floating_point() or not all(d.before[i].isfinite().all() for d in draws):
            continue
        allowed = FACTOR * error(i, before) + NOISE * error(i, noise)
        if not error(i, made) <= allowed:
            told = f"errs by {error(i, made):.3g}, over {allowed:.3g}; {error(i, before):.3g} as it was"
            raise Failure(f"result {i} of {len(before[0])} {told}")


def in_fp64(graph: Graph) -> Graph:
    """The same graph with every floating dtype made fp64; random numbers are drawn as they were."""
    copied = joint.copy_graph(graph)

    def wide(arg: Any) -> Any:
        return torch.float64 if arg in HALVES else arg

    for node in copied.nodes:
        if node.op == "call_function" and not is_random(node):
            node.args = torch.fx.node.map_aggregate(node.args, lambda a: wide(a) if isinstance(a, torch.dtype) else a)
            node.kwargs = torch.fx.node.map_aggregate(
                node.kwargs, lambda a: wide(a) if isinstance(a, torch.dtype) else a
            )
    for node in [n for n in copied.nodes if is_random(n)]:
        with copied.inserting_after(node):
            drawn = copied.call_function(torch.ops.prims.convert_element_type.default, (node, torch.float64))
        node.replace_all_uses_with(drawn, delete_user_cb=lambda user, drawn=drawn: user is not drawn)
    return copied
