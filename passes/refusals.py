"""Why an adapter has no weight form.

An adapter that is not linear in its layer's input never shows up as a group. It is looked for beside every base
product of a forward sum: an addend that leads up to a product with a narrow trained matrix. The ops met on the way
there, and from there to the base's input, say what stands between.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.adapters import are_low_rank, are_small, stands_beside
from peft_fx.passes.affine import Rows, is_scaled_by_a_root
from peft_fx.passes.algebra import Matrix, Term
from peft_fx.passes.flow import common_path, shared_path
from peft_fx.passes.nodes import (
    CASTS,
    LAYOUTS,
    SCALINGS,
    SUMS,
    argument,
    aten,
    is_random,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.sites import SHARED, Analysis, Refusal, Sum
from peft_fx.passes.transfer import GATHERED, Occurrence, Product, addends

Step = tuple[Node, Node]  # a node, and the operand that the way goes on with
NEAR = 80  # nodes: farther away than this, nothing is part of one layer's adapter

ROW_WISE = {aten._softmax.default, aten._log_softmax.default, aten.native_layer_norm.default}
WINDOWS = {aten.unfold.default, aten.index_put.default, aten.constant_pad_nd.default}  # F.unfold, F.fold
READS = LAYOUTS | CASTS | SCALINGS | {operator.getitem}  # what an adapter reads its input through, besides a mask
REPLACING = {aten.index_put.default, aten.index_copy.default, aten.slice_scatter.default, aten.select_scatter.default}
TAKING = {  # some rows of a value
    aten.index.Tensor,
    aten.index_select.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}
PUTTING = REPLACING | {  # rows among others
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.index_add.default,
    aten.scatter_add.default,
    aten.scatter.src,
}
LOOKUPS = {aten.embedding.default, aten.gather.default, *TAKING}  # their whole numbers are places
REDUCTIONS = {aten.mean.dim, aten.var_mean.correction, aten.amax.default, aten.sum.dim_IntList}


def refusals(analysis: Analysis, rows: Rows, placed: Set[Node] = frozenset()) -> list[Refusal]:
    """Every refused adapter of a graph once, in graph order; not those of the parameters that have their place."""
    flow = analysis.flow
    factors = {f.name for g in analysis.groups if not g.backward for f in g.adapter_factors}
    placed = placed | {p for name in factors for p in flow.parameters(name)}
    found = [*analysis.refusals, *_of_convolutions(analysis, placed)]
    for sum_ in analysis.sums:
        if sum_.root not in flow.backward:
            found += _suspects(analysis, sum_, placed)
    found += [*_without_base(analysis, placed), *_without_end(analysis, placed), *_of_results(analysis, rows, placed)]
    found += [*_of_changing_factors(analysis, placed), *_of_some_rows(analysis, placed)]
    found += [*_of_scaled_rows(analysis, placed), *_of_replaced_rows(analysis, placed)]
    return list({r.name: r for r in reversed(found)}.values())[::-1]


def _suspects(analysis: Analysis, sum_: Sum, placed: Set[Node]) -> Iterator[Refusal]:
    bases = _bases(analysis, sum_.terms)
    results: set[Node] = set()  # of a layer, read by an adapter behind it that is added to them
    if not bases:
        results = {n for occ in sum_.terms if (n := _result(analysis, occ)) is not None}
        bases = _bases(analysis, [o for n in results for o in analysis.reader.read(n)])
    quantized = None if bases else _quantized_base(analysis, sum_)
    if not bases and quantized is None:
        return
    sources = {f.name for t in bases for f in t.factors}
    windows = {f.window for t in bases for f in t.factors} - {None}
    for occ in sum_.rest:
        start = _operand(occ)
        own = set() if start is None or occ.term in bases else _serving_only(analysis, start)
        way = _way_to_adapter(analysis, start, own) if start is not None else []
        if not way or not placed.isdisjoint(analysis.flow.parameters(way[-1][1])):
            continue  # no adapter, or one that has its group in another sum
        adapter = Matrix(way[-1][1], 0)
        if quantized is not None:
            found = "quantized", "the base product reads a quantised weight, and no dequantised one exists in the graph"
            yield Refusal(analysis.flow.site_name(Matrix(quantized, 0), [adapter]), *found)
            continue
        obstacles = list(_obstacles(analysis, way))
        same_input = _reads_one_of(analysis, way[-1], sources)
        linear = all(code == "dropout" for code, _ in obstacles)
        if results and (not obstacles or results.isdisjoint(_through(n) for o in own for n in o.all_input_nodes)):
            continue  # one that is linear in the layer's input has another refusal; one of another layer its own
        parameters = _trained_in(analysis, own)
        weights = [f for t in bases for f in t.factors if analysis.flow.is_weight(f.name)]
        weights = [w for w in weights if stands_beside(analysis.flow, w, parameters, same_input, linear)]
        if weights:
            found = obstacles[0] if obstacles else _different(analysis, way[-1], sources, windows)
            weight = _nearest(analysis, weights, adapter)
            yield Refusal(analysis.flow.site_name(weight, [adapter]), *found)


def _trained_in(analysis: Analysis, nodes: Iterable[Node]) -> list[Node]:
    """The trained parameters that some nodes read."""
    flow = analysis.flow
    weights = {n for node in nodes for n in node.all_input_nodes if flow.is_weight(n)}
    return sorted({p for w in weights for p in flow.parameters(w) if flow.roles[p].trainable}, key=str)


def _nearest(analysis: Analysis, weights: list[Matrix], adapter: Matrix) -> Matrix:
    """Among several weights, the one whose name shares most with the adapter's."""
    flow = analysis.flow
    names = [flow.roles[n].name for n in flow.parameters(adapter.name)]

    def likeness(f: Matrix) -> int:
        own = [flow.roles[n].name for n in flow.parameters(f.name)[:1]]
        return max((shared_path(a, b) for a in own for b in names), default=0)

    return max(weights, key=likeness)


