"""The canary of peft_fx.compat: torch's private names are there, and do what the project takes them to do."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import types

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import peft_fx
from peft_fx import compat
from peft_fx.sources import name_in_model
from tests.support import spellings
from tests.support.oracle import weight_form


@pytest.mark.parametrize("name", compat.__all__)
def test_name_exists(name: str) -> None:
    """Every name that the project takes from torch, and none of them None."""
    assert getattr(compat, name) is not None


def test_arguments_are_accepted() -> None:
    """The parameters that we pass by name."""
    wanted = {
        compat.compile_fx: {"inner_compile", "config_patches"},
        compat.FakeTensorMode: {"allow_non_fake_inputs", "shape_env"},
        compat.min_cut_rematerialization_partition: {"num_fwd_outputs"},
        compat.TracingContext: {"fake_mode"},
        compat.joint_graph_passes: {"skip_invoke_subgraph"},
        compat.post_grad_passes: {"is_inference"},
    }
    for f, names in wanted.items():
        assert names <= set(inspect.signature(f).parameters), f


def test_configuration_has_our_keys() -> None:
    """Of Inductor and of AOTAutograd."""
    passes = "joint_custom_pre_pass", "joint_custom_post_pass", "custom_partitioner_fn"
    for name in (*passes, "fallback_random", "fx_graph_cache"):
        assert hasattr(compat.inductor_config, name)
    assert hasattr(compat.functorch_config, "enable_autograd_cache")
    assert hasattr(compat.dynamo_config, "recompile_limit")
    assert hasattr(compat.dynamo_config, "accumulated_recompile_limit")


def private_names(source: str) -> set[str]:
    """What of torch a program reads by names that begin with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if re.match(r"(torch|functorch)\.(.*\.)?_[a-z]\w*", name)}


def test_private_names_are_in_one_place() -> None:
    """Everything else in peft_fx and its passes gets by on what PyTorch documents."""
    root = pathlib.Path(compat.__file__).parent
    found = {p.name: private_names(p.read_text()) for p in (*root.rglob("*.py"), *(root / "passes").rglob("*.py"))}
    assert {name for name, names in found.items() if names} == {"compat.py"}
    assert {"torch._inductor.config", "torch.Tensor._make_subclass"} <= found["compat.py"]


def test_same_memory_is_another_object() -> None:
    x = nn.Parameter(torch.zeros(3))
    y = compat.same_memory(x)
    assert y is not x
    assert type(y) is nn.Parameter
    assert y.data_ptr() == x.data_ptr()
    assert y.requires_grad


def test_a_sharded_model_is_known(tmp_path: pathlib.Path) -> None:
    """FSDP2's whole parameters, by their names, once it has gathered them."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    assert not compat.is_sharded(module)
    assert list(compat.gathered(module)) == []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.distributed.fsdp.fully_shard(module[0])
        assert compat.is_sharded(module)
        module(torch.zeros(1, 2))
        assert [(name, p.shape) for name, p in compat.gathered(module)] == [("0.weight", (2, 2)), ("0.bias", (2,))]
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_in_the_first_fsdp_is_told_of(tmp_path: pathlib.Path) -> None:
    """It hands a model's code views of one flat parameter: what was compiled on these is the model's."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp = torch.distributed.fsdp.FullyShardedDataParallel
        module = fsdp(spellings.Lora(spellings.scale_right), use_orig_params=True, device_id=torch.device("cpu"))
        assert compat.is_sharded(module)
        assert [name for name, _ in compat.gathered(module)] == ["_flat_param"]
        x = torch.randn(8, 96)
        with pytest.raises(TypeError, match="FSDP has sharded"):
            peft_fx.explain(module, x)
        f = weight_form(module)
        f(x).sum().backward()
        for asked in (f, module):
            assert [(s.name, s.forward) for s in peft_fx.explain(asked).sites] == [("W", "weight")]
    finally:
        torch.distributed.destroy_process_group()


def test_a_pass_is_a_pass_with_a_key() -> None:
    """What Inductor's caches ask for, so that ours are not turned away."""
    assert {"__call__", "uuid"} <= compat.CustomGraphPass.__abstractmethods__
    assert {"__call__", "uuid"} <= compat.CustomPartitionerFn.__abstractmethods__


def test_after_the_split_inductor_adds_to_a_product() -> None:
    """What estimate() has it do: a sum with a product's result becomes one call of a library, on a CPU."""
    a = torch.randn(4, 4)
    graph = make_fx(lambda a, b: a.sin() + a @ b, tracing_mode="fake")(a, a)
    x, _ = graph.graph.find_nodes(op="placeholder")
    with compat.V.set_fake_mode(x.meta["val"].fake_mode):
        compat.post_grad_passes(graph, is_inference=False)
    assert [str(n.target) for n in graph.graph.nodes if "mm" in str(n.target)] == ["aten.addmm.default"]


