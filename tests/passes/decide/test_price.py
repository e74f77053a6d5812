"""The price against closed forms, and what must hold of every decision."""

from __future__ import annotations

import doctest
import importlib
import pathlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_fx import passes
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import MACHINES, Machine, Speed, cpu, table_entry
from peft_fx.passes.decide.price import Decision, Price, decide, flop_crossover
from peft_fx.passes.decide.shapes import Shape

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
CPU = MACHINES["cpu"]
FOLDER = pathlib.Path(next(iter(passes.__path__)))
MODULES = sorted(".".join(p.relative_to(FOLDER).with_suffix("").parts) for p in FOLDER.rglob("[!_]*.py"))


def lora(T: int, K: int, N: int, r: int, base: torch.dtype = FP32, adapter: torch.dtype = FP32) -> Shape:
    """The forward of one adapted layer."""
    return Shape(T, K, N, (((K, r), (r, N)),), base, adapter)


def both(s: Shape) -> tuple[Shape, Shape]:
    """Its forward and its input gradient, `dy·(Wᵀ + s·Bᵀ·Aᵀ)`."""
    terms = tuple(tuple((n, k) for k, n in reversed(term)) for term in s.terms)
    return s, replace(s, K=s.N, N=s.K, terms=terms)


def training(s: Shape, machine: Machine = CPU, form: str = "auto") -> Decision:
    return decide(machine, *both(s), training=True, form=form)


def inference(s: Shape, machine: Machine = CPU, form: str = "auto") -> Decision:
    return decide(machine, s, None, training=False, form=form)


def forms(d: Decision) -> tuple[str, str]:
    return d.forward, d.input_grad


sizes = st.integers(1, 9000)
dtypes = st.sampled_from([FP32, BF16, FP64])
machines = st.sampled_from(list(MACHINES.values()))
layers = st.builds(lora, sizes, sizes, sizes, st.integers(1, 256), dtypes, dtypes)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("K", "N"), [(512, 512), (4096, 4096), (4096, 11008), (1, 7)])
@pytest.mark.parametrize("r", [1, 12, 64])
def test_flops_meet_at_the_crossover(K: int, N: int, r: int) -> None:
    """There T tokens cost as many FLOPs by the adapter's own products as by building W'; the rank cancels.

    In inference `T·(K+N)·r` meets `K·N·r`. In training both directions save one product each, `T·(K+N)·r` in all, and
    W' is built twice.
    """
    T = flop_crossover(K, N, training=False)
    assert T * (K + N) * r == pytest.approx(K * N * r, rel=1e-12)
    T = flop_crossover(K, N, training=True)
    assert T * (K + N) * r == pytest.approx(2 * K * N * r, rel=1e-12)


@pytest.mark.parametrize(("K", "N"), [(512, 512), (2048, 512), (512, 8192)])
@pytest.mark.parametrize("r", [1, 12, 64])
@pytest.mark.parametrize("inner", [0.0, 8.0])
def test_seconds_meet_at_the_crossover(K: int, N: int, r: int, inner: float) -> None:
    """Where only arithmetic takes time: W' in training costs the same at `flop_crossover`, whatever r and `inner` are,
    times the ratio of rates where W' is built in a slower dtype than the adapter's."""
    speeds = tuple((d, Speed(p, inner=inner)) for d, p in ((BF16, 400.0), (FP32, 100.0), (FP64, 40.0)))
    m = Machine("m", speeds, bandwidth=float("inf"), launch=0.0)
    for base, adapter, slower in ((BF16, FP32, 1), (BF16, BF16, 400 / 100), (FP32, FP32, 100 / 40)):
        T = slower * flop_crossover(K, N, training=True)
        for off, wanted in ((0.99, "activation"), (1.01, "weight")):
            seconds = training(lora(round(T * off), K, N, r, base, adapter), m).seconds
            assert min(price.FORMS, key=lambda form: seconds[form, form]) == wanted


