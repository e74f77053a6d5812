"""Steps of small models through the backend, in this process or in one of their own, and keys of the caches."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import peft_fx
from peft_fx import compat, compiling, inductor_passes
from peft_fx.options import parse
from peft_fx.passes.analyse.flow import Role
from peft_fx.passes.graph.nodes import aten
from peft_fx.records import Record
from tests.support.oracle import Run, assert_bit_equal, run, weight_form
from tests.support.spellings import K, Stack, x

ROOT = pathlib.Path(__file__).parents[2]
T = (2, 17, K)


def step(make: Callable[[], nn.Module] = Stack, **options: Any) -> tuple[Run, Any]:
    """One training step of a small model, compiled anew; and the compiled model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs = make(), x(*T)()
    f = weight_form(module, **options)
    return run(f, module, inputs), f


def plain(gm: GraphModule, example_inputs: list[Any]) -> Any:
    """The lowering of the tests with none of our code in it."""
    patches = {"fallback_random": True, "fx_graph_cache": False}
    return compat.compile_fx(gm, example_inputs, inner_compile=compiling._run_eagerly, config_patches=patches)


def plain_step(make: Callable[[], nn.Module] = Stack) -> Run:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs = make(), x(*T)()
    return run(torch.compile(module, backend=plain), module, inputs)


class Injected(Exception):
    pass


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Injected("on purpose")


ROLES = {0: Role("up.W", True, False), 1: Role("up.A", True, True), 2: Role("x")}


def key(roles: dict[int, Role] | None = None, **options: str) -> Any:
    """The pass's key in Inductor's caches."""
    chosen = parse({f"peft_fx.{k}": v for k, v in options.items()})
    record = Record(GraphModule({}, Graph()), [torch.zeros(1)], roles or ROLES, chosen, True)
    return inductor_passes.AdapterPass(record).uuid()


RUN = uuid.uuid4().hex


def python(source: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, whose graphs are cached for `cwd` alone; headers that g++ has read are everyone's."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "PEFT_FX_DISABLE")}
    variables |= {"TORCH_COMPILE_CACHE_KEY_TAG": f"{RUN} {cwd}", **environment}
    command = [sys.executable, "-W", "error:peft_fx:RuntimeWarning", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


class Noting(compat.CustomGraphPass):  # type: ignore[misc]
    """A user's own pass: notes the sizes of the products that it sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append(sum(n.target is aten.mm.default for n in graph.nodes))

    def uuid(self) -> str:
        return "noting"


def assert_falls_back(make: Callable[[], nn.Module] = Stack, because: str = "") -> None:
    """One warning, the untouched graph's bits, and a report that says so."""
    with pytest.warns(RuntimeWarning, match=r"^peft_fx") as caught:
        got, f = step(make)
    assert [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] == [str(caught[0].message)]
    assert because in str(caught[0].message)
    assert_bit_equal(got, plain_step(make))
    report = peft_fx.explain(f)
    assert len(report.failures) == 1
    assert because in report.failures[0]
    assert (report.sites, report.refusals) == ([], [])
