"""Joint graphs without a compile: captured once for each module, rewritten and run as often as a test likes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node

from peft_fx import compat, compiling, inductor_passes
from peft_fx.graphs import copy_graph
from peft_fx.inputs import roles_in, roles_of
from peft_fx.options import parse
from peft_fx.passes import pipeline
from peft_fx.passes.analyse.flow import Role
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph import joint as analysed
from peft_fx.retargeting import Retarget
from peft_fx.tracing import CPU


@dataclass
class Joint:
    """A joint graph, AOTAutograd's inputs to it, and what it takes to run the passes on a copy."""

    graph: Graph
    roles: dict[int, Role]
    fake_mode: Any
    module: nn.Module
    given: list[Any] = field(default_factory=list)
    outputs: int = 0  # those of forward, where that is known
    _modules: dict[Graph, GraphModule] = field(default_factory=dict, repr=False)

    def rewritten(self, device: torch.device = CPU, **options: Any) -> tuple[Graph, Outcome]:
        """A copy of the graph with the passes applied, under `options` without their prefix, on a device."""
        graph = GraphModule(self.module, copy_graph(self.graph)).graph
        parsed = parse({f"peft_fx.{k}": v for k, v in options.items()})
        settings = replace(parsed.settings(device), rebuild_random=parsed.lowering == "inductor")
        roles, retarget = roles_in(graph, self.roles), Retarget(CPU, device)
        retarget.exchange(graph, self.fake_mode)
        with retarget.there(graph):
            outcome = pipeline.run(graph, roles, settings, self.fake_mode, compat.hint_for(self.fake_mode))
        return graph, outcome

    def opened(self) -> analysed.Joint:
        """A copy of the graph as the passes are given it."""
        graph = GraphModule(self.module, copy_graph(self.graph)).graph
        sizes = analysed.Sizes.of(compat.hint_for(self.fake_mode))
        return analysed.Joint(graph, roles_in(graph, self.roles), self.fake_mode, sizes)

    def run_on_given(self, graph: Graph, tangent: float = 1.0) -> list[torch.Tensor | None]:
        """The same on the tensors that the module was called with, and a tangent."""
        inputs: list[Any] = []
        for node in graph.find_nodes(op="placeholder"):
            val, index = node.meta["val"], getattr(node.meta.get("desc"), "idx", None)
            if "tangents" in node.name:
                inputs.append(torch.full(val.shape, tangent, dtype=val.dtype))
            else:
                given = self.given[index]
                inputs.append(given.detach() if isinstance(given, torch.Tensor) else given)
        return list(GraphModule(graph.owning_module or self.module, graph)(*inputs))

    def inputs(self, seed: int = 0, bound: int = 2, normal: bool = False) -> list[torch.Tensor]:
        """Small integers for each input of the graph in its own dtype, or normal numbers for those of a float."""
        g = torch.Generator().manual_seed(seed)
        inputs = []
        for node in self.graph.find_nodes(op="placeholder"):
            val = node.meta["val"]
            if normal and val.is_floating_point():
                filled = torch.randn(val.shape, generator=g)
            else:
                filled = torch.randint(-bound, bound + 1, val.shape, generator=g)
            inputs.append(torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).copy_(filled.to(val.dtype)))
        return inputs

    def call(self, graph: Graph, inputs: list[torch.Tensor], seed: int = 0) -> list[torch.Tensor | None]:
        """All outputs of a graph, the gradients among them, and what it leaves in the inputs that it writes; what it
        draws is drawn from the seed."""
        if graph not in self._modules:
            self._modules[graph] = GraphModule(graph.owning_module or self.module, graph)
        torch.manual_seed(seed)
        given = copies(inputs)
        return [*self._modules[graph](*given), *(given[i] for i in self.written)]

    @functools.cached_property
    def written(self) -> list[int]:
        """The inputs that the graph writes in place, by position."""
        places = {node: i for i, node in enumerate(self.graph.find_nodes(op="placeholder"))}
        writes = self.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        return sorted({places[node.args[0]] for node in writes})

    def run(self, graph: Graph, seed: int = 0, bound: int = 2) -> list[torch.Tensor | None]:
        return self.call(graph, self.inputs(seed, bound))

    def split(self, graph: Graph) -> tuple[GraphModule, GraphModule]:
        """Forward and backward, as Inductor's partitioner cuts them."""
        inputs = graph.find_nodes(op="placeholder")
        static = [i for i, role in self.roles.items() if role.static]
        return compat.min_cut_rematerialization_partition(
            GraphModule(self.module, copy_graph(graph)),
            [n.meta["val"] for n in inputs],
            num_fwd_outputs=self.outputs,
            static_lifetime_input_indices=static,
        )

    def as_lowered(self, graph: Graph) -> Graph:
        """A rewritten graph after Inductor's own joint passes, and what the backend does behind them."""
        lowered = GraphModule(self.module, copy_graph(graph))
        untagged = {n for n in lowered.graph.nodes if "recompute" not in n.meta}
        finish = inductor_passes.Finish(SimpleNamespace(untagged=untagged))  # type: ignore[arg-type]
        patches = {"joint_custom_pre_pass": None, "joint_custom_post_pass": finish, "fallback_random": True}
        with compat.V.set_fake_mode(self.fake_mode), compat.inductor_config.patch(patches):
            return compat.joint_graph_passes(lowered).graph

    def steps(self, graph: Graph, inputs: list[torch.Tensor], seed: int = 0) -> list[torch.Tensor | None]:
        """The results of two calls, the second on what the first leaves in the inputs."""
        first = self.call(graph, inputs, seed)
        left = dict(zip(self.written, first[len(first) - len(self.written) :], strict=True))
        return [*first, *self.call(graph, [left.get(i, t) for i, t in enumerate(inputs)], seed)]

    def steps_of(self, halves: tuple[GraphModule, GraphModule], inputs: list[Any], together: bool) -> list[Any]:
        """The same of forward and backward by themselves; if `together`, both forwards before both backwards."""
        forward, backward = halves
        given = dict(zip((n.name for n in self.graph.find_nodes(op="placeholder")), copies(inputs), strict=True))
        read = [[n.name for n in half.graph.find_nodes(op="placeholder")] for half in halves]

        def ahead() -> tuple[dict[str, Any], list[Any], list[Any]]:
            made = list(forward(*(given[name] for name in read[0])))
            kept = zip(forward.graph.output_node().args[0], made, strict=True)
            left = copies([list(given.values())[i] for i in self.written])
            return given | {n.name: t for n, t in kept if isinstance(n, Node)}, copies(made[: self.outputs]), left

        results: list[Any] = []
        for there, made, left in [ahead(), ahead()] if together else (ahead() for _ in range(2)):
            results += [*made, *backward(*(there[name] for name in read[1])), *left]
        return results