@pytest.mark.parametrize(
    ("base", "mixed", "fused", "crossing"),
    [(BF16, True, False, 1.2), (FP32, False, False, 2.0), (FP32, True, False, 2.4), (FP32, True, True, 0.8)],
)
def test_passes_meet_where_as_many_bytes_move(base: torch.dtype, mixed: bool, fused: bool, crossing: float) -> None:
    """Where only memory takes time, for K = N: T·(r·e + K·(2e + b)) + r·K·e bytes of the activation form, of which an
    input gradient in one dtype spares e·T·K where products can add, meet K·(2r·m + K·(2m + 2b)) of the weight form, or
    2b·K² of one kernel; for a small r at `crossing`·K."""
    K, r, adapter = 4096, 16, FP32
    e, b, wide = adapter.itemsize, base.itemsize, price.merge_dtype(base).itemsize
    merge = 2 * b * K * K if fused else K * (2 * r * wide + K * (2 * wide + 2 * b))
    spared = e if mixed and base == adapter else 0
    T = 2 * (merge - r * K * e) / (2 * r * e + K * (2 * (2 * e + b) - spared))
    assert pytest.approx(crossing, rel=0.02) == T / K
    m = machine(float("inf"), bandwidth=1.0, mixed=mixed)
    for off, wanted in ((0.99, "activation"), (1.01, "weight")):
        layer = replace(lora(round(T * off), K, K, r, base, adapter), fused=fused)
        seconds = decide(m, layer, layer, training=True).seconds
        assert min(price.FORMS, key=lambda form: seconds[form, form]) == wanted


def test_reading_in_place_is_priced() -> None:
    """Both products of an activation [T,K] with r columns: fp32 and one copy of it; or bf16 pairs, each twice as wide,
    twice where results are bf16 too; and copies again where a side is less than `IN_PLACE` times the rank, or where
    bf16 is not multiplied quicker."""
    s = lora(1000, 800, 600, 10, BF16, FP32)
    products = 2 * 2 * 1000 * 800 * 10
    m = Machine("m", ((BF16, Speed(4.0)), (FP32, Speed(1.0))), bandwidth=float("inf"), launch=0.0)
    assert price.reads(m, s, in_place=False).flops == products
    assert price.reads(m, s, in_place=True).flops == 2 * products
    assert price.reads(replace(m, mixed=False), s, in_place=True).flops == 4 * products
    copies = replace(m, bandwidth=1.0)
    assert price.reads(copies, s, in_place=False).bytes >= 1000 * 800 * (2 + 4)
    short = replace(s, T=10 * price.IN_PLACE - 1)
    assert price.reads(m, short, in_place=True) == price.reads(m, short, in_place=False)
    assert price.reads(machine(1.0), s, in_place=True) == price.reads(machine(1.0), s, in_place=False)


def test_a_copy_is_new_memory() -> None:
    """What is written takes a CPU as long as a product's results do; a GPU no longer than any pass."""
    m = Machine("m", ((FP32, Speed(1.0)),), bandwidth=8.0, launch=1.0, stores=2.0)
    assert m.copy(16, 32) == 16 / 8 + 32 / 2 + 1
    assert replace(m, stores=0.0).copy(16, 32) == m.one_pass(48)
    s = lora(1000, 800, 600, 10, BF16, FP32)
    products = sum(price.product(m, *sizes, FP32).seconds for sizes in ((1000, 800, 10), (800, 1000, 10)))
    assert price.reads(m, s, in_place=False).seconds == products + m.copy(2 * 1000 * 800, 4 * 1000 * 800)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("r", [2, 16, 256])
@pytest.mark.parametrize("side", [64, 512, 4096])
def test_where_half_precision_is_slow_copies_are_read(name: str, side: int, r: int) -> None:
    """An activation is read in place on all machines of the table but the one that multiplies bf16 a fortieth as
    quickly as fp32, whatever a kernel takes to start; and but where a CPU's second product, which gives what the first
    one rounded, takes longer than a copy."""
    long = price.IN_PLACE * r <= side
    copied = name == "avx2" or (name == "cpu" and r == 256)
    assert price.reads_in_place(MACHINES[name], side, side, r, BF16, FP32) is (long and not copied)
    assert price.rounds_twice(MACHINES[name], BF16) is (name != "avx2")