def test_every_mode_is_listed() -> None:
    """list_mode_options knows the modes of torch.compile."""
    assert compat.list_mode_options("reduce-overhead")["triton.cudagraphs"] is True
    assert compat.list_mode_options("max-autotune")["max_autotune"] is True


@pytest.fixture
def symbolic() -> tuple[compat.FakeTensorMode, torch.Tensor]:
    """A fake tensor of sizes 7 and 11, both symbols."""
    mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv())
    x = torch.zeros(7, 11)
    torch._dynamo.mark_dynamic(x, (0, 1))
    policy = torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(
        dynamic_sizes=[torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC] * 2
    )
    return mode, mode.from_tensor(x, symbolic_context=policy)


def test_hint_is_the_traced_value(symbolic) -> None:
    """Of a number, a SymInt's expression, and arithmetic on symbols."""
    mode, x = symbolic
    hint = compat.hint_for(mode)
    T, K = (n.node.expr for n in x.shape)
    assert not T.is_number
    assert [hint(n) for n in (5, T, K, T * K + 1, T - T + 3)] == [5, 7, 11, 78, 3]
    assert all(type(hint(n)) is int for n in (5, T, T * K))


def test_hint_adds_no_guard(symbolic) -> None:
    """So the decision never makes a compiled model recompile."""
    mode, x = symbolic
    before = list(mode.shape_env.guards)
    compat.hint_for(mode)(x.shape[0].node.expr)
    assert mode.shape_env.guards == before


def test_hint_of_an_unknown_size_is_a_number(symbolic) -> None:
    """An unbacked size has no value at all; asking for it must not raise."""
    mode, _ = symbolic
    unknown = mode.shape_env.create_unbacked_symint()
    assert compat.hint_for(mode)(unknown.node.expr) > 0


def node_with(source: object) -> torch.fx.Node:
    node = torch.fx.Graph().placeholder("x")
    if source is not None:
        node._dynamo_source = types.SimpleNamespace(name=source)
    return node


@pytest.mark.parametrize("source", ["L['x']", lambda: "L['x']"], ids=["property", "method"])
def test_source_name_in_every_version(source) -> None:
    """A property in some versions of torch, a method in others."""
    assert compat.source_name(node_with(source)) == "L['x']"


def test_no_source_has_no_name() -> None:
    """DDP hands over graphs whose inputs come from nowhere."""
    assert compat.source_name(node_with(None)) is None


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_source_names_are_what_dynamo_gives() -> None:
    """A module's parameter by its path, in this version of torch; `name_in_model` makes the user's name of it."""
    seen: list[str | None] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list) -> object:
        seen.extend(compat.source_name(n) for n in gm.graph.nodes if n.op == "placeholder")
        return gm

    torch.compile(Outer(), backend=backend)(torch.zeros(2, 3))
    assert [name_in_model(s) for s in seen if s] == ["inner.weight", "x"]


def entries(f: object) -> int:
    return len(compat.cache_entries(f.__code__))


def test_forgetting_leaves_no_code_behind() -> None:
    """Compiled inside the block, gone after it; and as often as one likes."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    for _ in range(3):
        with compat.forgetting():
            torch.compile(f, backend="eager")(torch.zeros(2))
            assert entries(f) == 1
        assert entries(f) == 0


def test_forgetting_keeps_what_was_there() -> None:
    """Code compiled before the block still answers after it, also where the block compiled the same function."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    counter = CompileCounter()
    compiled = torch.compile(f, backend=counter)
    compiled(torch.zeros(2))
    with compat.forgetting():
        torch.compile(f, backend=lambda gm, inputs: gm)(torch.zeros(2))
    compiled(torch.zeros(2))
    assert counter.frame_count == 1
    assert entries(f) == 1


def test_forgetting_keeps_no_sizes() -> None:
    """A size met inside the block is not one that changed after it."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    sizes = []
    with compat.forgetting():
        torch.compile(f, backend="eager")(torch.zeros(2))
    torch.compile(f, backend=lambda gm, inputs: sizes.extend(map(type, inputs[0].shape)) or gm)(torch.zeros(3))
    assert sizes == [int]


def test_without_compiled_autograd_is_without() -> None:
    """Backward is compiled around the block, and not inside it."""
    counter = CompileCounter()
    x = torch.ones(2, requires_grad=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter)):
        with compat.without_compiled_autograd():
            x.sum().backward()
        assert counter.frame_count == 0
        x.sum().backward()
    assert counter.frame_count == 1
