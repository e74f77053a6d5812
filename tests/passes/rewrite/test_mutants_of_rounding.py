"""Mutants of dithered rounding: of its noise, of the bits that it drops, and of what is no normal number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from torch.fx import Node

from peft_fx.passes.graph import editor
from peft_fx.passes.graph.nodes import aten
from peft_fx.passes.rewrite import rounding
from tests.passes.mutation import Mutants
from tests.support import dither

MUTANTS = Mutants()


def _hash(change: Callable[[Any, Node, Node], Node]) -> Any:
    """The noise of each index, changed; `change` is given the index, too."""
    real = rounding.hash_of
    return patch.object(rounding, "hash_of", lambda build, index: change(build, index, real(build, index)))


@MUTANTS.add
def truncated() -> Any:
    return _hash(lambda build, index, noise: build.call(aten.mul.Tensor, noise, 0))


@MUTANTS.add
def always_up() -> Any:
    return _hash(lambda build, index, noise: build.call(aten.bitwise_or.Scalar, noise, 0xFFFF))


@MUTANTS.add
def noise_of_half_an_ulp() -> Any:
    return _hash(lambda build, index, noise: build.call(aten.bitwise_and.Scalar, noise, 0x0FFF))


@MUTANTS.add
def index_for_a_hash() -> Any:
    return _hash(lambda build, index, noise: index)


@MUTANTS.add
def two_rounds_of_the_hash() -> Any:
    return patch.object(rounding, "ROUNDS", rounding.ROUNDS[:2])


@MUTANTS.add
def noise_of_the_layout() -> Any:
    real = rounding._index
    return patch.object(rounding, "_index", lambda build, node, transposed: real(build, node, False))


@MUTANTS.add
def a_bit_too_many_dropped() -> Any:
    return patch.dict(rounding.LACKS, {dtype: bits + 1 for dtype, bits in rounding.LACKS.items()})


@MUTANTS.add
def a_bit_left_to_the_cast() -> Any:
    return patch.dict(rounding.LACKS, {dtype: bits - 1 for dtype, bits in rounding.LACKS.items()})


@MUTANTS.add
def every_number_taken_for_normal() -> Any:
    real = editor.Editor.call

    def call(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is aten.where.self and args[1].target is aten.view.dtype:
            return args[1]
        return real(self, target, *args, **kwargs)

    return patch.object(editor.Editor, "call", call)


@MUTANTS.add
def infinite_in_half_precision() -> Any:
    return patch.object(rounding, "_saturated", lambda build, node, dtype: node)


@MUTANTS.add
def infinities_made_finite() -> Any:
    real = rounding._saturated
    return patch.object(rounding, "_saturated", lambda *args: real(*args).args[2])


def test_dithered_rounding_as_it_is_holds() -> None:
    assert dither.holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_dithered_rounding_breaks_it(name: str) -> None:
    with MUTANTS.applied(name):
        assert not dither.holds(), f"the mutant {name} lives"