@pytest.mark.parametrize(("ratio", "in_place"), [(0.025, False), (0.5, False), (1.0, False), (4.0, True), (16.0, True)])
def test_units_of_half_precision_decide(ratio: float, in_place: bool) -> None:
    """On a CPU, by the rate of bf16 products beside that of fp32: emulated, as wide as fp32's own, or in tiles."""
    m = cpu("m", (ratio * 0.125, ratio * 0.125, 0.125, 0.0625), bandwidth=32, stores=8)
    assert price.reads_in_place(m, 4096, 1024, 64, BF16, FP32) is in_place


def test_what_reading_in_place_costs_decides_too() -> None:
    """Where it costs much, the weight form comes later; where nothing is read in place, at once."""
    slow = ((BF16, Speed(4e12, start=1.0)), (FP32, Speed(1e12)), (FP64, Speed(1e12)))
    m = Machine("m", slow, bandwidth=1e12, launch=0.0)

    def cheaper(base: torch.dtype, in_place: bool) -> str:
        layer = both(lora(8192, 512, 512, 12, base, FP32))
        seconds = decide(m, *layer, training=True, in_place=in_place).seconds
        return min(price.FORMS, key=lambda form: seconds[form, form])

    assert cheaper(BF16, in_place=False) == "weight"
    assert cheaper(BF16, in_place=True) == "activation"
    assert cheaper(FP32, in_place=True) == "weight"


def test_flops_are_those_of_the_formulas() -> None:
    """2·m·k·n for each product of a layer with T=10, K=20, N=30, r=4, and none for adding."""
    s = lora(10, 20, 30, 4)
    assert price.base(CPU, s).flops == 2 * 10 * 20 * 30
    assert price.merge(CPU, s).flops == 2 * 20 * 4 * 30
    assert price.activation(CPU, s, skip_first=False).flops == 2 * 10 * 4 * (20 + 30)
    assert price.activation(CPU, s, skip_first=True).flops == 2 * 10 * 4 * 30
    assert price.first_products(CPU, s).flops == 2 * 10 * 20 * 4


def test_bytes_are_those_of_the_formulas() -> None:
    """Each operand and result once: W' in bf16 of fp32 factors reads and writes W, and adds a delta of fp32."""
    s = lora(10, 20, 30, 4, base=BF16)
    assert price.base(CPU, s).bytes == 2 * (10 * 20 + 20 * 30 + 10 * 30)
    assert price.merge(CPU, s).bytes == 4 * (20 * 4 + 4 * 30 + 20 * 30) + 20 * 30 * (2 + 2 + 4)
    products = 4 * (10 * 20 + 20 * 4 + 10 * 4) + 4 * (10 * 4 + 4 * 30 + 10 * 30)
    assert price.activation(CPU, s, skip_first=False).bytes == products + 10 * 30 * (4 + 2)


def machine(peak: float, **more: float) -> Machine:
    """One that multiplies in every dtype at one rate, and does nothing else in any time."""
    free = {"bandwidth": float("inf"), "launch": 0.0}
    return Machine("m", tuple((d, Speed(peak)) for d in (BF16, FP32, FP64)), **(free | more))


def test_a_product_is_a_roofline() -> None:
    """The slower of arithmetic and memory, what it takes to start, and the launch."""
    m = Machine("m", ((FP32, Speed(100.0)), (BF16, Speed(400.0, start=0.25))), bandwidth=10.0, launch=1.0)
    assert m.product(10, 10, 10, FP32) == max(2000 / 100, 1200 / 10) + 1
    assert m.product(100, 100, 100, FP32) == max(2e6 / 100, 120_000 / 10) + 1
    assert m.product(100, 100, 100, BF16) == max(2e6 / 400, 60_000 / 10) + 0.25 + 1
    assert replace(m, stores=20.0).product(100, 100, 100, BF16) == max(2e6 / 400, 60_000 / 20) + 0.25 + 1
    assert m.product(100, 100, 100, FP64) == max(2e6 / 100, 240_000 / 10) + 1, "as slow as the slowest dtype listed"
    assert m.one_pass(1000) == 1000 / 10 + 1


