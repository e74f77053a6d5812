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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from peft_fx.passes.algebra import Size
from peft_fx.passes.editor import Editor
from peft_fx.passes.findings import LOSS, ChunkedLoss, Refusal, Settings
from peft_fx.passes.flow import Flow, is_tangent, reachable
from peft_fx.passes.identities import one_hot_sums
from peft_fx.passes.joint import Joint
from peft_fx.passes.machine import Machine
from peft_fx.passes.nodes import (
    CASTS,
    LAYOUTS,
    MATRIX_PRODUCTS,
    aten,
    expr,
    factors_of,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.price import rounds_twice
from peft_fx.passes.rowwise import FILLS, SIZED, Rows, Treatment, Unfit, treatments
from peft_fx.passes.transients import exact_products

LEAST = 16 << 20  # bytes: of a chunk, and of what the loop must save
PART = 16  # of the logits' bytes, a chunk may have one part in so many
PASSES = 4  # over the logits: their statistics, the loss, the gradient, which is written
DEARER = 1 + 1 / PART  # the loop by the price, in units of what the whole costs
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # the dtype of sums over chunks
BODY = "peft_fx_chunk"  # the name of a body in the graph's module, and its mark
CURE = (
    "return the loss alone: peft_fx.loss_only(model), or compile a function such as "
    "`lambda **batch: model(**batch).loss`"
)


def is_body(graph: Graph) -> bool:
    """Whether a graph is a loop's body: Inductor passes those to its joint passes by themselves."""
    return BODY in getattr(graph.owning_module, "meta", {})


def chunk_loss(joint: Joint, settings: Settings) -> None:
    """Puts the loss of a joint or inference graph into a loop. Where it is not asked for by name, few bytes saved are
    worth no loop."""
    logits, always = _logits(joint), settings.chunk_loss is True
    if logits is None:
        return
    plan = Plan.of(logits, joint.flow, settings.machine, joint.sizes.hint, settings.memory_weight)
    if plan.chunks < 2:
        return
    one_hot_sums(joint)
    flow = joint.flow
    try:
        loop = _found(joint.graph, flow, logits, plan)
    except Unfit as why:
        large = always or plan.hinted * plan.row_bytes > LEAST  # of few rows a loop would not have been worth it
        if large and flow.backward and _has_loss(joint.graph, logits):  # without a loss there is nothing to cure
            joint.found.refusals.append(Refusal(LOSS + plan.name, why.code, why.detail))
        return
    done = plan.described(loop, flow)
    enough = isinstance(plan.rows, int) or joint.sizes.at_least(plan.rows, 2 * plan.chunks)
    if (done.saved >= LEAST or always) and enough:
        joint.found.losses.append(done)
        _Rewriter(joint, plan, loop).rewrite()


# ---------------------------------------------------------------------------------------------------------------
# how many chunks


def _logits(joint: Joint) -> Node | None:
    """The largest of forward's last products by a weight that make a row longer."""
    graph, flow = joint.graph, joint.flow
    best, largest = None, (0, 0)
    multiplied: set[Node] = set()  # what goes into another such product is no logits
    for node in reversed(graph.nodes):
        if node not in flow.forward:
            continue
        product = node.target in MATRIX_PRODUCTS and flow.is_weight(factors_of(node)[1])
        if product and node not in multiplied:
            k, n = shape(factors_of(node)[1])
            size = joint.sizes.hint(numel(shape(node)))
            if isinstance(n, int) and isinstance(k, int) and n > k and (size, k) >= largest:
                best, largest = node, (size, k)
        if product or node in multiplied:
            multiplied.update(node.all_input_nodes)
    return best


def _has_loss(graph: Graph, logits: Node) -> bool:
    """Whether one number that is computed from the logits is an output."""
    (output,) = graph.find_nodes(op="output")
    following = reachable(graph, lambda n: n is logits)
    return any(is_tensor(n) and n in following and numel(shape(n)) == 1 for n in output.args[0])


@dataclass(frozen=True)
class Plan:
    """The sizes of the logits `[rows, vocabulary]`, and the number of chunks; `row_bytes` are those of one row's logits
    and its gradient. `twice` as in `price.rounds_twice`."""

    name: str
    rows: Size
    hinted: int
    vocabulary: int
    wide: float
    dtype: torch.dtype
    row_bytes: int
    chunks: int
    twice: bool

    @classmethod
    def of(cls, logits: Node, flow: Flow, machine: Machine, hint: Callable[[Size], int], worth: float) -> Plan:
        h, W = factors_of(logits)
        (rows, n), k, dtype = shape(logits), int(shape(h)[1]), value(logits).dtype
        T, V = hint(rows), int(n)
        row = V * dtype.itemsize * (2 if flow.backward else 1)
        single = V * 4 * (dtype.itemsize < 4)
        named = [flow.roles[p].name for p in flow.parameters(W)]
        name = named[0].removesuffix(".weight") if named else W.name
        count = chunks(T, k, V, dtype, row + single, machine, worth)
        if not isinstance(rows, int):
            count = chunks(max(T, 1 << 20), k, V, dtype, row + single, machine, worth)
        return cls(name, rows, T, V, max(k, V / 2), dtype, row, count, rounds_twice(machine, dtype))

    def described(self, loop: Loop, flow: Flow) -> ChunkedLoss:
        before = self.hinted * self.row_bytes
        kept = sum(_bytes(n) for n, t in loop.outputs.items() if t.rows is None and n in flow.backward)
        after = math.ceil(self.hinted / self.chunks) * self.row_bytes + kept
        dtype = str(self.dtype).removeprefix("torch.")
        return ChunkedLoss(
            self.name, self.hinted, self.vocabulary, dtype, self.chunks, {"before": before, "after": after}
        )


def chunks(T: int, K: int, V: int, dtype: torch.dtype, row_bytes: int, machine: Machine, worth: float = 0.0) -> int:
    """The number of chunks of `[T,K]·[K,V]`: as many as the bytes ask for, of `row_bytes` in each row, but no more than
    the price allows, since each chunk reads W anew; a GB less may cost `worth` seconds besides. Where so many do not
    divide T and fewer do, fewer."""
    budget = max(LEAST, T * V * dtype.itemsize // PART)
    most = max(1, min(T, math.ceil(T * row_bytes / budget)))
    whole = _price(machine, 1, T, K, V, dtype)

    def pays(n: int) -> bool:
        saved = T * row_bytes * (1 - 1 / n) / 1e9
        return _price(machine, n, T, K, V, dtype) <= DEARER * whole + worth * saved

    best = max(n for n in range(1, most + 1) if n == 1 or pays(n))
    return next((n for n in range(best, best // 2, -1) if T % n == 0), best)


def _price(machine: Machine, n: int, T: int, K: int, V: int, dtype: torch.dtype) -> float:
    """Seconds of the two products of a loss with a frozen W, and of the passes over its logits."""
    return 2 * n * machine.product(math.ceil(T / n), K, V, dtype) + machine.one_pass(PASSES * T * V * dtype.itemsize)


def _bytes(node: Node) -> int:
    val = value(node)
    dtype: torch.dtype = WIDE.get(val.dtype, val.dtype)
    elements: int = math.prod(val.shape)
    return int(elements * dtype.itemsize)


# ---------------------------------------------------------------------------------------------------------------
# the region


@dataclass(frozen=True)
class Loop:
    """What is done for each chunk: nodes in order with what they make of rows, those that are read outside, and the
    scalar of backward that the loop takes 1 for."""

    nodes: Mapping[Node, Treatment]
    outputs: Mapping[Node, Treatment]
    scalar: Node | None


def _found(graph: Graph, flow: Flow, logits: Node, plan: Plan) -> Loop:
    """The loop that the logits ask for; `Unfit` where there is none."""
    region = _wide_region(flow, logits, plan)
    unfit = None
    small, entries = plan.dtype == torch.float16, list(_entries(graph, flow, region))
    for scalar in reversed(entries) if small else entries:  # what is 1 for the whole is next to nothing for a row
        try:
            loop = _loop(_hull(graph, region, scalar), plan, scalar)
        except Unfit as why:
            unfit = unfit or why
        else:
            if small and scalar is not None and _scalars_behind(graph, flow, region, scalar):
                raise Unfit("dtype", "a row's part of a mean is too small for float16 before the loss is scaled")
            return loop
    raise unfit or Unfit("nonlinear", "the gradient of the logits comes from more than one scalar")


def _wide_region(flow: Flow, logits: Node, plan: Plan) -> set[Node]:
    """All that is wide and connected with the logits, and all that reads it."""

    def is_wide(node: Node) -> bool:
        if node.op != "call_function" or not is_tensor(node) or node.target in FILLS:
            return False
        if flow.is_weight(node) and node.target is not aten.expand.default:
            return False
        elements = numel([n if isinstance(n, int) else plan.hinted if n == plan.rows else n for n in shape(node)])
        return not _sums_over_tokens(node, flow) and _exceeds(elements, plan)

    region, todo = {logits}, [logits]
    while todo:
        node = todo.pop()
        if is_wide(node):
            if any(u.op == "output" for u in node.users):
                raise Unfit(
                    "logits_returned",
                    f"the logits, {plan.hinted}×{plan.vocabulary}, are an output of the graph, so they are kept whole; "
                    + CURE,
                )
            near = [*node.users, *(n for n in node.all_input_nodes if is_wide(n))]
        else:
            near = [n for n in node.all_input_nodes if is_wide(n)]
        todo += [n for n in near if n not in region]
        region.update(near)
    return region


def _exceeds(elements: Size, plan: Plan) -> bool:
    """Whether a value has more than `wide` elements for each row."""
    ratio = elements / plan.hinted if isinstance(elements, int) else elements / plan.rows
    try:
        return bool(ratio > plan.wide)
    except TypeError:  # of sizes that have nothing to do with the rows
        return False


def _sums_over_tokens(node: Node, flow: Flow) -> bool:
    return node.target in MATRIX_PRODUCTS and not any(flow.is_weight(f) for f in factors_of(node))


def _entries(graph: Graph, flow: Flow, region: set[Node]) -> Iterator[Node | None]:
    """The scalars through each of which alone backward enters the region, from the tangent onwards: a mean's division
    among them, so that the last one is that of a row."""
    inside = region & flow.backward
    if not inside:
        yield None
        return
    cone = (_ancestors(graph, inside) & flow.backward) - region
    for node in graph.nodes:
        if node in cone and is_tensor(node) and numel(shape(node)) == 1:
            around = reachable(graph, is_tangent, node)
            if not around & inside:
                yield node


def _scalars_behind(graph: Graph, flow: Flow, region: set[Node], scalar: Node) -> bool:
    """Whether the region is entered through scalars that are computed from that one."""
    following = reachable(graph, lambda n: n is scalar) & _ancestors(graph, region & flow.backward)
    scalars = [n for n in following - region - {scalar} if is_tensor(n) and numel(shape(n)) == 1]
    return any(n.target not in CASTS | LAYOUTS for n in scalars)


def _ancestors(graph: Graph, of: Iterable[Node], without: Node | None = None) -> set[Node]:
    found = set(of)
    for node in reversed(graph.nodes):
        if node in found and node is not without:
            found.update(node.all_input_nodes)
    return found


def _hull(graph: Graph, region: set[Node], scalar: Node | None) -> list[Node]:
    """The region and all between two of its nodes, the way through the scalar apart, in order."""
    between = reachable(graph, region.__contains__, scalar) & _ancestors(graph, region, scalar)
    return [n for n in graph.nodes if n in between]


def _loop(nodes: list[Node], plan: Plan, scalar: Node | None) -> Loop:
    treated = treatments(nodes, plan.rows)
    outputs = {n: t for n, t in treated.items() if any(u not in treated for u in n.users)}
    return Loop(treated, outputs, scalar)


# ---------------------------------------------------------------------------------------------------------------
# the rewrite


class _Rewriter:
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

    def _inputs(self) -> list[tuple[Node, Rows | None]]:
        """What the loop reads, with its rows. Of a dynamic number of rows Inductor reads the symbols too."""
        symbols = getattr(self.plan.rows, "free_symbols", ())
        sizes = [n for n in self.graph.find_nodes(op="placeholder") if isinstance(value(n), torch.SymInt)]
        found: dict[tuple[Node, Rows | None], None] = dict.fromkeys(
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
        needed = _ancestors(self.graph, [n for n, _ in self._inputs()])
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
        late = _ancestors(self.graph, list(nodes))
        for node in [n for n in self.graph.nodes if n in late and self.position.get(n, -1) >= self._at(point)]:
            self.edit.move(node, before=point)
            self.position[node] = -1  # once is enough

    # ---------------------------------------------------------------------------------------------------- loop

    def _chunks(
        self, given: list[tuple[Node, Rows | None]], read: list[tuple[Node, Rows | None]]
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

    def _flat(self, node: Node, rows: Rows | None) -> Node:
        """A value with its rows in one dimension."""
        if rows is None or rows.stop - rows.start == 1:
            return node
        sizes = self.edit.sizes_of(node)
        return self.edit.call(aten.reshape.default, node, rows.sizes(sizes, [-1]))

    def _count(self, flat: list[Node], given: list[tuple[Node, Rows | None]]) -> tuple[Any, Any]:
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

    # ---------------------------------------------------------------------------------------------------- body

    def _body(
        self,
        number: int,
        read: list[tuple[Node, Rows | None]],
        operands: list[Node],
        summed: list[Node],
        parted: list[Node],
    ) -> Node:
        """The graph of one chunk, as an attribute of the graph's module: operands in, sums and parts of rows out."""
        graph = Graph()
        build = Editor(graph, self.edit.fake_mode)
        inner: dict[tuple[Node, Rows | None], Node] = {}
        placeholders = []
        for i, operand in enumerate(operands):
            placeholders.append(graph.placeholder(f"operand_{i}"))
            placeholders[-1].meta["val"] = value(operand)
        sized = next((p, r.start) for p, (_, r) in zip(placeholders, read, strict=False) if r is not None)
        count = value(sized[0]).shape[sized[1]]
        count = count if isinstance(count, int) else build.call(aten.sym_size.int, *sized)
        for key, placeholder in zip(read, placeholders, strict=False):
            inner[key] = self._unflat(build, placeholder, key, count)
        made: dict[Node, Node] = {}
        addends: dict[Node, list[Node]] = {}
        for node, how in self.loop.nodes.items():
            rows_of = {node.args[i]: there for i, there in how.operands.items()}

            def inside(n: Node, rows_of: dict[Any, Rows] = rows_of) -> Node:
                if n in made:
                    return made[n]
                if n.target in FILLS and n in rows_of:
                    sizes = rows_of[n].part(list(value(n).shape), count)
                    return build.call(n.target, sizes, *n.args[1:], **n.kwargs)
                return inner[n, rows_of.get(n)]

            with build.provenance(node):
                if node.target in SIZED:
                    assert how.rows is not None
                    args = (inside(tensor_arg(node, 0)), how.rows.part(list(value(node).shape), count))
                else:
                    args = torch.fx.map_arg(node.args, inside)
                kwargs = torch.fx.map_arg(node.kwargs, inside)
                target = aten.reshape.default if node.target is aten.view.default else node.target
                if how.rows is None:
                    addends[node] = _addends(build, target, args, kwargs, self.plan.twice)
                else:
                    made[node] = self._forward(build.call(target, *args, **kwargs))
        totals = placeholders[len(read) :]
        results = []
        for n, total in zip(summed, totals, strict=True):
            for addend in addends[n]:
                total = build.add(total, build.cast(addend, value(total).dtype))
            results.append(total)
        for n in parted:
            rows = self.loop.outputs[n].rows
            assert rows is not None
            sizes = rows.sizes(list(value(made[n]).shape), [count])
            part = made[n] if rows.stop - rows.start == 1 else build.call(aten.reshape.default, made[n], sizes)
            if not value(part).is_contiguous():
                part = build.call(aten.clone.default, part, memory_format=torch.contiguous_format)
            results.append(part)
        graph.output(tuple(results))
        graph.lint()
        body = GraphModule({}, graph)
        body.meta[BODY] = True
        return self.edit.attach(body, f"{BODY}_{number}")

    def _unflat(self, build: Editor, placeholder: Node, key: tuple[Node, Rows | None], count: Any) -> Node:
        """A chunk's rows in as many dimensions as the whole has them in."""
        node, rows = key
        if rows is None or rows.stop - rows.start == 1:
            return placeholder
        return build.call(aten.reshape.default, placeholder, rows.part(list(value(node).shape), count))

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


def _addends(build: Editor, target: Any, args: Any, kwargs: Any, twice: bool) -> list[Node]:
    """A chunk's sum over rows, of half precision unrounded: the sum of all chunks is rounded once."""
    wide = WIDE.get(value(args[0]).dtype)
    if wide is not None and target is aten.mm.default:
        if twice:
            return exact_products(build, *args)
        args = tuple(build.cast(a, wide) for a in args)
    elif wide is not None and target is not aten.bmm.default:
        args = (build.cast(args[0], wide), *args[1:])
    return [build.call(target, *args, **kwargs)]
