"""Every entry of every rule table has a case, and each case says on integers that the rule is the op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from peft_fx.passes.analyse.affine_rules import AFFINE
from peft_fx.passes.analyse.flow import Flow, Role, leading_to, reachable
from peft_fx.passes.analyse.linear_rules import LINEAR, Product, addends
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import CAST, aten, prims, shape, value
from peft_fx.passes.loss.row_rules import ROWS, SIZED, treatments
from peft_fx.passes.rewrite.materialise import Materialise

T, K = 6, 4
Call = Callable[..., Node]


class Opened:
    """A graph that ops are added to: x [T,K] with other values at each call, and weights w [K,K], v [K], c [T,1]."""

    def __init__(self, **given: Tensor):
        self.graph, mode = Graph(), FakeTensorMode()
        self.given, self.inputs = given, {}
        for name, tensor in given.items():
            self.inputs[name] = self.graph.placeholder(name)
            self.inputs[name].meta["val"] = mode.from_tensor(tensor)
        self.edit = Editor(self.graph, mode)

    @property
    def roles(self) -> dict[Node, Role]:
        return {node: Role(f"layer.{name}", True, True) for name, node in self.inputs.items() if name != "x"}

    def results(self, *nodes: Node | None) -> list[Tensor]:
        """What nodes come to."""
        for output in self.graph.find_nodes(op="output"):
            self.edit.erase(output)
        self.graph.output(tuple(nodes))
        self.graph.lint()
        return list(GraphModule(torch.nn.Module(), self.graph)(*self.given.values()))


def integers(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, sizes, generator=torch.Generator().manual_seed(seed)).double()


def opened() -> Opened:
    order = torch.tensor([2, 0, 3, 1])
    return Opened(x=integers(T, K), w=integers(K, K, seed=1), v=integers(K, seed=2), i=order)


Case = Callable[[Call, dict[str, Node]], Node]


# -------------------------------------------------------------------------------------------------------------- linear


def _of_batches(call: Call, n: dict[str, Node]) -> tuple[Node, Node]:
    return call(aten.view.default, n["x"], [2, 3, K]), call(aten.expand.default, n["w"], [2, K, K])


def _image(call: Call, n: dict[str, Node]) -> tuple[Node, Node]:
    """An image [2,1,3,4] and a kernel [4,1,2,2]."""
    return call(aten.view.default, n["x"], [2, 1, 3, K]), call(aten.view.default, n["w"], [K, 1, 2, 2])


WINDOW = ([1, 1], [1, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups


def _convolved_back(call: Call, n: dict[str, Node]) -> Node:
    x, kernel = _image(call, n)
    y = call(aten.convolution.default, x, kernel, None, *WINDOW)
    results = call(aten.convolution_backward.default, y, x, kernel, None, *WINDOW, [True, False, False])
    return call(operator.getitem, results, 0)


LINEAR_CASES: dict[Any, Case] = {
    operator.getitem: _convolved_back,
    aten.convolution.default: lambda call, n: call(aten.convolution.default, *_image(call, n), None, *WINDOW),
    aten.embedding.default: lambda call, n: call(aten.embedding.default, n["w"], n["i"]),
    aten.view.default: lambda call, n: call(aten.view.default, n["x"], [2, 12]),
    aten.reshape.default: lambda call, n: call(aten.reshape.default, n["x"], [2, 12]),
    aten._unsafe_view.default: lambda call, n: call(aten._unsafe_view.default, n["x"], [2, 12]),
    aten.unsqueeze.default: lambda call, n: call(aten.unsqueeze.default, n["x"], 1),
    aten.squeeze.dim: lambda call, n: call(aten.squeeze.dim, call(aten.unsqueeze.default, n["x"], 1), 1),
    aten.squeeze.dims: lambda call, n: call(aten.squeeze.dims, call(aten.unsqueeze.default, n["x"], 1), [1]),
    aten.squeeze.default: lambda call, n: call(aten.squeeze.default, call(aten.unsqueeze.default, n["x"], 1)),
    aten.clone.default: lambda call, n: call(aten.clone.default, n["x"]),
    aten.alias.default: lambda call, n: call(aten.alias.default, n["x"]),
    aten.detach.default: lambda call, n: call(aten.detach.default, n["x"]),
    CAST: lambda call, n: call(CAST, n["x"], torch.float32),
    aten._to_copy.default: lambda call, n: call(aten._to_copy.default, n["x"], dtype=torch.float32),
    aten.expand.default: lambda call, n: call(aten.expand.default, n["x"], [1, T, K]),
    aten.permute.default: lambda call, n: call(aten.permute.default, n["x"], [1, 0]),
    aten.transpose.int: lambda call, n: call(aten.transpose.int, n["x"], 0, 1),
    aten.add.Tensor: lambda call, n: call(aten.add.Tensor, n["x"], n["x"], alpha=3),
    aten.sub.Tensor: lambda call, n: call(aten.sub.Tensor, n["x"], n["x"], alpha=3),
    aten.neg.default: lambda call, n: call(aten.neg.default, n["x"]),
    aten.mul.Tensor: lambda call, n: call(aten.mul.Tensor, n["x"], 3),
    aten.mul.Scalar: lambda call, n: call(aten.mul.Scalar, n["x"], 3),
    aten.div.Tensor: lambda call, n: call(aten.div.Tensor, n["x"], 2),
    aten.mm.default: lambda call, n: call(aten.mm.default, n["x"], n["w"]),
    aten.bmm.default: lambda call, n: call(aten.bmm.default, *_of_batches(call, n)),
    aten.addmm.default: lambda call, n: call(aten.addmm.default, n["x"], n["x"], n["w"], beta=2, alpha=3),
    aten.baddbmm.default: lambda call, n: call(
        aten.baddbmm.default, _of_batches(call, n)[0], *_of_batches(call, n), beta=2, alpha=3
    ),
}


def multiplied(product: Product, values: dict[Node, Tensor], like: Tensor) -> Tensor:
    """What a product stands for, spelt out."""
    left, right = values[product.left], values[product.right]
    if product.gathered:
        return right[left]
    if product.window is None:
        return left @ right
    w, flat = product.window, left.flatten(1)
    how = {"dilation": w.dilation, "padding": w.padding, "stride": w.stride}
    if product.folded:
        return F.fold(flat.T @ right.flatten(2), like.shape[2:], w.kernel, **how)
    return (flat @ F.unfold(right, w.kernel, **how)).reshape(like.shape)


@pytest.mark.parametrize("op", LINEAR_CASES, ids=str)
def test_a_linear_rule_is_its_op(op: Any) -> None:
    """The sum of what the rule says, evaluated."""
    graph = opened()
    node = LINEAR_CASES[op](graph.edit.call, graph.inputs)
    assert node.target is op
    parts = addends(node)
    assert parts
    read = {n for p in parts for n in (p.operand, getattr(p.operand, "left", None), getattr(p.operand, "right", None))}
    nodes = [n for n in read if isinstance(n, Node)]
    want, *found = graph.results(node, *nodes)
    values = dict(zip(nodes, found, strict=True))
    total = torch.zeros_like(want)
    for part in parts:
        assert part.operand is not None
        own = multiplied(part.operand, values, want) if isinstance(part.operand, Product) else values[part.operand]
        own = own.permute(part.dims) if part.dims else own
        total += own.reshape(want.shape).to(want.dtype) * part.scale.number
    assert torch.equal(total, want)


# -------------------------------------------------------------------------------------------------------------- affine


def _pairs(call: Call, n: dict[str, Node]) -> Node:
    """Features in two dimensions, [T,2,2]."""
    return call(aten.view.default, n["x"], [T, 2, 2])


def _zeros(call: Call, *sizes: int) -> Node:
    return call(aten.full.default, list(sizes), 0, dtype=torch.float64)


def _transformed(call: Call, n: dict[str, Node]) -> Node:
    return call(aten._fft_r2c.default, n["x"], [1], 0, False)


def _parts(call: Call, n: dict[str, Node]) -> Node:
    return call(operator.getitem, call(aten.split.Tensor, n["x"], 1, 1), 2)


AFFINE_CASES: dict[Any, Case] = {
    **{op: case for op, case in LINEAR_CASES.items() if op in AFFINE and op is not operator.getitem},
    aten.view.default: lambda call, n: call(aten.view.default, n["x"], [T, 2, 2]),
    aten.reshape.default: lambda call, n: call(aten.reshape.default, n["x"], [T, 2, 2]),
    aten._unsafe_view.default: lambda call, n: call(aten._unsafe_view.default, n["x"], [T, 2, 2]),
    aten.permute.default: lambda call, n: call(aten.permute.default, _pairs(call, n), [0, 2, 1]),
    aten.transpose.int: lambda call, n: call(aten.transpose.int, _pairs(call, n), 1, 2),
    aten.add.Tensor: lambda call, n: call(aten.add.Tensor, n["x"], n["v"], alpha=3),
    aten.sub.Tensor: lambda call, n: call(aten.sub.Tensor, n["v"], n["x"], alpha=3),
    aten.mul.Tensor: lambda call, n: call(aten.mul.Tensor, n["x"], n["v"]),
    aten.div.Scalar: lambda call, n: call(aten.div.Scalar, n["x"], 2),
    aten.bmm.default: lambda call, n: call(
        aten.bmm.default, call(aten.view.default, n["x"], [1, T, K]), call(aten.unsqueeze.default, n["w"], 0)
    ),
    aten.addmm.default: lambda call, n: call(aten.addmm.default, n["v"], n["x"], n["w"]),
    aten.baddbmm.default: lambda call, n: call(
        aten.baddbmm.default,
        n["v"],
        call(aten.view.default, n["x"], [1, T, K]),
        call(aten.unsqueeze.default, n["w"], 0),
    ),
    aten._conj.default: lambda call, n: call(aten._conj.default, _transformed(call, n)),
    aten.expand.default: lambda call, n: call(aten.expand.default, call(aten.unsqueeze.default, n["x"], 1), [T, 3, K]),
    aten.sum.dim_IntList: lambda call, n: call(aten.sum.dim_IntList, _pairs(call, n), [1]),
    aten.mean.dim: lambda call, n: call(aten.mean.dim, _pairs(call, n), [1]),
    aten.select.int: lambda call, n: call(aten.select.int, n["x"], 1, 2),
    aten.slice.Tensor: lambda call, n: call(aten.slice.Tensor, n["x"], 1, 1, 3),
    prims.rev.default: lambda call, n: call(prims.rev.default, n["x"], [1]),
    aten.index.Tensor: lambda call, n: call(aten.index.Tensor, n["x"], [None, n["i"]]),
    aten._fft_r2c.default: _transformed,
    aten._fft_c2c.default: lambda call, n: call(aten._fft_c2c.default, _transformed(call, n), [1], 0, True),
    aten._fft_c2r.default: lambda call, n: call(
        aten._fft_c2r.default, call(aten._fft_r2c.default, n["x"], [1], 0, True), [1], 2, K
    ),
    aten.view_as_real.default: lambda call, n: call(aten.view_as_real.default, _transformed(call, n)),
    aten.cat.default: lambda call, n: call(aten.cat.default, [n["x"], call(aten.neg.default, n["x"])], 1),
    aten.select_scatter.default: lambda call, n: call(aten.select_scatter.default, _zeros(call, T, 3, K), n["x"], 1, 2),
    aten.slice_scatter.default: lambda call, n: call(
        aten.slice_scatter.default, _zeros(call, T, 2 * K), n["x"], 1, 1, 1 + K
    ),
    aten.index_put.default: lambda call, n: call(aten.index_put.default, _zeros(call, T, K), [None, n["i"]], n["x"]),
    aten.index_add.default: lambda call, n: call(aten.index_add.default, _zeros(call, T, K), 1, n["i"], n["x"]),
    operator.getitem: _parts,
    aten.copy.default: lambda call, n: call(aten.copy.default, _zeros(call, T, K), n["x"]),
}


@pytest.mark.parametrize("op", AFFINE_CASES, ids=str)
def test_an_affine_rule_is_its_op(op: Any) -> None:
    """`x·W' + b'`, with W' and b' made by the op on the rows of an identity and on zeros."""
    graph = opened()
    x = graph.inputs["x"]
    node = AFFINE_CASES[op](graph.edit.call, graph.inputs)
    assert node.target is op
    graph.graph.output((node,))
    maps = AffineMaps(list(graph.graph.nodes), Flow(graph.graph, graph.roles))
    assert maps.of[node].source is x
    again = Materialise(graph.edit, maps.from_source([node], x), x, K, torch.float64)
    with graph.edit.at(graph.graph.output_node(), like=node):
        made = again.matrix(node)
    want, W, b = graph.results(node, *made)
    given = graph.given["x"].to(W.dtype)
    assert torch.equal(given @ W + (0 if b is None else b), want.reshape(T, -1).to(W.dtype))


# ---------------------------------------------------------------------------------------------------------------- rows


def _numbers(call: Call, n: dict[str, Node]) -> Node:
    """For each row a column of x."""
    return call(aten.argmax.default, n["rows"], 1, True)


def _reduced(op: Any, *args: Any) -> Case:
    return lambda call, n: call(op, n["rows"], *args)


ROW_CASES: dict[Any, Case] = {
    **{op: (lambda call, n, op=op: call(op, n["rows"])) for op in ROWS if op in LINEAR and "clone" in str(op)},
    aten.alias.default: lambda call, n: call(aten.alias.default, n["rows"]),
    aten.detach.default: lambda call, n: call(aten.detach.default, n["rows"]),
    CAST: lambda call, n: call(CAST, n["rows"], torch.float32),
    aten.view.default: lambda call, n: call(aten.view.default, n["rows"], [T, 2, 2]),
    aten.reshape.default: lambda call, n: call(aten.reshape.default, n["rows"], [T, 2, 2]),
    aten._unsafe_view.default: lambda call, n: call(aten._unsafe_view.default, n["rows"], [T, 2, 2]),
    aten.expand.default: lambda call, n: call(aten.expand.default, n["rows"], [2, T, K]),
    aten.permute.default: lambda call, n: call(aten.permute.default, n["rows"], [1, 0]),
    aten.unsqueeze.default: lambda call, n: call(aten.unsqueeze.default, n["rows"], 0),
    aten.squeeze.dim: lambda call, n: call(aten.squeeze.dim, n["wide"], 0),
    aten.squeeze.dims: lambda call, n: call(aten.squeeze.dims, n["wide"], [0]),
    aten.sum.dim_IntList: _reduced(aten.sum.dim_IntList, [0]),
    aten.sum.default: _reduced(aten.sum.default),
    aten.mean.dim: _reduced(aten.mean.dim, [1]),
    aten.amax.default: _reduced(aten.amax.default, [1]),
    aten.amin.default: _reduced(aten.amin.default, [1]),
    aten.any.dim: _reduced(aten.any.dim, 1),
    aten.all.dim: _reduced(aten.all.dim, 1),
    aten.argmax.default: _reduced(aten.argmax.default, 1),
    aten.argmin.default: _reduced(aten.argmin.default, 1),
    aten.prod.dim_int: _reduced(aten.prod.dim_int, 1),
    aten.logsumexp.default: _reduced(aten.logsumexp.default, [1]),
    aten.var.correction: _reduced(aten.var.correction, [1]),
    aten.gather.default: lambda call, n: call(aten.gather.default, n["rows"], 1, n["numbers"]),
    aten.scatter.value: lambda call, n: call(aten.scatter.value, n["rows"], 1, n["numbers"], 7.0),
    aten.scatter.src: lambda call, n: call(aten.scatter.src, n["rows"], 1, n["numbers"], n["rows"]),
    aten.scatter_add.default: lambda call, n: call(aten.scatter_add.default, n["rows"], 1, n["numbers"], n["rows"]),
    aten.slice.Tensor: lambda call, n: call(aten.slice.Tensor, n["rows"], 1, 1, 3),
    aten.slice_scatter.default: lambda call, n: call(
        aten.slice_scatter.default, n["rows"], call(aten.slice.Tensor, n["rows"], 1, 1, 3), 1, 0, 2
    ),
    aten.cumsum.default: lambda call, n: call(aten.cumsum.default, n["rows"], 1),
    aten.constant_pad_nd.default: lambda call, n: call(aten.constant_pad_nd.default, n["rows"], [1, 2]),
    aten.flip.default: lambda call, n: call(aten.flip.default, n["rows"], [1]),
    aten.mm.default: lambda call, n: call(aten.mm.default, call(aten.permute.default, n["rows"], [1, 0]), n["rows"]),
    aten.bmm.default: lambda call, n: call(aten.bmm.default, n["wide"], call(aten.expand.default, n["w"], [1, K, K])),
    aten.addmm.default: lambda call, n: call(aten.addmm.default, n["v"], n["rows"], n["w"]),
}


@pytest.mark.parametrize("op", ROW_CASES, ids=str)
def test_a_row_rule_is_its_op(op: Any) -> None:
    """Done to some rows, and to the others: together what it is of all, or two addends of it."""
    graph = opened()
    call = graph.edit.call
    inputs = graph.inputs | {"rows": call(aten.clone.default, graph.inputs["x"])}
    inputs |= {"wide": call(aten.unsqueeze.default, inputs["rows"], 0), "numbers": _numbers(call, inputs)}
    node = ROW_CASES[op](call, inputs)
    assert node.target is op
    reached = reachable(graph.graph, lambda n: n is inputs["rows"]) & leading_to([node])
    inside = [n for n in graph.graph.nodes if n in reached]
    how = treatments(inside, T)[node]
    tensors = [a for a in node.args if isinstance(a, Node)]
    whole, *found = graph.results(node, *tensors)
    values = dict(zip(tensors, found, strict=True))
    done = []
    for start, stop in ((0, 2), (2, T)):
        args: list[Any] = [values.get(a, a) if isinstance(a, Node) else a for a in node.args]
        for i, rows in how.operands.items():
            args[i] = args[i].narrow(rows.start, start, stop - start)
        if op in SIZED:
            assert how.rows is not None
            args[1] = how.rows.part(shape(node), stop - start)
        done.append(op(*args, **node.kwargs))
    assert value(node) is not None
    assert torch.equal(sum(done) if how.rows is None else torch.cat(done, how.rows.start), whole)


@pytest.mark.parametrize(
    ("table", "cases"),
    [(LINEAR, LINEAR_CASES), (AFFINE, AFFINE_CASES), (ROWS, ROW_CASES)],
    ids=["linear", "affine", "rows"],
)
def test_every_rule_has_a_case(table: dict[Any, Any], cases: dict[Any, Any]) -> None:
    without = [str(op) for op in table if op not in cases]
    assert not without, "a rule without a case: add one to LINEAR_CASES, AFFINE_CASES or ROW_CASES"
    assert set(cases) == set(table)