def test_a_narrow_product_is_as_slow_as_a_longer_one() -> None:
    """Its smallest side counts as `inner` or `outer` elements more, whichever side it is; a large side counts alike."""
    slow = machine(100.0).product
    fast = Machine("m", ((FP32, Speed(100.0, inner=8, outer=24)),), float("inf"), 0.0).product
    assert fast(512, 16, 256, FP32) == pytest.approx(slow(512, 24, 256, FP32), rel=1e-12)
    assert fast(512, 256, 16, FP32) == pytest.approx(slow(512, 256, 40, FP32), rel=1e-12)
    assert fast(16, 256, 512, FP32) == pytest.approx(slow(40, 256, 512, FP32), rel=1e-12)
    assert fast(512, 256, 1, FP32) == slow(512, 256, 1, FP32), "a vector is multiplied at the speed of memory"
    assert fast(4096, 4096, 4096, FP32) == pytest.approx(slow(4096, 4096, 4096, FP32), rel=0.01)


def test_prices_add_up() -> None:
    """Seconds, FLOPs and bytes alike."""
    assert Price(1.0, 2, 3) + Price(10.0, 20, 30) == Price(11.0, 22, 33)


def test_a_batch_of_weights_costs_as_many() -> None:
    """Experts: every number times their number, but for the launches."""
    one, three = lora(10, 20, 30, 4), replace(lora(10, 20, 30, 4), batch=3)
    free = replace(CPU, launch=0.0)
    for part in (price.base, price.merge, price.first_products):
        assert part(free, three).flops == 3 * part(free, one).flops
        assert part(free, three).bytes == 3 * part(free, one).bytes
        assert part(free, three).seconds == pytest.approx(3 * part(free, one).seconds, rel=1e-12)


def test_a_merge_is_wider_than_the_weight() -> None:
    """W' is rounded once."""
    assert {d: price.merge_dtype(d) for d in (BF16, torch.float16, FP32, FP64)} == {
        BF16: FP32,
        torch.float16: FP32,
        FP32: FP64,
        FP64: FP64,
    }


# ----------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(("base", "adapter"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("name", MACHINES)
def test_few_tokens_keep_the_activation_form(name: str, base: torch.dtype, adapter: torch.dtype) -> None:
    """T=8 in training at 512×512, r=12: a W' for eight tokens is never worth it."""
    assert forms(training(lora(8, 512, 512, 12, base, adapter), MACHINES[name])) == ("activation", "activation")


