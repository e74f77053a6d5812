"""How fast a device is, in a few numbers: what the price is reckoned from.

    seconds of a product [m,k]·[k,n]   max(2·m·k·n·(1 + lost) / peak, bytes / stores) + start + launch
        where k is the smallest side   lost = inner / k
        where it is m or n             lost = outer / min(m, n), of a vector none: that is a pass over the matrix
    seconds of a pass over memory      bytes / bandwidth + launch
    seconds of a copy                  bytes read / bandwidth + bytes written / stores + launch

So a low-rank product costs more than its share of the peak, as if its rank were `inner` (or `outer`) longer. Of the
products that decide between the forms, `T·(r + inner)·N` and `K·(r + inner)·N`, the rank cancels all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Speed:
    """Of products in one dtype: FLOP/s of large ones, seconds to start one beyond any kernel's launch (operands may be
    packed first), and the elements that a narrow inner or outer side seems longer than it is."""

    peak: float
    start: float = 0.0
    inner: float = 0.0
    outer: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Speeds by dtype, bytes/s of a pass over memory, seconds to launch a kernel. Besides: bytes/s at which a product
    reads and stores (0: as any pass), FLOP/s of float32 products in TF32 (0: none), and whether products of half
    precision can give float32.

    >>> m = Machine("m", ((torch.float32, Speed(100.0, inner=8.0)),), bandwidth=100.0, launch=1.0)
    >>> m.product(10, 4, 20, torch.float32)  # 1600 FLOPs, as long as 4800
    49.0
    """

    name: str
    speeds: tuple[tuple[torch.dtype, Speed], ...]
    bandwidth: float
    launch: float
    stores: float = 0.0
    tf32: float = 0.0
    mixed: bool = True

    @property
    def is_cpu(self) -> bool:
        return not self.mixed  # every GPU has such products, and no CPU

    def speed(self, dtype: torch.dtype) -> Speed:
        """A dtype that is not listed is as slow as the slowest."""
        known: dict[torch.dtype, Speed] = dict(self.speeds)
        return known.get(dtype) or min(known.values(), key=lambda s: s.peak)

    def has_units_of(self, dtype: torch.dtype) -> bool:
        """Whether it multiplies a dtype of half precision sooner than float32."""
        return self.speed(dtype).peak > self.speed(torch.float32).peak

    def product(self, m: int, k: int, n: int, dtype: torch.dtype, batch: int = 1) -> float:
        """Seconds of a product [m,k]·[k,n], `batch` times in one kernel."""
        speed = self.speed(dtype)
        outer = max(1, min(m, n))
        lost = speed.inner / k if 0 < k <= outer else speed.outer / outer if outer > 1 else 0.0
        bytes_: int = batch * (m * k + k * n + m * n) * dtype.itemsize
        work = max(2 * batch * m * k * n * (1 + lost) / speed.peak, bytes_ / (self.stores or self.bandwidth))
        return work + speed.start + self.launch

    def one_pass(self, bytes_: int) -> float:
        """Seconds of reading and writing so many bytes in one kernel."""
        return bytes_ / self.bandwidth + self.launch

    def copy(self, read: int, written: int) -> float:
        """Seconds of reading so many bytes and writing others to new memory. A CPU gets that page by page: two cores of
        an EPYC write a copy at 6 GB/s, and at 100 where it was there before; in a step it is about a product's rate."""
        return read / self.bandwidth + written / (self.stores or self.bandwidth) + self.launch

    def at_once(self) -> Machine:
        """The same device if nothing took any time to start."""
        return replace(self, launch=0.0, speeds=tuple((d, replace(s, start=0.0)) for d, s in self.speeds))

    def with_tf32(self) -> Machine:
        """The same device where float32 products may run in TF32."""
        if not self.tf32:
            return self
        single = replace(self.speed(torch.float32), peak=self.tf32)
        return replace(self, speeds=tuple((d, single if d == torch.float32 else s) for d, s in self.speeds))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `Machine.from_dict` gives back an equal one."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return asdict(self) | {"speeds": {names[dtype]: asdict(speed) for dtype, speed in self.speeds}}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Machine:
        """ValueError for anything but what `to_dict` gives, with numbers that can be divided by."""
        try:
            speeds = tuple((DTYPES[name], Speed(**speed)) for name, speed in stored["speeds"].items())
            machine = cls(**{**stored, "speeds": speeds})
            positive = [machine.bandwidth, *(s.peak for _, s in speeds)]
            others = [machine.launch, machine.stores, machine.tf32]
            others += [n for _, s in speeds for n in (s.start, s.inner, s.outer)]
            right = bool(speeds) and all(0 < n < float("inf") for n in positive)
            right = right and all(0 <= n < float("inf") for n in others)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the constants of a machine: {type(error).__name__}: {error}") from None
        if not right:
            raise ValueError(f"not the constants of a machine: a rate is above 0, and no number below, in {stored}")
        return machine