def copies(tensors: list[Any]) -> list[Any]:
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]


def trace(module: nn.Module, *args: torch.Tensor) -> Joint:
    """As `capture`, by AOTAutograd alone, without Dynamo."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    found: list[Joint] = []

    def call(*flat: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(named, flat, strict=False)), flat[len(named) :])

    def keep(gm: GraphModule, outputs: int) -> None:
        roles = {i: Role(name, True, p.requires_grad) for i, (name, p) in enumerate(named.items())}
        fake_mode = compat.detect_fake_mode([n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")])
        found.append(Joint(copy_graph(gm.graph), roles, fake_mode, gm, outputs=outputs))

    def partition(gm: GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        keep(gm, num_fwd_outputs)
        raise _Traced

    def inference(gm: GraphModule, inputs: Any) -> Any:
        keep(gm, 0)
        raise _Traced

    with contextlib.suppress(_Traced):
        aot_function(
            call,
            inference,
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )(*named.values(), *args)
    (joint,) = found
    return joint


class _Traced(Exception):
    """The joint graph is there: nothing more is asked of AOTAutograd."""


def capture(module: nn.Module, *args: Any, **kwargs: Any) -> Joint:
    """The joint graph of a module's call, as the passes are given it; nothing is lowered."""
    found: list[Joint] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        roles = roles_of(gm, example_inputs)

        class Capture(compat.CustomGraphPass):  # type: ignore[misc]
            def __call__(self, graph: Graph) -> None:
                owner = graph.owning_module or gm
                found.append(Joint(copy_graph(graph), roles, compat.V.fake_mode, owner, list(example_inputs)))

            def uuid(self) -> None:
                return None

        return compat.compile_fx(
            gm,
            example_inputs,
            inner_compile=compiling._run_eagerly,
            config_patches={"joint_custom_pre_pass": Capture(), "fallback_random": True},
        )

    torch.compile(module, backend=backend)(*args, **kwargs)
    (joint,) = found
    return joint


def equal(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    """Bit for bit, and None where the other is None."""
    return len(a) == len(b) and all(
        (x is None) == (y is None) and (x is None or y is None or (x.dtype == y.dtype and torch.equal(x, y)))
        for x, y in zip(a, b, strict=True)
    )