def _reads_one_of(analysis: Analysis, step: Step, sources: set[object]) -> bool:
    """Whether a product with an adapter's factor reads one of some values, be it masked, scaled or laid out anew."""
    product, factor = step

    def read(n: Node) -> Iterable[Node]:
        passed = n.target in READS or is_random(n)
        operands = n.all_input_nodes if n is product or passed else ()
        return (i for i in operands if i is not factor and not analysis.flow.is_weight(i))

    return any(analysis.reader.number[n] in sources for n in _reached(product, read) if n is not product)


def _of_convolutions(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Adapters of a frozen convolution that act on its result, or on the windows that it reads; of an embedding, those
    that act on its result."""
    flow = analysis.flow
    bases = {group.product_node for group in analysis.groups}
    for node in (n for n in analysis.position if n.target in AFTER and n in flow.forward and n not in bases):
        x, kernel = (tensor_arg(node, i) for i in ((0, 1) if node.target is aten.convolution.default else (1, 0)))
        if not flow.is_weight(kernel) or flow.is_trained(kernel) or flow.is_weight(x):
            continue
        adapter, detail = _vector_after(analysis, node, kernel), AFTER[node.target]
        if adapter is None and x.target in WINDOWS:
            adapter, detail = _matrix_before(analysis, x, kernel), BEFORE
        if adapter is not None and placed.isdisjoint(flow.parameters(adapter)):
            yield Refusal(flow.site_name(Matrix(kernel, 0), [Matrix(adapter, 0)]), "shape", detail)


AFTER = {
    aten.convolution.default: (
        "a vector scales the convolution's result: the vector's own gradient sums dy·conv(x, W) over all positions,"
        " which a convolution with W' does not give"
    ),
    aten.embedding.default: (
        "a vector scales the rows looked up: the vector's own gradient sums dy·W[i] over all tokens, which W'[i] does"
        " not give"
    ),
}
BEFORE = "overlapping windows are each multiplied by the adapter, and summed before the convolution reads its own"


def _vector_after(analysis: Analysis, node: Node, kernel: Node) -> Node | None:
    """The trained vector that a product's result is scaled by, through sums and numbers alone."""
    flow = analysis.flow

    def readers(n: Node) -> Iterable[Node]:
        return (u for u in n.users if u in flow.forward and (u.target is aten.mul.Tensor or addends(u)))

    for user in _reached(node, readers):
        others = [n for n in user.all_input_nodes if flow.is_weight(n)]
        if is_scaled_by_a_root(user):
            return None  # a norm's own vector comes next
        if user.target is aten.mul.Tensor and others and _is_beside(analysis, others[0], kernel):
            return others[0]
        if user.target is aten.mul.Tensor and len(user.all_input_nodes) > 1 and not others:
            return None
    return None


def _matrix_before(analysis: Analysis, x: Node, kernel: Node) -> Node | None:
    """The trained matrix in what overlapping windows are computed from."""
    flow = analysis.flow

    def read(n: Node) -> Iterable[Node]:
        return (i for i in n.all_input_nodes if not flow.is_weight(i) and not _products(n))

    for node in _reached(x, read):
        for product in _products(node):
            found = next((n for n in (product.left, product.right) if flow.is_weight(n)), None)
            if found is not None and _is_beside(analysis, found, kernel):
                return found
    return None


def _reached(start: Node, step: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """The nodes near one, in the order of the steps to them."""
    seen, todo = {start}, [start]
    while todo and len(seen) < NEAR:
        node = todo.pop(0)
        yield node
        new = [n for n in step(node) if n not in seen]
        seen.update(new)
        todo += new


def _values_read(analysis: Analysis, node: Node) -> list[Node]:
    """What a node reads besides weights."""
    return [n for n in node.all_input_nodes if not analysis.flow.is_weight(n)]


def _is_beside(analysis: Analysis, weight: Node, kernel: Node) -> bool:
    """Whether a trained parameter of a weight is in the module around a kernel's own."""
    roles = analysis.flow.roles
    module = roles[analysis.flow.parameters(kernel)[0]].name.split(".")[:-2]
    return any(
        roles[p].trainable and roles[p].name.split(".")[: len(module)] == module
        for p in analysis.flow.parameters(weight)
    )


def _without_base(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A·B` of two narrow trained matrices of one module in a graph without any of its other weights: what
    they are added to is computed where this graph does not reach."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward and n not in flow.backward):
        for last in _products(node):
            B = _narrow_operand(analysis, node)
            inner = None if B is None else _through(last.right if last.left is B else last.left)
            A = None if inner is None else _narrow_operand(analysis, inner)
            if A is None or B is None or inner is None or not are_low_rank(shape(A)[-2:], shape(B)[-2:]):
                continue
            pairs = [(flow.roles[p].name, flow.roles[q].name) for p in flow.parameters(A) for q in flow.parameters(B)]
            module = max((common_path(a, b) for a, b in pairs if a != b), key=len, default="")
            own = {p for p, role in flow.roles.items() if role.name.startswith(module)}
            bases = (W for u in _sources(analysis, inner) for W in _layers_of(analysis, u) if W is not A)
            if any(shape(W)[-1] == shape(B)[-1] and not own.isdisjoint(flow.parameters(W)) for W in bases):
                continue  # a layer, trained as well, of which this is no adapter
            if all(flow.roles[p].trainable for p in own) and placed.isdisjoint(flow.parameters(A)):
                name = flow.site_name(Matrix(A, 0), [Matrix(B, 0)])
                yield Refusal(
                    name, "different_input", "no product is added to the adapter's: its base is in another graph"
                )


def _without_end(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A` with a narrow trained matrix, beside a frozen layer that reads the same u, that do nothing but
    leave the graph: the other half of the adapter is where this graph does not reach."""
    flow = analysis.flow
    for node in _leaving(analysis):
        inner = _through(node)
        A = _narrow_operand(analysis, inner)
        if A is None or not placed.isdisjoint(flow.parameters(A)):
            continue
        name = flow.roles[flow.parameters(A)[0]].name
        layers = {W for u in _sources(analysis, inner) for W in _layers_of(analysis, u) if not flow.is_trained(W)}
        frozen = [W for W in layers if are_small(flow.parameters(A), shape(W))]
        near = {W: shared_path(flow.roles[flow.parameters(W)[0]].name, name) for W in frozen}
        W = max(near, key=lambda W: (near[W], str(W)), default=None)
        if W is not None and near[W]:
            base = flow.site_name(Matrix(W, 0), [Matrix(A, 0)])
            yield Refusal(base, "different_input", "half of the adapter is in another graph than its base")


def _of_changing_factors(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A'·B`, where A' is made of a trained matrix and of what changes from call to call, perhaps in another
    graph, as the noise does that a sampler draws there."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward and n not in flow.backward):
        B = _narrow_operand(analysis, node)
        for last in _products(node) if B is not None else []:
            for inner in _products(_through(last.right if last.left is B else last.left)):
                operands = (inner.left, inner.right)
                if any(flow.is_weight(n) for n in operands):
                    continue
                A = next((a for n in operands if (a := _trained_part(analysis, n)) is not None), None)
                if A is None or B is None or not are_low_rank(shape(A)[-2:], shape(B)[-2:]):
                    continue
                if placed.isdisjoint({*flow.parameters(A), *flow.parameters(B)}):
                    name = flow.site_name(Matrix(A, 0), [Matrix(B, 0)])
                    yield Refusal(name, "input_dependent", "a factor of the adapter changes from call to call")


def _trained_part(analysis: Analysis, factor: Node) -> Node | None:
    """The trained matrix in a factor that is computed from changing values beside it."""
    flow = analysis.flow
    computed = (n for n in _reached(factor, lambda n: () if flow.is_weight(n) else n.all_input_nodes))
    found = (n for n in computed if flow.is_weight(n) and flow.is_trained(n) and _is_matrix(n))
    return next((n for n in found if shape(n)[0] != shape(n)[1] and numel(shape(n)) == numel(shape(factor))), None)


def _is_matrix(node: Node) -> bool:
    """Whether a value is longer than one along more than one dimension: a norm's scale `[1,C,1,1]` is a vector."""
    return bool(sum(n != 1 for n in shape(node)) > 1)


def _of_results(analysis: Analysis, rows: Rows, placed: Set[Node]) -> Iterator[Refusal]:
    """Adapters that are added to part of a layer's result, or to one that is read without them, too."""
    for node in (n for n in analysis.position if n.target in SUMS and n in analysis.flow.forward):
        operands = [n for n in node.args[:2] if is_tensor(n) and n in rows.of]
        for base, added in itertools.permutations(operands, 2):
            own, adapter = rows.of[base], rows.of[added]
            if own.source is not adapter.source or own.trained or not own.products or len(own.frozen) != 1:
                continue
            if (
                not adapter.trained
                or not placed.isdisjoint(adapter.trained)
                or not rows.is_adapted(own.joined(adapter))
            ):
                continue
            (weight,) = own.frozen
            if not are_small(adapter.trained, shape(weight)):
                continue
            whole = max(own.products, key=lambda p: numel(shape(p)))
            part = numel(shape(base)) != numel(shape(whole))
            name = analysis.flow.site_name(Matrix(weight, 0), [Matrix(t, 0) for t in adapter.trained])
            yield Refusal(name, "shape", PART) if part else Refusal(name, "shared", SHARED)


PART = "the adapter is added to part of what the layer gives, and all of it is read, or is laid out in another order"


def _of_some_rows(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A·B` of two narrow matrices that are put among a layer's rows, of which u are some: a sub-batch's, or
    some tokens'."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward and n not in flow.backward):
        for last, B in _weighted(analysis, node):
            inner = last.right if last.left is B else last.left
            for first, A in _first_factors(analysis, inner):
                parameters = [*flow.parameters(A), *flow.parameters(B)]
                if not are_low_rank(shape(A)[-2:], shape(B)[-2:]) or not placed.isdisjoint(parameters):
                    continue
                linear = (first, A) in _weighted(analysis, _through(inner))
                read = list(_rows_read(analysis, first, A))
                weight = _weight_of_rows(analysis, node, read, parameters, linear)
                if weight is not None:
                    found = ("shape", SOME_ROWS) if linear else ("nonlinear", BETWEEN)
                    found = ("dropout", DROPPED) if any(map(is_random, read)) else found
                    yield Refusal(flow.site_name(weight, [Matrix(A, 0), Matrix(B, 0)]), *found)


DROPPED = "the adapter reads a dropped-out copy of the base's input: no single W' exists"
BETWEEN = "something between the products of an adapter of some rows is not linear"
SOME_ROWS = "the adapter is added to some rows of what its layer gives: a W' would be for these alone"


def _is_of_rows(node: Node, ops: Set[object] = TAKING | PUTTING) -> bool:
    """Whether an op takes some rows of a value, or puts some among others; parts of the features are another thing."""
    if node.target not in ops:
        return False
    try:
        dim = argument(node, "dim")
    except KeyError:  # of all dimensions
        return True
    ndim = next(value(n).ndim for n in node.all_input_nodes if is_tensor(n))
    return bool(dim % ndim != ndim - 1)


def _weighted(analysis: Analysis, node: Node) -> Iterator[tuple[Product, Node]]:
    """The products that a node is made of, each with the weight that it multiplies a value by."""
    for product in _products(node):
        operands = (product.left, product.right)
        weights = [n for n in operands if analysis.flow.is_weight(n)]
        if len(weights) == 1 and len(shape(weights[0])) > 1:
            yield product, weights[0]


def _first_factors(analysis: Analysis, start: Node) -> Iterator[tuple[Product, Node]]:
    """The nearest products with a weight that a value comes from, through whatever acts on each number by itself."""

    def read(n: Node) -> Iterable[Node]:
        passed = n.target in READS or torch.Tag.pointwise in getattr(n.target, "tags", ())
        return _values_read(analysis, n) if passed else ()

    for node in _reached(start, read):
        yield from _weighted(analysis, node)


def _rows_read(analysis: Analysis, product: Product, weight: Node) -> Iterator[Node]:
    """What a product reads, and the values that this is some rows of, or with a mask."""

    def read(n: Node) -> Iterable[Node]:
        passed = n.target in READS or _is_of_rows(n) or is_random(n)
        return _values_read(analysis, n) if passed else ()

    return _reached(product.right if product.left is weight else product.left, read)


def _weight_of_rows(
    analysis: Analysis, product: Node, read: list[Node], parameters: list[Node], linear: bool
) -> Matrix | None:
    """The weight of the layer among whose rows a product is put, if that reads the rows that the product reads."""
    flow, number = analysis.flow, analysis.reader.number
    same_rows = {number[n] for n in read}

    def passed(n: Node) -> bool:
        return n.target in READS | SUMS or _is_of_rows(n)

    def put(n: Node) -> Iterable[Node]:
        return (u for u in n.users if u in flow.forward and passed(u))

    def beside(n: Node) -> Iterable[Node]:
        return _values_read(analysis, n) if passed(n) else ()

    for end in _reached(product, put):
        for node in _reached(end, beside):
            for base, W in _weighted(analysis, node):
                weight = Matrix(W, shape(W)[-1], rows=shape(W)[-2])
                apart = set(flow.parameters(W)).isdisjoint(parameters)
                same = apart and any(number[n] in same_rows for n in _rows_read(analysis, base, W))
                if same and stands_beside(flow, weight, parameters, same, linear):
                    return weight
    return None


def _of_scaled_rows(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Trained vectors that multiply some rows of what a frozen layer gives, or of what it reads."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward):
        vector = _narrow_operand(analysis, node) if node.target is aten.mul.Tensor else None
        if vector is None or _is_matrix(vector) or not placed.isdisjoint(flow.parameters(vector)):
            continue
        for way, ops in _ways_to_layers(analysis, node):
            weights = (W for n in way for _, W in _weighted(analysis, n) if not flow.is_trained(W))
            W = next((W for W in weights if _is_beside(analysis, vector, W)), None)
            if W is not None and any(_is_of_rows(n, ops) for n in way):
                yield Refusal(flow.site_name(Matrix(W, 0), [Matrix(vector, 0)]), "shape", SCALED_ROWS)
                break


def _ways_to_layers(analysis: Analysis, node: Node) -> Iterator[tuple[list[Node], Set[object]]]:
    """What a value is made of, up to products with weights, and where it is put; then, down to them, what reads it.

    Each with the ops by which it is of some rows alone: of a value of all rows, some may be read (a norm's, in front of
    a head that reads the last token).
    """
    flow = analysis.flow

    def passed(n: Node) -> bool:
        if n.target in SCALINGS and sum(not flow.is_weight(i) for i in n.all_input_nodes) > 1:
            return False  # a norm, or a gate
        return n in flow.forward and (n.target in READS | SUMS or _is_of_rows(n))

    def before(n: Node) -> Iterable[Node]:
        return _values_read(analysis, n) if n is node or passed(n) else ()

    def put(n: Node) -> Iterable[Node]:
        return (u for u in n.users if u in flow.forward) if n is node or n.target in LAYOUTS | CASTS else ()

    def after(n: Node) -> Iterable[Node]:
        return (u for u in n.users if passed(u) or any(_weighted(analysis, u))) if n is node or passed(n) else ()

    yield [*_reached(node, before), *_reached(node, put)], TAKING | PUTTING
    yield list(_reached(node, after)), PUTTING


SCALED_ROWS = "a vector multiplies some rows alone: a W' would be for these"


def _of_replaced_rows(analysis: Analysis, placed: Set[Node]) -> Iterator[Refusal]:
    """Rows of a frozen weight that trained ones are put in the place of, as in a table of words."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n.target in REPLACING and n in flow.forward and flow.is_weight(n)):
        weight, *others = (n for n in node.all_input_nodes if is_tensor(n))
        rows = [p for n in others for p in flow.parameters(n) if flow.roles[p].trainable]
        if not rows or flow.parameters(weight)[:1] == [] or not placed.isdisjoint(rows):
            continue
        table = flow.parameters(weight)[0]
        if not flow.roles[table].trainable and all(numel(shape(p)) < numel(shape(table)) for p in rows):
            yield Refusal(flow.site_name(Matrix(table, 0), [Matrix(p, 0) for p in rows]), "shape", REPLACED)


REPLACED = "rows of the weight are replaced by trained ones, before any product: already in weight form"


def _sources(analysis: Analysis, node: Node) -> list[int]:
    """The numbers of the values that a product multiplies weights by."""
    operands = (n for p in _products(node) for n in (p.left, p.right))
    return [analysis.reader.number[_through(n)] for n in operands if not analysis.flow.is_weight(n)]


def _layers_of(analysis: Analysis, u: int) -> list[Node]:
    """The weights that forward multiplies a value by."""
    flow = analysis.flow
    readers = (n for n in analysis.position if n in flow.forward and u in _sources(analysis, n))
    found = [w for n in readers for p in _products(n) for w in (p.left, p.right)]
    return [w for w in found if flow.is_weight(w) and flow.parameters(w)]


def _leaving(analysis: Analysis) -> list[Node]:
    """The results of forward that it does not read itself."""
    flow = analysis.flow
    found = (n for n in analysis.position if any(u.op == "output" for u in n.users))
    return [n for n in found if n in flow.forward and flow.forward.isdisjoint(u for u in n.users if u.op != "output")]


def _through(node: Node) -> Node:
    """Where a value comes from before it was laid out, cast or scaled by a number."""
    while len(parts := addends(node) or []) == 1 and isinstance(parts[0].operand, Node):
        node = parts[0].operand
    return node


def _bases(analysis: Analysis, terms: Iterable[Occurrence]) -> list[Term]:
    """The products `x·W` of layers, of the terms of a sum."""
    products = [o.term for o in terms if o.term and o.product and len(o.term.factors) == 2]
    return [t for t in products if _is_of_a_layer(analysis, t)]


def _result(analysis: Analysis, occ: Occurrence) -> Node | None:
    """The addend that is what a layer with a bias gives, and that others read too."""
    node = None if occ.product is not None else _operand(occ)
    if node is None or len(addends(node := _through(node)) or []) < 2:
        return None
    others = [n for o in analysis.reader.read(node) if o.product is None and (n := _operand(o)) is not None]
    return node if all(map(analysis.flow.is_weight, others)) else None


def _is_of_a_layer(analysis: Analysis, term: Term) -> bool:
    """Whether a product is of a weight, and not an adapter's; rows picked of a table are the residual stream's start,
    which every layer is added to."""
    weights = any(analysis.flow.is_weight(f.name) for f in term.factors)
    return weights and not any(_is_narrow(analysis, f) or f.window == GATHERED for f in term.factors)


def _quantized_base(analysis: Analysis, sum_: Sum) -> Node | None:
    """A weight of integers that an addend is computed from in one op: a base product that no rule can read."""
    for occ in sum_.rest:
        node = _operand(occ)
        while node is not None and addends(node) is not None and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        for n in node.all_input_nodes if node is not None and node.target not in LOOKUPS else []:
            if is_tensor(n) and value(n).ndim > 1 and not value(n).is_floating_point() and analysis.flow.parameters(n):
                return n if analysis.flow.is_weight(n) else None
    return None


def _operand(occ: Occurrence) -> Node | None:
    if not occ.path:
        return None
    node, i = occ.path[-1]
    operand = (addends(node) or [])[i].operand
    return node if isinstance(operand, Product) else operand


def _products(node: Node) -> list[Product]:
    return [part.operand for part in addends(node) or [] if isinstance(part.operand, Product)]


def _is_narrow(analysis: Analysis, f: Matrix) -> bool:
    rows, cols = f.shape
    return rows != cols and analysis.flow.is_weight(f.name) and analysis.flow.is_trained(f.name)


def _narrow_operand(analysis: Analysis, node: Node) -> Node | None:
    """The trained weight that a node multiplies a value by, a vector or a matrix that is not square."""
    if node.target is aten.mul.Tensor:
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        found = [n for n in operands if analysis.flow.is_weight(n) and value(n).ndim and analysis.flow.is_trained(n)]
        same = all(analysis.flow.is_weight(n) for n in operands)  # a product of weights reads nothing
        of_a_norm = any(is_scaled_by_a_root(n) for n in operands)
        return found[0] if len(operands) == 2 and len(found) == 1 and not (same or of_a_norm) else None
    for product in _products(node):
        weights = analysis.flow.is_weight(product.left) and analysis.flow.is_weight(product.right)
        if weights or product.gathered:  # a trained table is no adapter of what its rows are added to
            continue
        for operand in (product.left, product.right):
            rows, cols = shape(operand)[:2] if product.window is not None else shape(operand)[-2:]
            if rows != cols and analysis.flow.is_weight(operand) and analysis.flow.is_trained(operand):
                return operand
    return None


def _way_to_adapter(analysis: Analysis, start: Node, own: Set[Node]) -> list[Step]:
    """The way from an addend upwards to the adapter's first factor: the earliest product with a narrow trained matrix.

    It stays among its `own` nodes, which serve this addend alone: what other forward nodes use too is the model's, not
    the adapter's.
    """
    ways: dict[Node, list[Step]] = {start: []}
    todo = [start]
    first: list[Step] = []
    while todo:
        node = todo.pop(0)
        narrow = _narrow_operand(analysis, node)
        if narrow is not None:
            first = [*ways[node], (node, narrow)]
        for operand in node.all_input_nodes:
            if operand in own and operand not in ways:
                ways[operand] = [*ways[node], (node, operand)]
                todo.append(operand)
    return first


def _serving_only(analysis: Analysis, start: Node) -> set[Node]:
    """The nodes all of whose forward users serve the addend, the addend itself included; the latest are looked at
    first."""
    flow, position = analysis.flow, analysis.position
    serving: set[Node] = set()
    todo = {start}
    while todo and len(serving) < NEAR:
        node = max(todo, key=position.__getitem__)
        todo.remove(node)
        users = [u for u in node.users if u in flow.forward]
        if node.op != "call_function" or (len(users) > 1 if node is start else not serving.issuperset(users)):
            continue
        serving.add(node)
        todo |= {n for n in node.all_input_nodes if not flow.is_weight(n)}
    return serving


def _obstacles(analysis: Analysis, way: list[Step]) -> Iterator[tuple[str, str]]:
    """What stands between the sum and the adapter's first product."""
    for i, (node, operand) in enumerate(way[:-1]):
        verdict = _obstacle(analysis, node, operand, {n for n, _ in way[i + 1 :]})
        if verdict:
            yield verdict


def _different(analysis: Analysis, step: Step, sources: set[object], windows: set[Any]) -> tuple[str, str]:
    """What stands between the adapter's first product and the base's input."""
    last, narrow = step
    met: list[Node] = []
    reached = False
    todo = [n for n in last.all_input_nodes if n is not narrow and is_tensor(n) and not analysis.flow.is_weight(n)]
    while todo and len(met) < NEAR:
        node = todo.pop(0)
        reached |= analysis.reader.number[node] in sources
        if node in met or analysis.reader.number[node] in sources or node.op != "call_function":
            continue
        met.append(node)
        if is_random(node):
            return "dropout", DROPPED
        if _is_in_place(node):
            return "mutation", f"the input is changed in place between its two uses ({_label(node)})"
        todo += node.all_input_nodes
    through = f", through {', '.join(_label(n) for n in met[:3])}" if met else ""
    own = {p.window for p in _products(last) if p.window is not None} - {None}
    if reached and not met and own and not own & windows:
        groups = max(w.groups for w in windows) if windows else 1
        if groups > max(w.groups for w in own):
            detail = f"the convolution is in {groups} groups, the adapter reads all channels: their sum is in no groups"
            return "shape", detail
        return "shape", "the adapter reads other windows of the input than the convolution"
    if reached and all(n.target in LAYOUTS for n in met):
        return "shape", f"the adapter groups the input's features differently{through}"
    return "different_input", f"the adapter reads another tensor than the base product{through}"


def _obstacle(analysis: Analysis, node: Node, operand: Node, beyond: set[Node]) -> tuple[str, str] | None:
    """The code for an op that is not linear in the operand that the way goes on with; None for a linear one."""
    flow, label = analysis.flow, _label(node)
    others = [n for n in node.all_input_nodes if n is not operand and is_tensor(n)]
    drawn = [n for n in others if flow.draws_besides(n, operand)]
    noise = [n for n in (operand, *drawn) if node.target in SUMS and any(flow.draws_besides(n, o) for o in others)]
    if any(not _is_drawn_alone(analysis, n) for n in (*drawn, *noise)):
        return "input_dependent", f"{label} of a random value that is computed from the input"
    if flow.draws_besides(node, operand):
        return "dropout", f"{label} with a random mask inside the adapter: no single W' exists"
    if node.target is operator.getitem:
        return None  # one of several results: the op itself comes next
    if addends(node) is not None:
        computed = any(not flow.is_weight(p.left) and not flow.is_weight(p.right) for p in _products(node))
        return ("input_dependent", f"{label} by a matrix computed from the input") if computed else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and others:
        if all(flow.is_weight(n) for n in others):
            masks = [n for n in others if _differs_along_tokens(n)]
            return ("input_dependent", f"{label} by a number of each token, which no W' can hold") if masks else None
        if any(_is_computed_from(n, beyond) for n in others):
            return "nonlinear", f"{label} of two values of the adapter"
        return "input_dependent", f"{label} by a value of each token, which no W' can hold"
    if _is_of_rows(node) and not any(_is_computed_from(n, beyond) for n in others):
        return "shape", SOME_ROWS
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in ROW_WISE | REDUCTIONS:
        return "nonlinear", f"{label} between the adapter's products"
    return "unknown_op", f"{label} has no linear form"


def _is_drawn_alone(analysis: Analysis, node: Node) -> bool:
    """Whether a value is drawn at random, of whatever else only its size being asked."""
    flow = analysis.flow
    inputs = [n for n in node.all_input_nodes if is_tensor(n) and not flow.is_weight(n)]
    return is_random(node) or (bool(inputs) and all(_is_drawn_alone(analysis, n) for n in inputs))


def _differs_along_tokens(weight: Node) -> bool:
    """Whether a factor has one number for each row."""
    return shape(weight)[-1:] == (1,) and numel(shape(weight)) > 1


def _is_computed_from(node: Node, sources: set[Node]) -> bool:
    seen: set[Node] = set()
    todo = [node]
    while todo and len(seen) < NEAR:
        n = todo.pop()
        if n in sources:
            return True
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return False


def _is_in_place(node: Node) -> bool:
    """Written in place by the user, and made a new value by functionalisation."""
    stack = node.meta.get("source_fn_stack") or [("", "")]
    target = stack[-1][1]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in {"iadd", "imul", "isub", "itruediv"} or (name.endswith("_") and not name.endswith("__"))


def _label(node: Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor")
