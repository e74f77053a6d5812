"""A joint graph split into forward and backward, as each variant would have it, and what the halves take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, GraphModule, Node

from peft_fx import budgeting, compat
from peft_fx.components import partitioned, returned
from peft_fx.graphs import copy_graph
from peft_fx.inductor_passes import Finish, PassError
from peft_fx.inputs import roles_in
from peft_fx.lengths import Sized
from peft_fx.options import Options
from peft_fx.passes.analyse.flow import Role, is_tangent
from peft_fx.passes.decide.machine import Machine
from peft_fx.records import Record
from peft_fx.retargeting import Home, Retarget, RetargetedPass
from peft_fx.step.traced import Halves
from peft_fx.variants import VARIANTS, Way

PATTERNS = ("pattern_matcher", "joint_graph_constant_folding")  # Inductor's passes over a joint graph


@dataclass(frozen=True)
class Target:
    """What a step is reckoned for: speeds, the device that its graphs are on, and bytes of an optimiser's state for one
    of a parameter."""

    machine: Machine
    retarget: Retarget
    states: int


def _all_that_is_read(
    joint: GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int, **kwargs: Any
) -> tuple[GraphModule, GraphModule]:
    """Keeps what backward reads of forward, and makes nothing again, as autograd does."""
    forward, backward = compat.default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs)
    return forward, backward


def copied(gm: GraphModule, graph: Graph | None = None) -> GraphModule:
    """A graph, by default the module's own, once more: to be read, and never called."""
    lazy: GraphModule = compat.LazyGraphModule(gm, copy_graph(graph or gm.graph))
    return lazy


class Joint(compat.CustomGraphPass):  # type: ignore[misc]
    """Keeps a copy of the joint graph, as Dynamo's graph came out, with the attention of the device that is told of."""

    graph: Graph | None = None

    def __init__(self, retarget: Retarget):
        self.retarget = retarget

    def __call__(self, graph: Graph) -> None:
        self.retarget.exchange(graph, compat.V.fake_mode)
        self.graph = copy_graph(graph)

    def uuid(self) -> Any:
        return None


class Split(compat.CustomPartitionerFn):  # type: ignore[misc]
    """Partitions the joint graph as each variant would, and walks what comes out."""

    def __init__(
        self,
        gm: GraphModule,
        roles: Any,
        named: Mapping[Way, Options | None],
        target: Target,
        handed_on: dict[int, Role],
    ):
        self.gm, self.roles, self.named, self.handed_on = gm, roles, named, handed_on
        self.machine, self.retarget = target.machine, target.retarget
        self.joint, self.parts = Joint(self.retarget), dict[Way, Halves]()
        self.patterns = {name: getattr(compat.inductor_config, name) for name in PATTERNS}

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        for options, ways in self._alike():
            try:
                self.parts |= self._split(gm, joint_inputs, options, ways, kwargs)
            except PassError:  # then the backend leaves the graph to Inductor
                self.parts |= self._split(gm, joint_inputs, None, ways, kwargs)
        forward, backward = self.parts[ways[0]].graphs
        return copied(forward), copied(backward)

    def _alike(self) -> Iterator[tuple[Options | None, list[Way]]]:
        """The variants whose joint graphs are the same, the lowest price first."""
        given = [(options, VARIANTS[way.name].compiles) for way, options in self.named.items()]
        for alike in (x for i, x in enumerate(given) if x not in given[:i]):
            ways = [way for way, other in zip(self.named, given, strict=True) if other == alike]
            yield alike[0], sorted(ways, key=lambda way: way.price)

    def _split(
        self, gm: GraphModule, joint_inputs: Sequence[object], options: Options | None, ways: Sequence[Way], kwargs: Any
    ) -> dict[Way, Halves]:
        """The halves at each price: the first split is as the partitioner makes it, which is then told what to keep."""
        assert self.joint.graph is not None
        joint = copied(gm, self.joint.graph)
        ours = None
        if options is not None:
            record = Record(self.gm, [], self.roles, options, True, device=self.retarget.device)
            ours = RetargetedPass(record, self.retarget)
        after = None if ours is None else Finish(ours)
        kept: dict[float, set[str]] = {}
        compiles = VARIANTS[ways[0].name].compiles

        def choose(price: float, graph: Graph, alone: Callable[[float], list[Node]], share: float) -> list[Node]:
            values = alone(share)
            if not kept:
                kept.update(self._kept(graph, values, {p for way in ways for p in VARIANTS[way.name].prices}))
            return [n for n in graph.nodes if n.name in kept[price]] if price else values

        found: dict[Way, Halves] = {}
        with compat.inductor_config.patch(joint_custom_pre_pass=ours, joint_custom_post_pass=after, **self.patterns):
            joint = compat.joint_graph_passes(joint, skip_invoke_subgraph=True)
            self.retarget.exchange(joint.graph, compat.V.fake_mode)  # what patterns have made
            for way in ways:
                same = next((w for w in found if kept[w.price] == kept[way.price]), None)
                with compat.choosing(functools.partial(choose, way.price)):
                    found[way] = found[same] if same else self._halves(copied(joint), joint_inputs, kwargs, compiles)
        return found

    def _kept(self, graph: Graph, values: list[Node], prices: Iterable[float]) -> dict[float, set[str]]:
        """The names of what the partitioner is to keep at each price, where it would keep those values by itself."""
        hint, dear = compat.hint_for(compat.V.fake_mode), sorted(filter(None, prices))
        prices = [p / self.machine.bandwidth for p in dear]
        chosen = budgeting.along(graph, values, prices, self.machine, hint) if dear else []
        return {p: {n.name for n in nodes} for p, nodes in zip([0.0, *dear], [values, *chosen], strict=True)}

    def _halves(
        self, joint: GraphModule, joint_inputs: Sequence[object], kwargs: dict[str, Any], compiles: bool
    ) -> Halves:
        handed_on = {n.name for n in roles_in(joint.graph, self.handed_on)}
        partition = compat.min_cut_rematerialization_partition if compiles else _all_that_is_read
        forward, backward, saved = partitioned(joint, joint_inputs, self.roles, kwargs, handed_on, partition)
        (results,) = forward.graph.find_nodes(op="output")
        places = {n.name: i for i, n in enumerate(results.args[0]) if isinstance(n, Node)}
        if compiles and self.machine.is_cpu == (self.retarget.device.type == "cpu"):
            self._lowered(forward, backward)
        kept = {places[name]: component for name, (component, _) in saved.items()}
        theirs = returned(forward, kwargs["num_fwd_outputs"]) | handed_on
        lent = {n.name for n in backward.graph.find_nodes(op="placeholder") if is_tangent(n) or n.name in theirs}
        hint = compat.hint_for(compat.V.fake_mode)
        sized = Sized.of((forward, backward), hint)
        halves = Halves((forward, backward), kept, handed_on, lent, self.machine, sized)
        return replace(halves, part=halves.reckoned(hint))

    def _lowered(self, *graphs: GraphModule) -> None:
        """What Inductor does with products and sums on the device, and with what can be computed in place."""
        patterns_on_it = {"post_grad_custom_post_pass": Home(self.retarget)}
        for gm in graphs:  # one by one: what one hands the other would be home too early
            with compat.inductor_config.patch(patterns_on_it), self.retarget.there(gm.graph):
                compat.post_grad_passes(gm, is_inference=False)

    def uuid(self) -> Any:
        return None
