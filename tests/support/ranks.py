"""What each of two processes runs for tests/system/test_distributed.py, under torchrun: a small adapted model, shared
out in every way, trained; each result is one line of JSON."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import peft_fx
from tests.support.oracle import WEIGHT
from tests.support.peft_models import adapt

WIDTH, INNER, R, LAYERS, BATCH, STEPS = 32, 48, 4, 3, 128, 3
Result = tuple[list[float], nn.Module, nn.Module]  # losses, the model, what explain() is asked about


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return adapt(nn.Sequential(*(Block() for _ in range(LAYERS))), dtype=torch.float64, r=R)


def within(budget: int) -> dict:
    """On the table's CPU, so that the least is the same wherever this runs."""
    return WEIGHT | {"peft_fx.machine": "cpu", "peft_fx.memory_budget": budget, "peft_fx.memory_budget_of": "step"}


def blocks(m: nn.Module) -> list[Block]:
    return [b for b in m.modules() if isinstance(b, Block)]


def train(f: Callable, m: nn.Module, rows: slice = slice(None)) -> list[float]:
    """The losses of some steps of SGD on those rows of each batch."""
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for x in torch.randn(STEPS, BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        loss = f(x[rows]).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def learnt(m: nn.Module) -> dict[str, Tensor]:
    """What training has changed in each adapter."""
    start = dict(model().named_parameters())
    ends = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in m.named_parameters() if p.requires_grad}
    return {n: p.detach() - start[n].detach() for n, p in ends.items()}


def mine() -> slice:
    half = BATCH // 2
    return slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)


def data_parallel(options: dict = WEIGHT, **settings: float) -> Result:
    m = DistributedDataParallel(model(), **settings)
    return train(torch.compile(m, backend="peft_fx", options=options), m, mine()), m.module, m


def data_parallel_in_a_budget() -> Result:
    return data_parallel(within(180_000))


def in_buckets(options: dict = WEIGHT) -> Result:
    """DDP's buckets cut the graph, and some of the adapters in two."""
    whole, dist._DEFAULT_FIRST_BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, 2_500
    try:
        return data_parallel(options, bucket_cap_mb=0.0035)
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = whole


def in_buckets_in_a_budget() -> Result:
    """Which the graphs of the buckets share."""
    return in_buckets(within(390_000))


def accelerated() -> Result:
    """accelerate knows no backend by our name; it takes a model that was compiled in place."""
    m = model()
    m.compile(backend="peft_fx", options=WEIGHT)
    return train(Accelerator(cpu=True).prepare(m), m, mine()), m, m


def sharded(options: dict = WEIGHT) -> Result:
    """FSDP2, block by block. Of what forward leaves for backward, nothing is as large as a weight and still there."""
    m = model()
    for block in blocks(m):
        block.compile(backend="peft_fx", options=options)
        fully_shard(block, reshard_after_forward=True)
    fully_shard(m)
    kept: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = m(x)
        weights = [t for t in kept if t.numel() == WIDTH * INNER]
        assert len(weights) >= 2 * LAYERS - 1, "every input gradient needs its weight"
        assert not any(t.untyped_storage().size() for t in weights), "a whole weight outlives forward"
        return y

    with pytest.raises(TypeError, match="before fully_shard"):
        peft_fx.explain(m, torch.zeros(1, WIDTH))
    return train(forward, m, mine()), m, m


def sharded_in_a_budget() -> Result:
    """Which the blocks of a rank share."""
    return sharded(within(180_000))


def tensor_parallel() -> Result:
    """The columns of `up` and the rows of `down`; every rank has the whole batch."""
    m = model()
    plan = {"up.base_layer": ColwiseParallel(), "up.lora_B.default": ColwiseParallel()}
    plan |= {"down.base_layer": RowwiseParallel(), "down.lora_A.default": RowwiseParallel()}
    for block in blocks(m):
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
    return train(torch.compile(m, backend="peft_fx", options=WEIGHT), m), m, m


ALL = (data_parallel, in_buckets, accelerated, sharded, tensor_parallel)
IN_A_BUDGET = (data_parallel_in_a_budget, in_buckets_in_a_budget, sharded_in_a_budget)
WAYS: dict[str, Callable[[], Result]] = {f.__name__: f for f in (*ALL, *IN_A_BUDGET)}


def result(way: str) -> dict:
    """How far losses, and what was learnt, are from one process that has all rows; and the report."""
    torch._dynamo.reset()
    losses, m, told = WAYS[way]()
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    alone = model()
    want = {"losses": torch.tensor(train(alone, alone), dtype=torch.float64), **learnt(alone)}
    got = {"losses": mean / dist.get_world_size(), **learnt(m)}
    error = max(((got[n] - t).norm() / t.norm()).item() for n, t in want.items())
    return {"way": way, "rank": dist.get_rank(), "error": error, "report": peft_fx.explain(told).to_dict()}


if __name__ == "__main__":
    warnings.filterwarnings("error", message="peft_fx", category=RuntimeWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in sys.argv[1:] or WAYS:
        print(json.dumps(result(way)) + "\n", end="", flush=True)  # in one piece: two ranks write to one pipe
    dist.destroy_process_group()
