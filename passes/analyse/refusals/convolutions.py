"""Adapters of a convolution or an embedding that act on its result, or on the windows that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from torch.fx import Node

from peft_fx.passes.analyse.algebra import Matrix
from peft_fx.passes.analyse.linear_rules import addends, products_in
from peft_fx.passes.analyse.maps import AffineMaps, is_scaled_by_a_root
from peft_fx.passes.analyse.refusals.ways import is_beside, reached
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.nodes import aten, tensor_arg

WINDOWS = {aten.unfold.default, aten.index_put.default, aten.constant_pad_nd.default}  # F.unfold, F.fold
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


def of_convolutions(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
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


def _vector_after(analysis: Sums, node: Node, kernel: Node) -> Node | None:
    """The trained vector that a product's result is scaled by, through sums and numbers alone."""
    flow = analysis.flow

    def readers(n: Node) -> Iterable[Node]:
        return (u for u in n.users if u in flow.forward and (u.target is aten.mul.Tensor or addends(u)))

    for user in reached(node, readers):
        others = [n for n in user.all_input_nodes if flow.is_weight(n)]
        if is_scaled_by_a_root(user):
            return None  # a norm's own vector comes next
        if user.target is aten.mul.Tensor and others and is_beside(analysis, others[0], kernel):
            return others[0]
        if user.target is aten.mul.Tensor and len(user.all_input_nodes) > 1 and not others:
            return None
    return None


def _matrix_before(analysis: Sums, x: Node, kernel: Node) -> Node | None:
    """The trained matrix in what overlapping windows are computed from."""
    flow = analysis.flow

    def read(n: Node) -> Iterable[Node]:
        return (i for i in n.all_input_nodes if not flow.is_weight(i) and not products_in(n))

    for node in reached(x, read):
        for product in products_in(node):
            found = next((n for n in (product.left, product.right) if flow.is_weight(n)), None)
            if found is not None and is_beside(analysis, found, kernel):
                return found
    return None
