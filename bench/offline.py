"""Inductor's code for a GPU that is not there: generated on any machine with Triton, run by nobody.

A model is traced on fake CPU tensors; before the backend's own passes its joint graph is told to be on a CUDA device,
so that all that follows, the partitioner, Inductor's fusion and its choice of kernels, sees that device. What a driver
would be asked is answered here, for an H100. For a process that does nothing else: PyTorch's own modules are changed.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import partitioners
from torch._inductor import compile_fx, config
from torch._inductor.fx_passes import post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses import fake_tensor

from peft_fx import compat
from peft_fx.retargeting import GPU, Retarget
from peft_fx.tracing import CPU, Ghosts

SIZES = {"major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32, "is_integrated": 0}
SIZES |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
SIZES |= {"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448, "L2_cache_size": 50 << 20}
SIZES |= {"shared_memory_per_multiprocessor": 233472, "total_memory": 80 << 30, "total_constant_memory": 65536}
SIZES |= {"clock_rate": 1980000, "memory_clock_rate": 2619000, "memory_bus_width": 5120}
H100 = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", gcnArchName="", uuid="0", **SIZES)
FOR_TRITON = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

ANSWERS: dict[str, Any] = dict.fromkeys(("_lazy_init", "synchronize", "set_device"))
ANSWERS |= {"device_count": 1, "current_device": 0, "_exchange_device": 0, "_maybe_exchange_device": 0}
ANSWERS |= {"is_initialized": True, "is_bf16_supported": True, "is_current_stream_capturing": False}
ANSWERS |= {"is_available": True, "get_device_capability": (9, 0), "get_device_name": H100.name}
ANSWERS |= {"get_device_properties": H100}
SAME = ("is_available", "current_device", "device_count", "get_device_properties", "synchronize")
OF_INTERFACE = {name: ANSWERS[name] for name in SAME} | {"raise_if_triton_unavailable": None}
OF_INTERFACE |= {"get_compute_capability": 90, "get_raw_stream": 0, "is_triton_capable": True}
SETTINGS = {"compile_threads": 1, "fx_graph_cache": False}
SETTINGS |= {"joint_graph_constant_folding": False}  # it computes constants on the device


def _answering(answer: Any) -> Any:
    return staticmethod(lambda *args, **kwargs: answer)


def pretend() -> None:
    """From now on PyTorch, Inductor and Triton find an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name, answer in OF_INTERFACE.items():
        setattr(CudaInterface, name, _answering(answer))
    CudaInterface.Worker.get_device_properties = _answering(H100)
    CudaInterface.Worker.current_device = _answering(0)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8)  # type: ignore[assignment]
        module.set_rng_state = lambda *args: None  # type: ignore[assignment]
        module.get_rng_state_all = lambda *args: []  # type: ignore[assignment]
    partitioners.functionalize_rng_ops = _nothing_drawn_again  # type: ignore[assignment]
    torch.accelerator.is_available = lambda: False  # Dynamo would ask for its current stream
    torch._C._cuda_getCurrentRawStream = lambda *args: 0  # type: ignore[attr-defined]
    fake_tensor.init_gpu_context = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.Tensor.__invert__ = torch.Tensor.bitwise_not  # type: ignore[assignment]  # `~` itself sets the device
    post_grad.reinplace_inplaceable_ops = lambda *args, **kwargs: None  # runs ops on the device; costs a copy at most
    told = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_active_torch_device": GPU}
    told |= {"get_device_interface": torch.cuda, "get_current_stream": 0, "is_active": True}
    utils = types.SimpleNamespace(get_device_properties=lambda device: FOR_TRITON)
    driver.set_active(type("Driver", (), {name: _answering(a) for name, a in told.items()} | {"utils": utils})())
    torch.ops.prims.inductor_lookup_seed.default.prim_meta_impl = _seed
    for name, setting in SETTINGS.items():
        setattr(config, name, setting)
    compat.functorch_config.enable_autograd_cache = False


def _nothing_drawn_again(joint: Any, forward: Any, backward: Any, static: int) -> tuple[Any, Any]:
    """Attention without dropout, made again behind a checkpoint, draws nothing; its state would be a device's."""
    return forward, backward


def _seed(seeds: Any, index: int) -> Any:
    """One of several, as fake tensors have it: without reading any, which a device would be asked to do."""
    return torch.empty((), dtype=seeds.dtype, device=seeds.device)


class Moved(compat.CustomGraphPass):  # type: ignore[misc]
    """Puts a joint graph on the device, with the attention that it has; for good."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        Retarget(CPU, GPU).exchange(graph, compat.V.fake_mode)
        _move(graph)

    def uuid(self) -> Any:
        return None


def _move(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        _moved(node.meta.get("val"))
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}


def _moved(value: Any) -> None:
    for tensor in compat.pytree.tree_leaves(value):
        if isinstance(tensor, fake_tensor.FakeTensor):
            tensor.fake_device = GPU


Read = Callable[[GraphLowering], None]


def step(model: Any, batch: dict[str, Any], backend: str, options: dict[str, Any], read: Read) -> None:
    """Compiles a training step of a model on fake or meta tensors by a backend; `read` gets what Inductor made of
    forward and of backward, after its code is there and before it would be loaded."""
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True, shape_env=compat.ShapeEnv())
    ghost = Ghosts(mode, "bench").of(model)
    torch._dynamo.reset()
    options = {"joint_custom_pre_pass": Moved(), **options}
    with mode, _generating(read):
        given = {k: torch.zeros_like(t, device="cpu") for k, t in batch.items()}
        compiled = torch.compile(ghost, backend=backend, dynamic=False, options=options)
        compiled(**given).loss.backward()


@contextlib.contextmanager
def _generating(read: Read) -> Iterator[None]:
    """Each half is moved before it is lowered, and what would compile and load it gives empty CPU tensors."""
    inner = compile_fx._InProcessFxCompile
    lower = inner.codegen_and_compile

    def moved(self: Any, gm: Any, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _move(gm.graph)
        _moved(list(example_inputs))
        return lower(self, gm, example_inputs, *args, **kwargs)

    def unloaded(self: GraphLowering) -> Any:
        self.text = getattr(text := self.codegen()[0], "value", text)
        read(self)
        results = [_layout(output) for output in self.graph_outputs]

        def call(args: list[Any]) -> list[Any]:
            args.clear()
            return [r and torch.empty_strided(r[0], r[1], dtype=r[2]) for r in results]

        return types.SimpleNamespace(__file__="/dev/null", key="offline", call=call)

    with patch.object(inner, "codegen_and_compile", moved), patch.object(GraphLowering, "compile_to_module", unloaded):
        yield


def _layout(output: Any) -> Any:
    try:
        return tuple(map(int, output.get_size())), tuple(map(int, output.get_stride())), output.get_dtype()
    except (AttributeError, NotImplementedError, TypeError):  # no tensor: a number or nothing
        return None


def pointwise_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """A stand-in without a library's kernel."""
    n = query.shape[1] // value.shape[1]
    mixed = value.repeat_interleave(n, 1) * torch.sigmoid(query) * key.repeat_interleave(n, 1)
    return mixed.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("pointwise", pointwise_attention)
