"""Tests of the tests: a rule that is broken on purpose must turn the integer oracle red."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.fx import Node

from peft_fx.passes.analyse import affine_rules, algebra, linear_rules, maps, refusals, regions, sums
from peft_fx.passes.analyse.algebra import ONE, Matrix, Scale, Term
from peft_fx.passes.analyse.candidates import SumCandidate
from peft_fx.passes.graph import editor
from peft_fx.passes.graph.nodes import aten, is_rounded, numel, shape
from peft_fx.passes.keep import dense_grads
from peft_fx.passes.loss import chunking, loop, row_rules
from peft_fx.passes.normalise import fused_layers
from peft_fx.passes.rewrite import materialise, merge_maps, merge_sums, rounding
from tests import affine_spellings, dither, joint, losses, spellings
from tests.spellings import Case

K = 24  # square weights, so that a lost transpose still has the right shape


class Adapted(nn.Module):
    """Frozen W with a bias and two adapters, in the spellings that the mutants below break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K).requires_grad_(False)
        self.W2 = nn.Parameter(torch.randn(K, K), requires_grad=False)
        for name, sizes in {"A": (K, 3), "B": (3, K), "C": (K, 2), "D": (2, K), "E": (K, 3), "F": (3, K)}.items():
            setattr(self, name, nn.Parameter(torch.randn(*sizes)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x) + ((x @ self.A) @ self.B) * 2 - (x @ self.C) @ self.D
        h = torch.relu(h)
        low = (h @ self.E) @ -self.F
        y = torch.add(torch.addmm(low, h, self.W2, beta=4, alpha=2), (h @ self.C) @ self.D, alpha=2)
        z = (self.W2 @ h.t() + self.F.t() @ (self.E.t() @ h.t())).t()
        return y + torch.relu(z) + torch.relu(z - h)


@cache
def captured() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Adapted().double(), torch.randn(40, K, dtype=torch.float64, requires_grad=True))


def holds() -> bool:
    """The integer oracle, on y and every gradient; a pass that fails or finds nothing does not hold either."""
    case = captured()
    try:
        graph, outcome = case.rewritten(form="weight")
        weight = sum((s.forward == "weight") + (s.input_grad == "weight") for s in outcome.sites)
        return weight == 6 and not outcome.refusals and joint.equal(case.run(case.graph), case.run(graph))
    except Exception:
        return False


def test_the_rule_as_it_is_holds() -> None:
    assert holds()


Mutation = Callable[[], Any]
MUTANTS: dict[str, Mutation] = {}


def mutant(make: Mutation) -> Mutation:
    MUTANTS[make.__name__] = make
    return make


def _rule(op: Any, change: Callable[[list[Any] | None], Any]) -> Any:
    """The transfer function of one op, with its answer changed."""
    real = linear_rules.LINEAR[op]
    return patch.dict(linear_rules.LINEAR, {op: lambda node: change(real(node))})


@mutant
def scale_dropped() -> Any:
    return _rule(aten.mul.Tensor, lambda parts: parts and [replace(p, scale=ONE) for p in parts])


@mutant
def scale_squared() -> Any:
    return _rule(aten.mul.Tensor, lambda parts: parts and [replace(p, scale=p.scale * p.scale) for p in parts])