def _gpu(
    name: str, half: float, single: float, double: float, bandwidth: float, launch: float, tf32: float = 0
) -> Machine:
    """Rates in TFLOP/s and TB/s, launch in microseconds. Tensor cores work on tiles: a side of few elements costs as
    one of 16 more."""
    rates = ((torch.bfloat16, half), (torch.float16, half), (torch.float32, single), (torch.float64, double))
    speeds = tuple((dtype, Speed(rate * 1e12, inner=16, outer=16)) for dtype, rate in rates)
    return Machine(name, speeds, bandwidth * 1e12, launch * 1e-6, tf32=tf32 * 1e12)


def cpu(name: str, rates: tuple[float, float, float, float], bandwidth: float, stores: float) -> Machine:
    """Rates in TFLOP/s, bfloat16's, float16's, float32's and float64's, and in GB/s."""
    bf16, fp16, fp32, fp64 = (rate * 1e12 for rate in rates)
    speeds = (
        (torch.bfloat16, Speed(bf16, start=12e-6, inner=4, outer=10)),
        (torch.float16, Speed(fp16, inner=4, outer=10)),
        (torch.float32, Speed(fp32, inner=4, outer=14)),
        (torch.float64, Speed(fp64, inner=4, outer=14)),
    )
    return Machine(name, speeds, bandwidth * 1e9, launch=2e-6, stores=stores * 1e9, mixed=False)


# GPUs: dense peaks of the makers' data sheets, times 0.7 for what large products reach of them. CPUs: two cores of a
# server, one that multiplies bfloat16 as such and one that does not, measured product by product and rounded. More
# cores move all of their rates alike, and the choice little; what other CPUs are like is found by a probe.
MACHINES: Mapping[str, Machine] = {
    m.name: m
    for m in (
        _gpu("h200", 690, 47, 23, 4.3, 4, tf32=346),
        _gpu("h100", 690, 47, 23, 3.0, 4, tf32=346),
        _gpu("a100", 218, 13.6, 6.8, 1.6, 4, tf32=109),
        _gpu("l40s", 253, 64, 1.0, 0.78, 4, tf32=128),
        _gpu("rtx4090", 115, 57, 0.9, 0.9, 4, tf32=57),
        _gpu("rtx3090", 50, 25, 0.4, 0.84, 4, tf32=25),
        _gpu("t4", 45, 5.6, 0.18, 0.29, 5),
        _gpu("cuda", 100, 15, 0.5, 0.8, 5),
        cpu("cpu", (0.38, 0.005, 0.14, 0.07), 25, 8),
        cpu("avx2", (0.0026, 0.0026, 0.1, 0.05), 25, 5),
    )
}


WIDE = {"AVX512", "SVE256", "SVE"}  # CPUs that mostly multiply bfloat16 as such, as PyTorch names what they can
SAME = 1.25  # tensor cores multiply float64 as quickly as others float32


def table_entry(device: torch.device) -> Machine:
    """The known machine of a device, by the name its driver gives; the closest class for an unknown one."""
    if device.type != "cuda":
        return MACHINES["cpu" if torch.backends.cpu.get_cpu_capability() in WIDE else "avx2"]
    if not torch.cuda.is_available():
        return MACHINES["cuda"]
    name = torch.cuda.get_device_name(device).lower().replace(" ", "").replace("geforce", "")
    return next((m for key, m in MACHINES.items() if key in name), MACHINES["cuda"])


def implausible(machine: Machine) -> str:
    """What of a measurement no device is like, in words, or nothing: then it was disturbed.

    Half precision may be slower than float32 by a hundred, where it is not multiplied as such. But nothing multiplies
    float64 sooner than float32, and between the slowest device and the fastest there are limits.
    """
    fp32, fp64 = (machine.speed(d).peak for d in (torch.float32, torch.float64))
    if fp64 > SAME * fp32:
        return f"float64 ({fp64 / 1e12:.3g} TFLOP/s) multiplied sooner than float32 ({fp32 / 1e12:.3g})"
    stores = machine.stores or machine.bandwidth
    for what, rate, unit, (low, high) in (
        ("products in float32", fp32, "FLOP/s", (1e9, 1e16)),
        ("a pass over memory", machine.bandwidth, "B/s", (5e8, 1e14)),
        ("a product's stores", stores, "B/s", (1e8, 1e14)),
        ("kernels a second", 1 / machine.launch if machine.launch else 1e6, "", (5e3, 1e9)),
    ):
        if not low <= rate <= high:
            return f"{what}: {rate:.3g} {unit}".strip()
    return ""
