"""What an adapter is: the one definition, which all that look for adapters ask.

An *adapter* of a layer's weight W [K,N] adds to the layer's product, or transforms what W reads or gives, by parameters
that are small beside W. A layer of its own is none, be it trained beside W, before it or behind it: its weight is as
large as W, or as wide. Three things tell, in this order:

- *structure*: a product of factors is added to u·W of a frozen W, and reads u too. That is an adapter at any size: a
  rank may be larger than a small layer is wide.
- *size*: what reads another value, or is not linear, is one if each of its parameters has fewer numbers than W, and is
  narrower, as a matrix, than W is either way. A block of attention is not, for it has a matrix as wide as its result.
- Where training does not tell the layer from its adapter, because both are trained or both are frozen, an adapter has
  fewer numbers than W in all, and is linear, but for what is drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from peft_fx.passes.analyse.algebra import Matrix, Size
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.graph.nodes import numel, shape


def adds(flow: Flow, weight: Matrix, factors: Sequence[Matrix]) -> bool:
    """Whether a product of factors, added to a weight in `u·W + u·A·B`, is an adapter's."""
    own = flow.parameters(weight.name)
    read = {p for f in factors for p in flow.parameters(f.name)}
    others = read.difference(own)
    if not own or not read:
        return True  # of no parameters, nothing is known
    if not others:
        return False  # the layer's own product, in parts
    if _told_apart(flow, weight, others):
        with_it = len(others) < len(read)  # computed from W, as the norm of a direction is
        return len(factors) > 1 or with_it or all(_has_fewer([p], weight) for p in others)
    return _has_fewer(others, weight)


def stands_beside(flow: Flow, weight: Matrix, parameters: Sequence[Node], same_input: bool, linear: bool) -> bool:
    """Whether what is added to a weight's product by trained parameters, and cannot join it, is an adapter."""
    if _told_apart(flow, weight, parameters):
        if same_input and linear and sum(len(shape(p)) > 1 for p in parameters) == 1:
            return _has_fewer(parameters, weight)  # one matrix by itself may be a layer of its own
        return same_input or are_small(parameters, weight.shape)
    return same_input and linear and _has_fewer(parameters, weight)


def are_small(parameters: Iterable[Node], sizes: Sequence[Size]) -> bool:
    """Whether parameters have each fewer numbers than a weight of these sizes, and are narrower than it is either
    way."""
    matrices = [(s[0], numel(s[1:])) for s in map(shape, parameters) if len(s) > 1]
    return all(bool(numel(m) < numel(sizes) and min(m) < min(sizes)) for m in matrices)


def are_low_rank(A: Sequence[Size], B: Sequence[Size]) -> bool:
    """Whether two matrices of `u·A·B` are both narrowest where they meet."""
    return bool(min(A) == min(B) and min(A) < max(A) and min(B) < max(B))


def _told_apart(flow: Flow, weight: Matrix, parameters: Iterable[Node]) -> bool:
    """Whether a weight is frozen, and some of an adapter's parameters are trained."""
    return not flow.is_trained(weight.name) and any(flow.roles[p].trainable for p in parameters)


def _has_fewer(parameters: Iterable[Node], weight: Matrix) -> bool:
    numbers = sum(numel(shape(p)) for p in parameters if len(shape(p)) > 1)
    return bool(numbers < numel(weight.shape) * weight.batch)
