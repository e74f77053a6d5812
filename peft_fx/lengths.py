"""Graphs at lengths between two that were traced.

At two numbers of tokens a call may have one graph: the same ops in the same order, with the same decisions behind them,
of which sizes alone differ. At a length between them each size and each stride lies on the line through both, and what
such a graph takes is reckoned as that of a traced one. Where the two differ in more, or a size falls between two whole
numbers, the length in the middle is traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from peft_fx.compat import pytree
from peft_fx.step.kinds import DEVICE, device_of

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides of a tensor
K = TypeVar("K")
X = TypeVar("X")


@dataclass(frozen=True)
class Sized:
    """What each node of some graphs is, apart from sizes, and the layouts of the tensors that it makes."""

    ops: list[Any]
    layouts: list[list[Layout]]

    @classmethod
    def of(cls, graphs: Sequence[GraphModule], hint: Callable[[Any], int] = int) -> Sized:
        """`hint` gives a size as a number: those of a generator's state have a symbol."""
        nodes = list(_nodes(graphs))
        layouts = [[(tuple(map(hint, v.shape)), tuple(map(hint, v.stride()))) for v in _tensors(n)] for n in nodes]
        return cls(_ops(nodes), layouts)

    def between(self, other: Sized, share: Fraction) -> list[list[Layout]] | None:
        """The layouts at a length so far between the two, from 0 to 1; None where they are not one graph with other
        sizes, or some size is no whole number there."""
        if self.ops != other.ops or _ranks(self.layouts) != _ranks(other.layouts):
            return None
        found = []
        for pair in zip(self.layouts, other.layouts, strict=True):
            sides = [
                [_on_the_line(*side, share) for side in zip(a, b, strict=True)] for a, b in zip(*pair, strict=True)
            ]
            node = [(sizes, strides) for sizes, strides in sides if sizes is not None and strides is not None]
            if len(node) < len(sides):
                return None
            found.append(node)
        return found if self._as_many(other, found) else None

    def _as_many(self, other: Sized, found: Sequence[Sequence[Layout]]) -> bool:
        """Whether what has the numbers of its first operand at both ends has them between: a size that is a product of
        two lengths is on no line."""
        for (_, _, read), *sizes in zip(self.ops, self.layouts, other.layouts, found, strict=True):
            if read:
                first = [layouts[read[0]] for layouts in (self.layouts, other.layouts, found)]
                *ends, there = [_numbers(a) == _numbers(b) for a, b in zip(sizes, first, strict=True)]
                if all(ends) and not there:
                    return False
        return True


def on(graphs: Sequence[GraphModule], layouts: Iterable[Sequence[Layout]]) -> None:
    """Gives the tensors of graphs other layouts, on the meta device."""
    for node, found in zip(_nodes(graphs), layouts, strict=True):
        if found:
            given = iter(found)
            node.meta.setdefault(DEVICE, device_of(node))

            def laid_out(v: Any, given: Iterator[Layout] = given) -> Any:
                return torch.empty_strided(*next(given), dtype=v.dtype, device="meta") if _is_tensor(v) else v

            node.meta["val"] = pytree.tree_map(laid_out, node.meta["val"])


def filled(
    lengths: Sequence[int],
    names: Iterable[K],
    trace: Callable[[int, list[K]], Mapping[K, X]],
    between: Callable[[X, X, Fraction], X | None],
) -> dict[tuple[K, int], X]:
    """What is found of each name at each length: `trace` gives it of several names, `between` at a length so far
    between two, or None where it cannot be told from these. Then the length in the middle is traced."""
    found: dict[tuple[K, int], X] = {}

    def fill(first: int, last: int, names: list[K]) -> None:
        apart = []
        for name in names if last - first > 1 else ():
            low, high = lengths[first], lengths[last]
            read = {
                (name, T): between(found[name, low], found[name, high], Fraction(T - low, high - low))
                for T in lengths[first + 1 : last]
            }
            known = {at: x for at, x in read.items() if x is not None}
            found.update(known) if len(known) == len(read) else apart.append(name)
        if apart:
            middle = (first + last) // 2
            at(lengths[middle], apart)
            fill(first, middle, apart)
            fill(middle, last, apart)

    def at(T: int, names: list[K]) -> None:
        found.update({(name, T): x for name, x in trace(T, names).items()})

    for T in dict.fromkeys((lengths[0], lengths[-1])):
        at(T, list(names))
    fill(0, len(lengths) - 1, list(names))
    return found


def _nodes(graphs: Iterable[GraphModule]) -> Iterator[Node]:
    """The nodes of graphs, and of those that they call."""
    for gm in graphs:
        for node in gm.graph.nodes:
            yield node
            called = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
            if isinstance(called, GraphModule):
                yield from _nodes([called])


def _ops(nodes: Sequence[Node]) -> list[Any]:
    """Of each node the op, what it is given, with operands by their places and no numbers, and these places."""
    place = {node: i for i, node in enumerate(nodes)}

    def told(arg: Any) -> Any:
        if isinstance(arg, Node):
            return "node", place[arg]
        return "number" if type(arg) in (int, float) else arg

    found = []
    for node in nodes:
        target = node.target if node.op == "call_function" else None
        dtypes = [v.dtype for v in _tensors(node)]
        given = map_aggregate((node.args, dict(node.kwargs)), told)
        found.append(((node.op, target, dtypes), given, [place[n] for n in node.all_input_nodes]))
    return found


def _tensors(node: Node) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if _is_tensor(v)]


def _is_tensor(v: Any) -> bool:
    return isinstance(v, torch.Tensor)


def _ranks(layouts: Sequence[Sequence[Layout]]) -> list[list[int]]:
    return [[len(sizes) for sizes, _ in node] for node in layouts]


def _numbers(layouts: Sequence[Layout]) -> int:
    return sum(math.prod(sizes) for sizes, _ in layouts)


def _on_the_line(first: tuple[int, ...], last: tuple[int, ...], share: Fraction) -> tuple[int, ...] | None:
    """Sizes so far between two; None where one is no whole number."""
    found = []
    for a, b in zip(first, last, strict=True):
        step, rest = divmod((b - a) * share.numerator, share.denominator)
        if rest:
            return None
        found.append(a + step)
    return tuple(found)
