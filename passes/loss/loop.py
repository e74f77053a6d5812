"""A language model's loss, a few rows of the logits at a time.

`h [T,K]` times the vocabulary's `W [K,V]` is the largest activation of a step, its gradient is another, and both serve
one number. Where all that lies between the product and the loss treats each row by itself, a loop over chunks of rows
computes what leaves it: each row's loss terms, and with a tangent of 1 its gradient `dh` as well. Backward multiplies
`dh [T,K]` by the tangent, and no chunk's logits outlive it. Sums over rows, such as the gradient of a trained W, are
added up from chunk to chunk in fp32.

The region that is put in the loop: every value with a row of logits for each token (*wide*), what reads one, what one
is computed from, and all between these. It is entered from backward through one scalar, the tangent or what is
computed from it: gradients are linear in that, so the loop takes 1 for it. The body is a graph of its own, called once
for each chunk (`invoke_subgraph`): Inductor compiles it once and runs the calls one after the other.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import reachable
from peft_fx.passes.findings import LOSS, Refusal, Settings
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, expr, is_tensor, shape, value
from peft_fx.passes.loss import chunking
from peft_fx.passes.loss.body import BODY, Body
from peft_fx.passes.loss.chunking import WIDE, Plan, logits_of
from peft_fx.passes.loss.region import Loop, has_loss, leading_up, loop_around
from peft_fx.passes.loss.row_rules import FILLS, SIZED, RowDims, Unfit
from peft_fx.passes.normalise.identities import one_hot_sums


def chunk_loss(joint: Joint, settings: Settings) -> None:
    """Puts the loss of a joint or inference graph into a loop. Where it is not asked for by name, few bytes saved are
    worth no loop."""
    logits, always = logits_of(joint), settings.chunk_loss is True
    if logits is None:
        return
    plan = Plan.of(logits, joint.flow, settings.machine, joint.sizes.hint, settings.memory_weight)
    if plan.chunks < 2:
        return
    one_hot_sums(joint)
    flow = joint.flow
    try:
        loop = loop_around(joint.graph, flow, logits, plan)
    except Unfit as why:
        large = (
            always or plan.hinted * plan.row_bytes > chunking.LEAST
        )  # of few rows a loop would not have been worth it
        if large and flow.backward and has_loss(joint.graph, logits):  # without a loss there is nothing to cure
            joint.found.refusals.append(Refusal(LOSS + plan.name, why.code, why.detail))
        return
    done = plan.described(n for n, how in loop.outputs.items() if how.rows is None and n in flow.backward)
    enough = isinstance(plan.rows, int) or joint.sizes.at_least(plan.rows, 2 * plan.chunks)
    if (done.saved >= chunking.LEAST or always) and enough:
        joint.found.losses.append(done)
        Rewriter(joint, plan, loop).rewrite()


class Rewriter:
    """Puts a loop in the place of its nodes."""

    def __init__(self, joint: Joint, plan: Plan, loop: Loop) -> None:
        self.graph, self.flow, self.edit, self.plan, self.loop = joint.graph, joint.flow, joint.edit, plan, loop
        self.position = dict(joint.position)
        self.users = {n: min((u for u in n.users if u not in loop.nodes), key=self._at) for n in loop.outputs}

    def _at(self, node: Node) -> int:
        return int(self.position[node])

    def rewrite(self) -> None:
        first = next(iter(self.loop.nodes))
        point = min(self.users.values(), key=self._at)
        sources: list[Node] = []
        with self.edit.at(point, like=first):
            at_one = self._at_one(point)
            read = self._inputs()
            self._hoist([at_one.get(n, n) for n, _ in read], point)
            sources += [at_one.get(n, n) for n, _ in read if is_tensor(n)]
            sums, parts = self._chunks([(at_one.get(n, n), rows) for n, rows in read], read)
            results = {n: self._whole(n, parts[n]) for n in parts} | sums
        for node, result in results.items():
            with self.edit.at(self.users[node], like=first):
                new = self._like(node, self._scaled(node, result), sources)
            self.edit.reroute(node, new, only=lambda user: user not in self.loop.nodes)
        inputs = {n for node in self.loop.nodes for n in node.all_input_nodes if n not in self.loop.nodes}
        for node in reversed(self.loop.nodes):
            self.edit.erase(node)
        for node in inputs:
            self.edit.drop(node)

    # -------------------------------------------------------------------------------------------------- inputs

    def _inputs(self) -> list[tuple[Node, RowDims | None]]:
        """What the loop reads, with its rows. Of a dynamic number of rows Inductor reads the symbols too."""
        symbols = getattr(self.plan.rows, "free_symbols", ())
        sizes = [n for n in self.graph.find_nodes(op="placeholder") if isinstance(value(n), torch.SymInt)]
        found: dict[tuple[Node, RowDims | None], None] = dict.fromkeys(
            (n, None) for n in sizes if expr(value(n)) in symbols
        )
        for node, how in self.loop.nodes.items():
            sized = node.args[1:] if node.target in SIZED else ()
            rows = {node.args[i]: there for i, there in how.operands.items()}
            for n in node.all_input_nodes:
                only_size = not is_tensor(n) and bool(sized)
                if n not in self.loop.nodes and not only_size and not (n.target in FILLS and n in rows):
                    found[n, rows.get(n)] = None
        return list(found)

    def _at_one(self, point: Node) -> dict[Node, Node]:
        """Copies of what is computed on the way from the scalar to the loop, with 1 for the scalar."""
        scalar = self.loop.scalar
        if scalar is None:
            return {}
        needed = leading_up(self.graph, [n for n, _ in self._inputs()])
        following = reachable(self.graph, lambda n: n is scalar)
        behind = (needed & following) - {scalar, *self.loop.nodes}
        way = [n for n in self.graph.nodes if n in behind]
        self._hoist([a for n in way for a in n.all_input_nodes if a not in following], point)
        val = value(scalar)
        like = {"dtype": val.dtype, "device": val.device}
        copies = {scalar: self.edit.call(aten.full.default, list(val.shape), 1.0, **like)}
        for node in way:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
            copies[node] = self._forward(self.edit.call(node.target, *args, **kwargs))
        return copies

    def _forward(self, node: Node) -> Node:
        self.edit.untag(node)
        return node

    def _hoist(self, nodes: Iterable[Node], point: Node) -> None:
        """Moves nodes, and what they are computed from, before the point where they are read from now on."""
        late = leading_up(self.graph, list(nodes))
        for node in [n for n in self.graph.nodes if n in late and self.position.get(n, -1) >= self._at(point)]:
            self.edit.move(node, before=point)
            self.position[node] = -1  # once is enough

    # ---------------------------------------------------------------------------------------------------- loop

    def _chunks(
        self, given: list[tuple[Node, RowDims | None]], read: list[tuple[Node, RowDims | None]]
    ) -> tuple[dict[Node, Node], dict[Node, list[Node]]]:
        """The calls of the body, one for each chunk: sums over rows, and the parts of all other results."""
        summed = [n for n, t in self.loop.outputs.items() if t.rows is None]
        parted = [n for n, t in self.loop.outputs.items() if t.rows is not None]
        totals = [self._zeros(n) for n in summed]
        flat = [self._flat(n, rows) for n, rows in given]
        count = self._count(flat, given)
        parts: dict[Node, list[Node]] = {n: [] for n in parted}
        bodies: dict[Any, Node] = {}
        for i in range(self.plan.chunks):
            start, stop, size = self._bounds(i, count)
            operands = [
                n if rows is None else self.edit.call(aten.slice.Tensor, n, rows.start, start, stop)
                for n, (_, rows) in zip(flat, given, strict=True)
            ]
            if size not in bodies:
                bodies[size] = self._body(len(bodies), read, [*operands, *totals], summed, parted)
            results = self._call(bodies[size], [*operands, *totals])
            totals = results[: len(summed)]
            for n, part in zip(parted, results[len(summed) :], strict=True):
                parts[n].append(part)
        return dict(zip(summed, totals, strict=True)), parts

    def _zeros(self, node: Node) -> Node:
        val = value(node)
        dtype = WIDE.get(val.dtype, val.dtype)
        return self.edit.call(aten.full.default, list(val.shape), 0, dtype=dtype, device=val.device)

    def _flat(self, node: Node, rows: RowDims | None) -> Node:
        """A value with its rows in one dimension."""
        if rows is None or rows.stop - rows.start == 1:
            return node
        sizes = self.edit.sizes_of(node)
        return self.edit.call(aten.reshape.default, node, rows.sizes(sizes, [-1]))

    def _count(self, flat: list[Node], given: list[tuple[Node, RowDims | None]]) -> tuple[Any, Any]:
        """The rows in all and in a chunk: numbers, or nodes."""
        if isinstance(self.plan.rows, int):
            return self.plan.rows, math.ceil(self.plan.rows / self.plan.chunks)
        n, rows = next((n, rows) for n, (_, rows) in zip(flat, given, strict=True) if rows is not None)
        whole = self.edit.call(aten.sym_size.int, n, rows.start)
        return whole, self.edit.call(operator.floordiv, whole, self.plan.chunks)

    def _bounds(self, i: int, count: tuple[Any, Any]) -> tuple[Any, Any, Any]:
        """Where chunk `i` starts and stops, and what tells its size from others'."""
        whole, each = count
        if isinstance(whole, int):
            start, stop = min(whole, i * each), min(whole, (i + 1) * each)
            return start, stop, stop - start
        last = i == self.plan.chunks - 1
        start = self.edit.call(operator.mul, each, i) if i else 0
        return start, whole if last else self.edit.call(operator.mul, each, i + 1), last

    def _call(self, body: Node, operands: list[Node]) -> list[Node]:
        node = self.edit.call_graph(body, operands)
        node.meta["partitioner_tag"] = "is_forward"
        return [self._forward(self.edit.item(node, i)) for i in range(len(value(node)))]

    def _whole(self, node: Node, parts: list[Node]) -> Node:
        rows = self.loop.outputs[node].rows
        assert rows is not None
        return self._forward(self.edit.call(aten.cat.default, parts, rows.start))

    def _body(
        self,
        number: int,
        read: list[tuple[Node, RowDims | None]],
        operands: list[Node],
        summed: list[Node],
        parted: list[Node],
    ) -> Node:
        """The graph of one chunk, as an attribute of the graph's module: operands in, sums and parts of rows out."""
        body = Body(self.loop, self.edit.fake_mode, self.plan.twice)
        return self.edit.attach(body.made(read, operands, summed, parted), f"{BODY}_{number}")

    # ------------------------------------------------------------------------------------------------- results

    def _scaled(self, node: Node, result: Node) -> Node:
        """A gradient, times the scalar that the loop took 1 for."""
        dtype = value(node).dtype
        if node not in self.flow.backward or self.loop.scalar is None:
            return self.edit.cast(result, dtype)
        wide = WIDE.get(dtype, dtype)
        scale = self.edit.cast(self.loop.scalar, wide)
        return self.edit.cast(self.edit.times(self.edit.cast(result, wide), scale), dtype)

    def _like(self, node: Node, result: Node, sources: list[Node]) -> Node:
        """A result in the sizes and strides of the node that it stands in for; a dynamic size is read off a source."""
        if shape(result) != shape(node):
            sizes = [n if isinstance(n, int) else self._size(n, sources) for n in shape(node)]
            result = self.edit.call(aten.reshape.default, result, sizes)
        return self.edit.laid_out(result, value(node).stride())

    def _size(self, size: Size, sources: list[Node]) -> Node:
        source, i = next((n, i) for n in sources for i, other in enumerate(shape(n)) if other == size)
        return self.edit.call(aten.sym_size.int, source, i)