@mutant
def alpha_ignored() -> Any:
    return _rule(aten.add.Tensor, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def subtraction_added() -> Any:
    return _rule(aten.sub.Tensor, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def negation_ignored() -> Any:
    return _rule(aten.neg.default, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def beta_ignored() -> Any:
    return _rule(aten.addmm.default, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def permute_taken_for_a_reshape() -> Any:
    return _rule(aten.permute.default, lambda parts: [replace(p, dims=None) for p in parts])


@mutant
def factors_in_the_wrong_order() -> Any:
    real = merge_sums.Rewriter._multiply
    return patch.object(merge_sums.Rewriter, "_multiply", lambda self, fs: self.edit.flip(real(self, fs)))


@mutant
def weight_left_out() -> Any:
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, Scale(0.0), terms, dtype)

    return patch.object(merge_sums.Rewriter, "_merge", merge)


@mutant
def scale_on_the_weight_too() -> Any:
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, terms[0][0], terms, dtype)

    return patch.object(merge_sums.Rewriter, "_merge", merge)


@mutant
def one_adapter_of_two_forgotten() -> Any:
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, inner, terms[:1], dtype)

    return patch.object(merge_sums.Rewriter, "_merge", merge)


@mutant
def plain_weight_in_the_input_gradient() -> Any:
    real = merge_sums.Rewriter._merged_operand

    def operand(self: Any, group: SumCandidate) -> Any:
        return group.operand if group.backward else real(self, group)

    return patch.object(merge_sums.Rewriter, "_merged_operand", operand)


@mutant
def merged_weight_untransposed() -> Any:
    real = merge_sums.Rewriter._as_operand

    def operand(self: Any, merged: Any, weight: Matrix, node: Any) -> Any:
        return real(self, merged, replace(weight, flipped=False), node)

    return patch.object(merge_sums.Rewriter, "_as_operand", operand)


@mutant
def one_merged_weight_for_all() -> Any:
    real = merge_sums.Rewriter._merged_operand

    def operand(self: Any, group: SumCandidate) -> Any:
        return self.__dict__.setdefault("first", real(self, group))

    return patch.object(merge_sums.Rewriter, "_merged_operand", operand)


@mutant
def bias_lost() -> Any:
    real = merge_sums.Rewriter._base

    def base(self: Any, node: Any, merged: Any, left: bool, bias_gone: bool, copies: Any) -> Any:
        return real(self, node, merged, left, node.target in merge_sums.PLAIN, copies)

    return patch.object(merge_sums.Rewriter, "_base", base)


@mutant
def other_addend_lost() -> Any:
    real = merge_sums.Rewriter._without

    def without(self: Any, node: Any, i: int, copies: Any) -> Any:
        return self.edit.call(aten.mul.Tensor, real(self, node, i, copies), 0)

    return patch.object(merge_sums.Rewriter, "_without", without)


@mutant
def adapter_kept_beside_the_merged_weight() -> Any:
    def without(self: Any, node: Any, i: int, copies: Any) -> Any:
        return self.edit.call(node.target, *(copies.get(a, a) for a in node.args), **node.kwargs)

    return patch.object(merge_sums.Rewriter, "_without", without)


@mutant
def different_inputs_taken_for_one() -> Any:
    def shares(term: Term, prefix: tuple[Matrix, ...]) -> bool:
        return len(term.factors) > len(prefix) and all(
            f.shape == p.shape for f, p in zip(term.factors, prefix, strict=False)
        )

    return patch.object(sums, "shares_left", shares)


@mutant
def ratio_not_divided() -> Any:
    return patch.object(algebra.Scale, "over", lambda self, other: self)


@contextmanager
def applied(name: str) -> Iterator[None]:
    with MUTANTS[name]():
        yield


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_oracle_red(name: str) -> None:
    assert holds()
    with applied(name):
        assert not holds(), f"the mutant {name} lives"


# ----------------------------------------------------------------------------------------------------------------
# row-wise affine maps


def affine_cases() -> list[tuple[str, Case]]:
    """Spellings with K = N, so that what is done at the wrong side still has the right shape, and near misses."""
    vectors = {"l": (K,), "c": (K,)}
    low_rank = {"A": (K, 4), "B": (4, K)}
    x = spellings.x(2, 5, K)
    spells: dict[str, tuple[Any, Any]] = {
        "scale_and_shift": (affine_spellings.scale_and_shift, vectors),
        "shift_then_scale": (affine_spellings.shift_then_scale, vectors),
        "scale_both_sides": (affine_spellings.scale_both_sides, {"g": (K,), "l": (K,)}),
        "constant_between": (affine_spellings.constant_between, low_rank | {"g": (K,)}),
        "loreft": (affine_spellings.loreft, {"R": (K, 4), "R2": (K, 4), "c": (4,)}),
        "rotation_of_pairs": (affine_spellings.rotation_of_pairs, vectors),
        "oft_after": (affine_spellings.oft_after, {"M": (8, K // 8, K // 8)}),
        "gralora": (affine_spellings.gralora, {"M": (2, K // 2, 4), "P": (2, 4, K // 2)}),
        "roll": (affine_spellings.roll, {"l": (K,)}),
        "vector_along_tokens": (affine_spellings.vector_along_tokens, {"t": (5, 1)}),
        "tokens_flipped": (affine_spellings.tokens_flipped, {"l": (K,)}),
        "frozen_vectors": (affine_spellings.frozen_vectors, {"l": (K,)}),
    }

    def build(spell: Any, trained: Any) -> Callable[[], nn.Module]:
        return lambda: affine_spellings.Layer(spell, trained, {"f": (K,)}, K=K, N=K)

    whole = ("index_select", "qkv", "chained", "x_transposed", "adapters_of_a_split")
    return [
        *((name, Case(name, build(*spec), x)) for name, spec in spells.items()),
        *((case.id, case) for case in affine_spellings.SPELLINGS if case.id in whole),
    ]


def _sites(outcome: Any) -> list[tuple[str, str, str]]:
    return [(s.name, s.forward, s.input_grad) for s in outcome.sites]


@cache
def affine_captured() -> list[tuple[joint.Joint, list[tuple[str, str, str]]]]:
    """Joint graphs, and the sites that the rules as they are find in them."""
    found = []
    for _, case in affine_cases():
        torch._dynamo.reset()
        module, inputs = case.make(torch.float64)
        captured = joint.capture(module, *inputs)
        found.append((captured, _sites(captured.rewritten(form="weight")[1])))
    return found


def affine_holds() -> bool:
    """The integer oracle on y and every gradient, and the same sites."""
    captured = affine_captured()
    try:
        for case, sites in captured:
            graph, outcome = case.rewritten(form="weight")
            if _sites(outcome) != sites or not joint.equal(case.run(case.graph), case.run(graph)):
                return False
    except Exception:
        return False
    return True


AFFINE_MUTANTS: dict[str, Mutation] = {}


def affine_mutant(make: Mutation) -> Mutation:
    AFFINE_MUTANTS[make.__name__] = make
    return make


def _again(op: Any, change: Callable[[materialise.Materialise, Node, dict[Node, Node], int], Any]) -> Any:
    """The replay of one op, done another way."""
    real = materialise.Materialise._call

    def call(self: materialise.Materialise, node: Node, operands: dict[Node, Node], count: int) -> Any:
        return (change if node.target is op else real)(self, node, operands, count)

    return patch.object(materialise.Materialise, "_call", call)


def _product(change: Callable[[materialise.Materialise, Node, materialise.Value], Any]) -> Any:
    real = materialise.Materialise._product
    return patch.object(materialise.Materialise, "_product", lambda self, node: change(self, node, real(self, node)))


@affine_mutant
def constant_dropped() -> Any:
    real = materialise.Materialise.matrix
    return patch.object(materialise.Materialise, "matrix", lambda self, node: (real(self, node)[0], None))


@affine_mutant
def constant_of_a_product_left_unmultiplied() -> Any:
    """`(x+1)·W` as `x·W + 1`."""

    def change(self: materialise.Materialise, node: Node, found: materialise.Value) -> materialise.Value:
        (before,) = (self.values[n].constant for n in self.rows.operands(node)[-1:])
        if before is None or numel(shape(before)) != numel(shape(found.constant)):
            return found
        return replace(found, constant=self.edit.call(aten.reshape.default, before, shape(found.constant)))

    return _product(change)


@affine_mutant
def bias_of_a_product_lost() -> Any:
    return _product(lambda self, node, found: replace(found, constant=None) if len(node.args) == 3 else found)


@affine_mutant
def diagonal_on_the_wrong_side() -> Any:
    """`W·d` for `d·W`."""

    def change(self: materialise.Materialise, node: Node, found: materialise.Value) -> materialise.Value:
        rows = found.rows
        if rows.target is not aten.mul.Tensor or len(set(shape(rows))) > 1:  # type: ignore
            return found
        return replace(found, rows=self.edit.call(rows.target, rows.args[0], rows.args[1].args[0]))  # type: ignore

    return _product(change)


@affine_mutant
def vector_before_the_product_ignored() -> Any:
    real = materialise.Materialise._diagonal
    return patch.object(
        materialise.Materialise, "_diagonal", lambda self, node, found: real(self, node, found) and found.rows
    )


@affine_mutant
def difference_taken_for_a_sum() -> Any:
    sub, add = aten.sub.Tensor, aten.add.Tensor
    return _again(sub, lambda self, node, operands, count: self.edit.call(add, *(operands[n] for n in node.args)))


@affine_mutant
def subtracted_rows_keep_their_sign() -> Any:
    real = materialise.Materialise._sum

    def sum_(self: materialise.Materialise, node: Node) -> materialise.Value:
        found = real(self, node)
        a, b = node.args[:2]
        return replace(found, rows=self.values[b].rows) if self.rows.flow.is_weight(a) else found  # type: ignore

    return patch.object(materialise.Materialise, "_sum", sum_)


def _skipped(op: Any) -> Any:
    return _again(op, lambda self, node, operands, count: operands[node.args[0]])  # type: ignore[index]


@affine_mutant
def negation_of_features_ignored() -> Any:
    return _skipped(aten.neg.default)


@affine_mutant
def order_of_dimensions_ignored() -> Any:
    def change(self: materialise.Materialise, node: Node, operands: dict[Node, Node], count: int) -> Any:
        sizes = self._sizes(self.rows.of[node].dims, count)
        return self.edit.call(aten.reshape.default, operands[node.args[0]], sizes)  # type: ignore[index]

    return _again(aten.permute.default, change)


@affine_mutant
def order_of_features_ignored() -> Any:
    return _skipped(aten.index.Tensor)


@affine_mutant
def joined_in_the_wrong_order() -> Any:
    def change(self: materialise.Materialise, node: Node, operands: dict[Node, Node], count: int) -> Any:
        parts = [operands[n] for n in reversed(node.args[0])]  # type: ignore[union-attr, arg-type, index]
        return self.edit.call(node.target, parts, *node.args[1:])

    return _again(aten.cat.default, change)


@affine_mutant
def tokens_taken_for_features() -> Any:
    return patch.object(affine_rules, "_features", lambda dims, i: True)


@affine_mutant
def every_weight_taken_for_the_same_at_all_tokens() -> Any:
    return patch.object(affine_rules, "_same", lambda weight, dims: True)


@affine_mutant
def order_of_tokens_not_looked_at() -> Any:
    return patch.object(regions, "in_order", lambda dims: True)


@affine_mutant
def next_layer_taken_for_the_same() -> Any:
    return patch.object(maps.AffineMaps, "_cut", lambda self, node, row, trained, frozen: row)


@affine_mutant
def frozen_vectors_taken_for_adapters() -> Any:
    return patch.object(maps.AffineMaps, "is_adapted", lambda self, row: bool(row.frozen))


@affine_mutant
def addend_kept_beside_the_merged_product() -> Any:
    return patch.object(merge_maps, "_drop", lambda build, end: None)


@affine_mutant
def strides_not_kept() -> Any:
    return patch.object(editor.Editor, "laid_out", lambda build, node, strides: node)


@affine_mutant
def columns_of_parts_mixed_up() -> Any:
    """Each part of a whole result is taken from where another one is."""
    real = fused_layers._columns

    def columns(node: Node) -> Any:
        found = real(node)
        return dict(zip(found, [*found.values()][::-1], strict=True))

    return patch.object(fused_layers, "_columns", columns)


@affine_mutant
def columns_of_a_diagonal_ignored() -> Any:
    """`I[:, a:b]·M` is put at the first rows."""
    real = materialise.Materialise._diagonal

    def diagonal(self: materialise.Materialise, node: Node, found: materialise.Value) -> materialise.Diagonal | None:
        held = real(self, node, found)
        return held and replace(held, columns=(0, held.width))

    return patch.object(materialise.Materialise, "_diagonal", diagonal)


def test_the_affine_rules_as_they_are_hold() -> None:
    forward = [[f for _, f, _ in sites] for _, sites in affine_captured()]
    left = {"vector_along_tokens", "tokens_flipped", "frozen_vectors"}
    for (name, _), forms in zip(affine_cases(), forward, strict=True):
        assert set(forms) == (set() if name in left else {"weight"}), name
    assert affine_holds()


@pytest.mark.parametrize("name", AFFINE_MUTANTS)
def test_an_affine_mutant_turns_the_oracle_red(name: str) -> None:
    affine_captured()  # by the rules as they are
    with AFFINE_MUTANTS[name]():
        assert not affine_holds(), f"the mutant {name} lives"


# ----------------------------------------------------------------------------------------------------------------
# adapters finer than their base


class Finer(nn.Module):
    """A base in bf16, adapters in fp32 of numbers that W' has no bits for, and a reader that rounds beside one that
    does not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("V", "W"):
            setattr(self, name, nn.Parameter(torch.randn(K, K, dtype=torch.bfloat16), requires_grad=False))
        for name, sizes in {"A": (K, 3), "B": (3, K), "scale": (K,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(*sizes)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x @ self.W + x.float() @ self.A @ self.B * 256
        return y, y.to(x.dtype), (x @ self.V) * (self.scale * 257)


@cache
def finer_captured() -> joint.Joint:
    return joint.capture(Finer(), torch.randn(40, K, dtype=torch.bfloat16))


def finer_holds() -> bool:
    """The integer oracle."""
    case = finer_captured()
    graph, _ = case.rewritten(form="weight")
    return joint.equal(case.run(case.graph), case.run(graph))


FINER_MUTANTS: dict[str, Mutation] = {}


def finer_mutant(make: Mutation) -> Mutation:
    FINER_MUTANTS[make.__name__] = make
    return make


@contextmanager
def _is_rounded(rule: Callable[..., bool], *modules: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "is_rounded", rule))
        yield


@finer_mutant
def everything_taken_for_rounded() -> Any:
    return _is_rounded(lambda *asked: True, sums, regions)


@finer_mutant
def every_region_taken_for_rounded() -> Any:
    return _is_rounded(lambda *asked: True, regions)


@finer_mutant
def one_reader_that_rounds_taken_for_all() -> Any:
    def rule(node: Node, dtype: torch.dtype, among: Any) -> bool:
        return any(is_rounded(n, dtype, among) for n in (node, *node.users) if n.op != "output")

    return _is_rounded(rule, sums, regions)


def test_the_rule_of_finer_adapters_as_it_is_holds() -> None:
    assert [r.code for r in finer_captured().rewritten()[1].refusals] == ["dtype", "dtype"]
    assert finer_holds()


@pytest.mark.parametrize("name", FINER_MUTANTS)
def test_a_mutant_of_the_rule_of_finer_adapters_breaks_it(name: str) -> None:
    finer_captured()
    with FINER_MUTANTS[name]():
        assert not finer_holds(), f"the mutant {name} lives"


# ----------------------------------------------------------------------------------------------------------------
# what an adapter is


class Layers(nn.Module):
    """A trained layer beside a frozen one, one behind it, and one that joins it through a ReLU; a LoRA of it."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(K, 2 * K), requires_grad=False)
        shapes = {"beside": (K, 2 * K), "behind": (2 * K, 5), "other": (K, K), "joins": (K, 2 * K), "A": (K, 3)}
        for name, sizes in (shapes | {"B": (3, 2 * K)}).items():
            setattr(self, name, nn.Parameter(torch.randn(*sizes)))

    def forward(self, x: torch.Tensor) -> Any:
        y = (x @ self.W + x @ self.beside).relu()
        z = x @ self.W + torch.relu(x @ self.other) @ self.joins
        return y, z.relu(), (x @ self.W) @ self.behind, (x @ self.W + x @ self.A @ self.B).relu()


@cache
def layers_captured() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Layers(), torch.randn(9, K, requires_grad=True))


def nothing_but_the_adapter() -> bool:
    outcome = layers_captured().rewritten(form="weight")[1]
    return [(s.rank, s.method) for s in outcome.sites] == [(3, "low-rank")] and not outcome.refusals


ADAPTER_MUTANTS = {
    "any_size_is_added": (sums.adapters, "adds", lambda *args: True),
    "nothing_is_added": (sums.adapters, "adds", lambda *args: False),
    "any_layer_is_refused": (refusals.sums, "stands_beside", lambda *args: True),
    "any_layer_transforms": (regions, "_is_a_layer", lambda *args: False),
}


def test_the_definition_of_an_adapter_as_it_is_holds() -> None:
    assert nothing_but_the_adapter()


@pytest.mark.parametrize("name", ADAPTER_MUTANTS)
def test_a_mutant_of_the_definition_of_an_adapter_breaks_it(name: str) -> None:
    module, attribute, broken = ADAPTER_MUTANTS[name]
    layers_captured()
    with patch.object(module, attribute, broken):
        assert not nothing_but_the_adapter(), f"the mutant {name} lives"


# ----------------------------------------------------------------------------------------------------------------
# dithered rounding


DITHER_MUTANTS: dict[str, Mutation] = {}


def dither_mutant(make: Mutation) -> Mutation:
    DITHER_MUTANTS[make.__name__] = make
    return make


def _hash(change: Callable[[Any, Node, Node], Node]) -> Any:
    """The noise of each index, changed; `change` is given the index, too."""
    real = rounding.hash_of
    return patch.object(rounding, "hash_of", lambda build, index: change(build, index, real(build, index)))


@dither_mutant
def truncated() -> Any:
    return _hash(lambda build, index, noise: build.call(aten.mul.Tensor, noise, 0))


@dither_mutant
def always_up() -> Any:
    return _hash(lambda build, index, noise: build.call(aten.bitwise_or.Scalar, noise, 0xFFFF))


@dither_mutant
def noise_of_half_an_ulp() -> Any:
    return _hash(lambda build, index, noise: build.call(aten.bitwise_and.Scalar, noise, 0x0FFF))


@dither_mutant
def index_for_a_hash() -> Any:
    return _hash(lambda build, index, noise: index)


@dither_mutant
def two_rounds_of_the_hash() -> Any:
    return patch.object(rounding, "ROUNDS", rounding.ROUNDS[:2])


@dither_mutant
def noise_of_the_layout() -> Any:
    real = rounding._index
    return patch.object(rounding, "_index", lambda build, node, transposed: real(build, node, False))


@dither_mutant
def a_bit_too_many_dropped() -> Any:
    return patch.dict(rounding.LACKS, {dtype: bits + 1 for dtype, bits in rounding.LACKS.items()})


@dither_mutant
def a_bit_left_to_the_cast() -> Any:
    return patch.dict(rounding.LACKS, {dtype: bits - 1 for dtype, bits in rounding.LACKS.items()})


@dither_mutant
def every_number_taken_for_normal() -> Any:
    real = editor.Editor.call

    def call(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is aten.where.self and args[1].target is aten.view.dtype:
            return args[1]
        return real(self, target, *args, **kwargs)

    return patch.object(editor.Editor, "call", call)


@dither_mutant
def infinite_in_half_precision() -> Any:
    return patch.object(rounding, "_saturated", lambda build, node, dtype: node)


@dither_mutant
def infinities_made_finite() -> Any:
    real = rounding._saturated
    return patch.object(rounding, "_saturated", lambda *args: real(*args).args[2])


def test_dithered_rounding_as_it_is_holds() -> None:
    assert dither.holds()


@pytest.mark.parametrize("name", DITHER_MUTANTS)
def test_a_mutant_of_dithered_rounding_breaks_it(name: str) -> None:
    with DITHER_MUTANTS[name]():
        assert not dither.holds(), f"the mutant {name} lives"


# ------------------------------------------------------------------------------------------------------- moments


class Moved(nn.Module):
    """Layers with vectors before and behind and low-rank factors, the second one behind a constant of each feature:
    all gradients from two products over tokens."""

    def __init__(self) -> None:
        super().__init__()
        for i in "12":
            for name, sizes in {"W": (K, K), "A": (K, 3), "B": (3, K), "g": (K,), "c": (K,)}.items():
                setattr(self, name + i, nn.Parameter(torch.randn(*sizes), requires_grad=name not in "Wc"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu((x @ self.W1 + ((x @ self.A1) @ self.B1) * 2) * self.g1)
        h = h + self.c2
        return (h @ self.W2 + (h @ self.A2) @ self.B2) * self.g2 + h


@cache
def moved() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Moved().double(), torch.randn(40, K, dtype=torch.float64, requires_grad=True))


def moments_hold() -> bool:
    """The integer oracle, where both layers have a dense gradient."""
    case = moved()
    try:
        graph, outcome = case.rewritten(form="weight")
        dense = [s.adapter_grad for s in outcome.sites] == ["dense", "dense"]
        return dense and joint.equal(case.run(case.graph), case.run(graph))
    except Exception:
        return False


def test_moments_as_they_are_hold() -> None:
    assert moments_hold()


MOMENT_MUTANTS: dict[str, Mutation] = {}


def moment_mutant(make: Mutation) -> Mutation:
    MOMENT_MUTANTS[make.__name__] = make
    return make


@moment_mutant
def moment_of_the_other_side() -> Any:
    real = dense_grads._Gradient._over_tokens
    return patch.object(dense_grads._Gradient, "_over_tokens", lambda self, u, dy: self.edit.flip(real(self, u, dy)))


@moment_mutant
def way_from_the_moment_not_gone() -> Any:
    def on(self: Any, rows: Node, count: int) -> Node:
        left = self.found.node.args[0] is self.found.other
        sizes = shape(self.found.other)
        return self.edit.call(
            aten.slice.Tensor, self.edit.flip(rows) if left else rows, 0 if left else 1, 0, sizes[0 if left else 1]
        )

    return patch.object(dense_grads._Gradient, "_on", on)


@moment_mutant
def constant_beside_the_input_forgotten() -> Any:
    real = dense_grads._Gradient._read
    return patch.object(dense_grads._Gradient, "_read", lambda self: (real(self)[0], None))


@moment_mutant
def one_moment_for_all_layers() -> Any:
    real = dense_grads._Gradient._second

    def second(self: Any) -> Node:
        self.made.setdefault(("G", self.found.u, self.found.dy), next(iter(self.made.values()), None) or real(self))
        return real(self)

    return patch.object(dense_grads._Gradient, "_second", second)


@pytest.mark.parametrize("name", MOMENT_MUTANTS)
def test_a_broken_moment_is_noticed(name: str) -> None:
    with MOMENT_MUTANTS[name]():
        assert not moments_hold()


# ---------------------------------------------------------------------------------------------- a loss in chunks


@cache
def loss_captured() -> joint.Joint:
    """Half of what a rule can get wrong: a trained head with a bias, weights of classes, rows that are ignored."""
    torch.manual_seed(0)
    module = losses.Head(losses.LOSSES["weighted_and_smoothed"], train=True, bias=True).double()
    return joint.capture(module, *losses.inputs())


def loss_holds() -> bool:
    """Loss and gradients those of the whole graph, at a tangent that is not 1, in three chunks of unequal sizes."""
    case = loss_captured()
    with (
        patch.object(chunking, "LEAST", -(1 << 40)),
        patch.object(chunking, "chunks", lambda *sizes: 5),
    ):
        try:
            graph, outcome = case.rewritten()
            pairs = zip(case.run_on_given(case.graph, 1.5), case.run_on_given(graph, 1.5), strict=True)
            return bool(outcome.losses) and all(
                (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-14))
                for a, b in pairs
            )
        except Exception:
            return False


def test_a_loss_in_chunks_holds() -> None:
    assert loss_holds()


LOSS_MUTANTS: dict[str, Mutation] = {}


def loss_mutant(make: Mutation) -> Mutation:
    LOSS_MUTANTS[make.__name__] = make
    return make


def _treated(op: Any, change: Callable[[Node, Any], Any]) -> Any:
    """The rule of one op, with its answer changed."""
    real = row_rules.ROWS[op]
    return patch.dict(row_rules.ROWS, {op: lambda node, row: change(node, real(node, row))})


@loss_mutant
def tangent_forgotten() -> Any:
    return patch.object(
        loop.Rewriter, "_scaled", lambda self, node, result: self.edit.cast(result, node.meta["val"].dtype)
    )


@loss_mutant
def tangent_on_the_loss_too() -> Any:
    real = loop.Rewriter._scaled

    def scaled(self: Any, node: Node, result: Node) -> Node:
        with patch.object(self.flow, "backward", {*self.flow.backward, node}):
            return real(self, node, result)

    return patch.object(loop.Rewriter, "_scaled", scaled)


@loss_mutant
def last_chunk_for_all_sums() -> Any:
    real = loop.Rewriter._call

    def call(self: Any, body: Node, operands: list[Node]) -> list[Node]:
        zeros = [n if n.target is not operator.getitem else self._zeros(n) for n in operands]
        return real(self, body, zeros)

    return patch.object(loop.Rewriter, "_call", call)


@loss_mutant
def chunks_in_reverse() -> Any:
    real = loop.Rewriter._whole
    return patch.object(loop.Rewriter, "_whole", lambda self, node, parts: real(self, node, parts[::-1]))


@loss_mutant
def first_rows_for_all() -> Any:
    real = loop.Rewriter._bounds

    def bounds(self: Any, i: int, count: Any) -> Any:
        *_, size = real(self, i, count)
        return 0, size, size

    return patch.object(loop.Rewriter, "_bounds", bounds)


@loss_mutant
def a_sum_over_rows_taken_for_rows() -> Any:
    def change(node: Node, found: Any) -> Any:
        return replace(found, rows=row_rules.RowDims(0, 1)) if found.rows is None else found

    return _treated(aten.mm.default, change)


@loss_mutant
def a_weight_taken_for_rows() -> Any:
    def change(node: Node, found: Any) -> Any:
        return replace(found, operands={i: row_rules.RowDims(0, 1) for i in range(len(node.args))})

    return _treated(aten.addmm.default, change)


@loss_mutant
def a_bias_summed_along_the_vocabulary() -> Any:
    def change(node: Node, found: Any) -> Any:
        return replace(found, rows=row_rules.RowDims(0, 1)) if found.rows is None else found

    return _treated(aten.sum.dim_IntList, change)


@pytest.mark.parametrize("name", LOSS_MUTANTS)
def test_a_broken_loop_is_noticed(name: str) -> None:
    with LOSS_MUTANTS[name]():
        assert not loss_holds()
