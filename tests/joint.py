"""Joint graphs without a compile: captured once for each module, rewritten and run as often as a test likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from peft_fx import compat, compiling
from peft_fx.explaining import _copy_graph
from peft_fx.options import parse
from peft_fx.passes import pipeline
from peft_fx.passes.flow import Role


@dataclass
class Joint:
    """A joint graph, AOTAutograd's inputs to it, and what it takes to run the passes on a copy."""

    graph: Graph
    roles: dict[int, Role]
    fake_mode: Any
    module: nn.Module
    given: list[Any]

    def rewritten(self, **options: str) -> tuple[Graph, pipeline.Outcome]:
        """A copy of the graph with the passes applied, under `options` without their prefix."""
        graph = GraphModule(self.module, _copy_graph(self.graph)).graph
        parsed = parse({f"peft_fx.{k}": v for k, v in options.items()})
        settings = replace(parsed.settings(torch.device("cpu")), rebuild_random=parsed.lowering == "inductor")
        roles = compiling.roles_in(graph, self.roles)
        return graph, pipeline.run(graph, roles, settings, self.fake_mode, compat.hint_for(self.fake_mode))

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

    def run(self, graph: Graph, seed: int = 0, bound: int = 2) -> list[torch.Tensor | None]:
        """All outputs of a graph, the gradients among them, on small integers in its inputs' own dtypes."""
        g = torch.Generator().manual_seed(seed)
        inputs = []
        for node in graph.nodes:
            if node.op == "placeholder":
                val = node.meta["val"]
                filled = torch.randint(-bound, bound + 1, val.shape, generator=g).to(val.dtype)
                inputs.append(torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).copy_(filled))
        return list(GraphModule(graph.owning_module or self.module, graph)(*inputs))


def capture(module: nn.Module, *args: Any, **kwargs: Any) -> Joint:
    """The joint graph of a module's call, as the passes are given it; nothing is lowered."""
    found: list[Joint] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        roles = compiling.roles_of(gm, example_inputs)

        class Capture(compat.CustomGraphPass):  # type: ignore[misc]
            def __call__(self, graph: Graph) -> None:
                found.append(
                    Joint(
                        _copy_graph(graph), roles, compat.V.fake_mode, graph.owning_module or gm, list(example_inputs)
                    )
                )

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
