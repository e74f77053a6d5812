"""What a loop does for one chunk of rows, as a graph of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import aten, tensor_arg, value
from peft_fx.passes.keep.half_products import exact_products
from peft_fx.passes.loss.chunking import WIDE
from peft_fx.passes.loss.region import Loop
from peft_fx.passes.loss.row_rules import FILLS, SIZED, RowDims, RowEffect

BODY = "peft_fx_chunk"  # the name of a body in the graph's module, and its mark


def is_body(graph: Graph) -> bool:
    """Whether a graph is a loop's body: Inductor passes those to its joint passes by themselves."""
    return BODY in getattr(graph.owning_module, "meta", {})


class Body:
    """The graph of one chunk: what the loop does, on so many rows."""

    def __init__(self, loop: Loop, fake_mode: AbstractContextManager[Any], twice: bool):
        self.graph, self.loop, self.twice = Graph(), loop, twice
        self.edit = Editor(self.graph, fake_mode)
        self.inner: dict[tuple[Node, RowDims | None], Node] = {}
        self.values: dict[Node, Node] = {}
        self.addends: dict[Node, list[Node]] = {}
        self.count: Any = 0

    def made(
        self,
        read: list[tuple[Node, RowDims | None]],
        operands: list[Node],
        summed: list[Node],
        parted: list[Node],
    ) -> GraphModule:
        totals = self._read(read, operands)
        for node, how in self.loop.nodes.items():
            with self.edit.provenance(node):
                self._do(node, how)
        self.graph.output((*map(self._total, summed, totals), *map(self._part, parted)))
        self.graph.lint()
        body = GraphModule({}, self.graph)
        body.meta[BODY] = True
        return body

    def _read(self, read: list[tuple[Node, RowDims | None]], operands: list[Node]) -> list[Node]:
        """Has the operands read, with as many dimensions of rows as the whole has; returns the sums so far."""
        placeholders = []
        for i, operand in enumerate(operands):
            placeholders.append(self.graph.placeholder(f"operand_{i}"))
            placeholders[-1].meta["val"] = value(operand)
        sized = next((p, r.start) for p, (_, r) in zip(placeholders, read, strict=False) if r is not None)
        count = value(sized[0]).shape[sized[1]]
        self.count = count if isinstance(count, int) else self.edit.call(aten.sym_size.int, *sized)
        for key, placeholder in zip(read, placeholders, strict=False):
            self.inner[key] = self._unflat(placeholder, key)
        return placeholders[len(read) :]

    def _unflat(self, placeholder: Node, key: tuple[Node, RowDims | None]) -> Node:
        """A chunk's rows in as many dimensions as the whole has them in."""
        node, rows = key
        if rows is None or rows.stop - rows.start == 1:
            return placeholder
        return self.edit.call(aten.reshape.default, placeholder, rows.part(list(value(node).shape), self.count))

    def _do(self, node: Node, how: RowEffect) -> None:
        """The node's op on a chunk."""
        rows_of = {node.args[i]: there for i, there in how.operands.items()}

        def inside(n: Node) -> Node:
            if n in self.values:
                return self.values[n]
            if n.target in FILLS and n in rows_of:
                sizes = rows_of[n].part(list(value(n).shape), self.count)
                return self.edit.call(n.target, sizes, *n.args[1:], **n.kwargs)
            return self.inner[n, rows_of.get(n)]

        if node.target in SIZED:
            assert how.rows is not None
            args = (inside(tensor_arg(node, 0)), how.rows.part(list(value(node).shape), self.count))
        else:
            args = torch.fx.map_arg(node.args, inside)
        kwargs = torch.fx.map_arg(node.kwargs, inside)
        target = aten.reshape.default if node.target is aten.view.default else node.target
        if how.rows is None:
            self.addends[node] = _addends(self.edit, target, args, kwargs, self.twice)
        else:
            self.values[node] = self.edit.call(target, *args, **kwargs)
            self.edit.untag(self.values[node])

    def _total(self, node: Node, total: Node) -> Node:
        """The sum so far, and this chunk's part of it."""
        for addend in self.addends[node]:
            total = self.edit.add(total, self.edit.cast(addend, value(total).dtype))
        return total

    def _part(self, node: Node) -> Node:
        """A result's rows, in one dimension and dense."""
        part, rows = self.values[node], self.loop.outputs[node].rows
        assert rows is not None
        if rows.stop - rows.start > 1:
            sizes = rows.sizes(list(value(part).shape), [self.count])
            part = self.edit.call(aten.reshape.default, part, sizes)
        if not value(part).is_contiguous():
            part = self.edit.call(aten.clone.default, part, memory_format=torch.contiguous_format)
        return part


def _addends(edit: Editor, target: Any, args: Any, kwargs: Any, twice: bool) -> list[Node]:
    """A chunk's sum over rows, of half precision unrounded: the sum of all chunks is rounded once."""
    wide = WIDE.get(value(args[0]).dtype)
    if wide is not None and target is aten.mm.default:
        if twice:
            return exact_products(edit, *args)
        args = tuple(edit.cast(a, wide) for a in args)
    elif wide is not None and target is not aten.bmm.default:
        args = (edit.cast(args[0], wide), *args[1:])
    return [edit.call(target, *args, **kwargs)]
