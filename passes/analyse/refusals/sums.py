"""Adapters that are addends of a layer's sum and have no group: each an addend of a forward sum, beside a base product,
that leads up to a product with a narrow trained matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from torch.fx import Node

from peft_fx.passes.analyse.adapters import stands_beside
from peft_fx.passes.analyse.algebra import Matrix, Term
from peft_fx.passes.analyse.flow import shared_path
from peft_fx.passes.analyse.linear_rules import GATHERED, Product, addends, through
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.analyse.reader import Occurrence
from peft_fx.passes.analyse.refusals.obstacles import Step, difference, obstacles_on
from peft_fx.passes.analyse.refusals.some_rows import TAKING
from peft_fx.passes.analyse.refusals.ways import NEAR, READS, narrow_operand, reached, trained_in
from peft_fx.passes.analyse.sums import Sum, Sums
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.nodes import aten, is_random, is_tensor, value

LOOKUPS = {aten.embedding.default, aten.gather.default, *TAKING}  # their whole numbers are places


def of_sums(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """What forward's sums have besides their base products."""
    for sum_ in analysis.sums:
        if sum_.root not in analysis.flow.backward:
            yield from _suspects(analysis, sum_, placed)


def _suspects(analysis: Sums, sum_: Sum, placed: Set[Node]) -> Iterator[Refusal]:
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
        obstacles = list(obstacles_on(analysis, way))
        same_input = _reads_one_of(analysis, way[-1], sources)
        linear = all(code == "dropout" for code, _ in obstacles)
        if results and (not obstacles or results.isdisjoint(through(n) for o in own for n in o.all_input_nodes)):
            continue  # one that is linear in the layer's input has another refusal; one of another layer its own
        parameters = trained_in(analysis, own)
        weights = [f for t in bases for f in t.factors if analysis.flow.is_weight(f.name)]
        weights = [w for w in weights if stands_beside(analysis.flow, w, parameters, same_input, linear)]
        if weights:
            found = obstacles[0] if obstacles else difference(analysis, way[-1], sources, windows)
            weight = _nearest(analysis, weights, adapter)
            yield Refusal(analysis.flow.site_name(weight, [adapter]), *found)


def _nearest(analysis: Sums, weights: list[Matrix], adapter: Matrix) -> Matrix:
    """Among several weights, the one whose name shares most with the adapter's."""
    flow = analysis.flow
    names = [flow.roles[n].name for n in flow.parameters(adapter.name)]

    def likeness(f: Matrix) -> int:
        own = [flow.roles[n].name for n in flow.parameters(f.name)[:1]]
        return max((shared_path(a, b) for a in own for b in names), default=0)

    return max(weights, key=likeness)


def _reads_one_of(analysis: Sums, step: Step, sources: set[object]) -> bool:
    """Whether a product with an adapter's factor reads one of some values, be it masked, scaled or laid out anew."""
    product, factor = step

    def read(n: Node) -> Iterable[Node]:
        passed = n.target in READS or is_random(n)
        operands = n.all_input_nodes if n is product or passed else ()
        return (i for i in operands if i is not factor and not analysis.flow.is_weight(i))

    return any(analysis.reader.number[n] in sources for n in reached(product, read) if n is not product)


def _bases(analysis: Sums, terms: Iterable[Occurrence]) -> list[Term]:
    """The products `x·W` of layers, of the terms of a sum."""
    products = [o.term for o in terms if o.term and o.product and len(o.term.factors) == 2]
    return [t for t in products if _is_of_a_layer(analysis, t)]


def _result(analysis: Sums, occ: Occurrence) -> Node | None:
    """The addend that is what a layer with a bias gives, and that others read too."""
    node = None if occ.product is not None else _operand(occ)
    if node is None or len(addends(node := through(node)) or []) < 2:
        return None
    others = [n for o in analysis.reader.read(node) if o.product is None and (n := _operand(o)) is not None]
    return node if all(map(analysis.flow.is_weight, others)) else None


def _is_of_a_layer(analysis: Sums, term: Term) -> bool:
    """Whether a product is of a weight, and not an adapter's; rows picked of a table are the residual stream's start,
    which every layer is added to."""
    weights = any(analysis.flow.is_weight(f.name) for f in term.factors)
    return weights and not any(_is_narrow(analysis, f) or f.window == GATHERED for f in term.factors)


def _is_narrow(analysis: Sums, f: Matrix) -> bool:
    rows, cols = f.shape
    return rows != cols and analysis.flow.is_weight(f.name) and analysis.flow.is_trained(f.name)


def _quantized_base(analysis: Sums, sum_: Sum) -> Node | None:
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


def _way_to_adapter(analysis: Sums, start: Node, own: Set[Node]) -> list[Step]:
    """The way from an addend upwards to the adapter's first factor: the earliest product with a narrow trained matrix.

    It stays among its `own` nodes, which serve this addend alone: what other forward nodes use too is the model's, not
    the adapter's.
    """
    ways: dict[Node, list[Step]] = {start: []}
    todo = [start]
    first: list[Step] = []
    while todo:
        node = todo.pop(0)
        narrow = narrow_operand(analysis, node)
        if narrow is not None:
            first = [*ways[node], (node, narrow)]
        for operand in node.all_input_nodes:
            if operand in own and operand not in ways:
                ways[operand] = [*ways[node], (node, operand)]
                todo.append(operand)
    return first


def _serving_only(analysis: Sums, start: Node) -> set[Node]:
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
