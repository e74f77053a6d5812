"""Joint graphs without a compile: captured once for each module, rewritten and run as often as a test likes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule

from peft_fx import compat, compiling
from peft_fx.options import parse
from peft_fx.passes import pipeline
from peft_fx.passes.flow import Role
from peft_fx.retargeting import Retarget
from peft_fx.tracing import CPU, copy_graph


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

    def rewritten(self, device: torch.device = CPU, **options: Any) -> tuple[Graph, pipeline.Outcome]:
        """A copy of the graph with the passes applied, under `options` without their prefix, on a device."""
        graph = GraphModule(self.module, copy_graph(self.graph)).graph
        parsed = parse({f"peft_fx.{k}": v for k, v in options.items()})
        settings = replace(parsed.settings(device), rebuild_random=parsed.lowering == "inductor")
        roles, retarget = compiling.roles_in(graph, self.roles), Retarget(CPU, device)
        retarget.exchange(graph, self.fake_mode)
        with retarget.there(graph):
            outcome = pipeline.run(graph, roles, settings, self.fake_mode, compat.hint_for(self.fake_mode))
        return graph, outcome

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
        """All outputs of a graph, the gradients among them; what it draws is drawn from the seed."""
        if graph not in self._modules:
            self._modules[graph] = GraphModule(graph.owning_module or self.module, graph)
        torch.manual_seed(seed)
        return list(self._modules[graph](*inputs))

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


def trace(module: nn.Module, *args: torch.Tensor) -> Joint:
    """As `capture`, by AOTAutograd alone, without Dynamo."""
    named = dict(module.named_parameters())
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
        aot_function(call, inference, partition_fn=partition, decompositions=select_decomp_table())(
            *named.values(), *args
        )
    (joint,) = found
    return joint


class _Traced(Exception):
    """The joint graph is there: nothing more is asked of AOTAutograd."""


def capture(module: nn.Module, *args: Any, **kwargs: Any) -> Joint:
    """The joint graph of a module's call, as the passes are given it; nothing is lowered."""
    found: list[Joint] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        roles = compiling.roles_of(gm, example_inputs)

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