@pytest.mark.parametrize(("base", "adapter"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("name", MACHINES)
def test_many_tokens_take_the_weight_form(name: str, base: torch.dtype, adapter: torch.dtype) -> None:
    """T=8192 is 16 times the FLOP crossover of training, 512."""
    assert flop_crossover(512, 512, training=True) == 512
    assert forms(training(lora(8192, 512, 512, 12, base, adapter), MACHINES[name])) == ("weight", "weight")


@settings(deadline=None)
@given(machine=machines, layer=layers, tokens=st.lists(sizes, min_size=2, max_size=12))
def test_inference_has_one_crossover(machine: Machine, layer: Shape, tokens: list[int]) -> None:
    """With more tokens the weight form is never left again."""
    chosen = [inference(replace(layer, T=T), machine).forward for T in sorted(tokens)]
    assert chosen == sorted(chosen)  # "activation" < "weight"


@settings(deadline=None)
@given(machine=machines, layer=layers, tokens=st.lists(sizes, min_size=2, max_size=12))
def test_training_has_one_crossover(machine: Machine, layer: Shape, tokens: list[int]) -> None:
    """The same of the number of directions in weight form."""
    chosen = [forms(training(replace(layer, T=T), machine)).count("weight") for T in sorted(tokens)]
    assert chosen == sorted(chosen)


@settings(deadline=None)
@given(machine=machines, layer=layers, factor=st.sampled_from([2.0**-20, 0.25, 2.0, 1024.0]))
def test_a_faster_machine_of_the_same_kind_decides_alike(machine: Machine, layer: Shape, factor: float) -> None:
    """All rates and launches times a power of two: every price is divided by it, exactly, and no form changes."""
    speeds = tuple((d, replace(v, peak=v.peak * factor, start=v.start / factor)) for d, v in machine.speeds)
    faster = {k: getattr(machine, k) * factor for k in ("bandwidth", "stores")}
    other = replace(machine, speeds=speeds, **faster, launch=machine.launch / factor)
    for decided in (training, inference):
        slow, fast = decided(layer, machine), decided(layer, other)
        assert forms(slow) == forms(fast)
        assert {k: v / factor for k, v in slow.seconds.items()} == fast.seconds


@settings(deadline=None)
@given(machine=machines, layer=layers)
def test_auto_is_never_dearer_than_the_activation_form(machine: Machine, layer: Shape) -> None:
    """What is chosen costs at most as much as the graph as it was written."""
    for d in (training(layer, machine), inference(layer, machine)):
        written = next(v for k, v in d.seconds.items() if set(k) <= {"activation", "none"})
        assert d.seconds[forms(d)] <= written


@settings(deadline=None)
@given(machine=machines, layer=layers)
def test_auto_is_the_cheapest_but_for_a_mix(machine: Machine, layer: Shape) -> None:
    """A mix of forms is taken where it costs less than `MIX` of either pure choice; else the cheaper of these."""
    d = training(layer, machine)
    pure = min(v for k, v in d.seconds.items() if len(set(k)) == 1)
    mixed = min(v for k, v in d.seconds.items() if len(set(k)) == 2)
    assert d.seconds[forms(d)] == (mixed if mixed < price.MIX * pure else pure)


@settings(deadline=None)
@given(machine=machines, layer=layers, form=st.sampled_from(price.FORMS))
def test_a_form_asked_for_is_taken(machine: Machine, layer: Shape, form: str) -> None:
    """Whatever it costs, in both directions; and the reason says that it was asked for."""
    assert forms(training(layer, machine, form)) == (form, form)
    assert forms(inference(layer, machine, form)) == (form, "none")
    assert training(layer, machine, form).reason.startswith("asked for")
    assert not training(layer, machine).reason.startswith("asked for")


@settings(deadline=None)
@given(machine=machines, layer=layers)
def test_an_input_gradient_alone_is_decided_too(machine: Machine, layer: Shape) -> None:
    """A site whose forward was refused."""
    d = decide(machine, None, both(layer)[1], training=True)
    assert d.forward == "none"
    assert d.input_grad == min(price.FORMS, key=lambda f: (d.seconds["none", f], f == "weight"))


@settings(deadline=None)
@given(layer=layers)
def test_a_tie_changes_nothing(layer: Shape) -> None:
    """Where both forms cost the same, the graph stays as it was written."""
    assert forms(training(layer, machine(float("inf")))) == ("activation", "activation")


def test_the_reason_names_both_prices_and_the_machine() -> None:
    """In microseconds, as the table prints them."""
    d = inference(lora(8192, 512, 512, 12))
    weight, activation = (1e6 * d.seconds[f, "none"] for f in price.FORMS)
    assert d.reason == f"cheaper: weight {weight:.0f} µs vs activation {activation:.0f} µs on cpu"


def test_a_machine_is_found_by_its_driver(monkeypatch) -> None:
    """The table's entry is part of the name that CUDA gives; an unknown card is an average one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "Tesla T4": "t4",
        "NVIDIA Something New": "cuda",
    }
    for driver, entry in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, driver=driver: driver)
        assert table_entry(torch.device("cuda")).name == entry
    assert table_entry(torch.device("cpu")) is CPU


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    """The examples in the passes' docstrings are true."""
    module = importlib.import_module(f"{passes.__name__}.{name}")
    assert doctest.testmod(module).failed == 0


def test_price_and_algebra_have_doctests() -> None:
    """The two modules whose examples are formulas; a search that finds none would pass above."""
    from peft_fx.passes.analyse import algebra

    assert all(doctest.testmod(module).attempted for module in (price, algebra))
