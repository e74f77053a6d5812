"""Which machine the price reckons with: names, files, calibrations, and one for all ranks of a job."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_fx
from peft_fx import compat, machines, probing
from peft_fx.__main__ import main
from peft_fx.cli import calibrate
from peft_fx.options import parse
from peft_fx.passes.decide.machine import MACHINES, Machine, Speed, cpu, implausible
from tests.test_backend import key

CPU = torch.device("cpu")
SLOW = replace(MACHINES["cpu"], name="slow", bandwidth=1e9)
positive = st.floats(1e-9, 1e18)
PROBED = machines.probed  # as it is, without the fixture
speeds = st.builds(Speed, positive, positive, st.floats(0, 99), st.floats(0, 99))


@given(speed=speeds, bandwidth=positive, launch=positive, mixed=st.booleans())
def test_constants_survive_json(speed: Speed, bandwidth: float, launch: float, mixed: bool) -> None:
    """To the bit: they are part of a cache's key."""
    machine = Machine("m", ((torch.bfloat16, speed), (torch.float64, speed)), bandwidth, launch, mixed=mixed)
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


@pytest.mark.parametrize("name", MACHINES)
def test_the_table_survives_json(name: str) -> None:
    """Each known machine, by its own name."""
    assert Machine.from_dict(json.loads(json.dumps(MACHINES[name].to_dict()))) == MACHINES[name]
    assert MACHINES[name].name == name


def broken() -> list[Any]:
    """What `to_dict` never gives."""
    good = SLOW.to_dict()
    fp32 = good["speeds"]["float32"]
    return [
        {},
        good | {"bandwidth": 0.0},
        good | {"bandwidth": "fast"},
        good | {"launch": -1.0},
        good | {"speeds": {}},
        good | {"speeds": {"float31": fp32}},
        good | {"speeds": {"float32": fp32 | {"peak": 0.0}}},
        good | {"speeds": {"float32": fp32 | {"inner": -1.0}}},
        good | {"colour": "red"},
    ]


@pytest.mark.parametrize("stored", broken())
def test_what_is_no_machine_is_an_error(stored: dict[str, Any]) -> None:
    """Rather than a price that divides by it."""
    with pytest.raises(ValueError, match="not the constants of a machine"):
        Machine.from_dict(stored)


# ----------------------------------------------------------------------------------------------------- options


def test_a_machine_is_a_name_or_a_file(tmp_path: Path) -> None:
    """Its constants are those of the table or of the file."""
    path = tmp_path / "mine.json"
    machines.store(SLOW, CPU, path)
    for chosen, wanted in (("auto", MACHINES["cpu"]), ("h100", MACHINES["h100"]), (path, SLOW), (str(path), SLOW)):
        assert parse({"peft_fx.machine": chosen}).settings(CPU).machine == wanted


def test_any_other_machine_is_an_error(tmp_path: Path) -> None:
    """At once, with the names that there are, and what is wrong with the file."""
    (tmp_path / "text").write_text("h100")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text(json.dumps({"machine": {}, "device": "", "torch": ""}))
    for chosen in ("h1000", 7, None, tmp_path, *tmp_path.iterdir()):
        with pytest.raises(ValueError, match=r"'auto', 'h200'.*or the path of a calibration"):
            parse({"peft_fx.machine": chosen})


def test_the_key_has_the_constants_not_the_path(tmp_path: Path) -> None:
    """The same constants from two files share compiled code; other constants from one file do not."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path in (a, b):
        machines.store(SLOW, CPU, path)
    before = key(machine=str(a))
    assert before == key(machine=str(b))
    machines.store(replace(SLOW, launch=2 * SLOW.launch), CPU, a)
    assert key(machine=str(a)) != before


# ------------------------------------------------------------------------------------------------- calibration


def test_a_calibration_that_fits_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """In explain's reasons too; and neither on another device, nor with other threads, nor in another PyTorch."""
    assert machines.found(CPU) == MACHINES["cpu"]
    machines.store(SLOW, CPU, machines.path_of(CPU))
    assert machines.found(CPU) == SLOW
    assert peft_fx.explain(Adapted(), torch.randn(4, 8)).sites[0].reason.endswith("on slow")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.1")
        assert machines.found(CPU) == MACHINES["cpu"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert machines.found(CPU) == MACHINES["cpu"]
    finally:
        torch.set_num_threads(threads)
    content = json.loads(machines.path_of(CPU).read_text())
    machines.path_of(CPU).write_text(json.dumps(content | {"device": "another"}))
    assert machines.found(CPU) == MACHINES["cpu"]
    machines.path_of(CPU).write_text("half a fi")
    assert machines.found(CPU) == MACHINES["cpu"]


class Adapted(torch.nn.Module):
    """A layer with LoRA of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(8, 8).requires_grad_(False)
        self.A, self.B = (torch.nn.Parameter(torch.randn(*s)) for s in ((8, 2), (2, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.A @ self.B


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PEFT_FX_CACHE_DIR, else XDG_CACHE_HOME, else the home's own."""
    monkeypatch.setenv("PEFT_FX_CACHE_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "c")
    assert machines.folder() == tmp_path / "a"
    monkeypatch.delenv("PEFT_FX_CACHE_DIR")
    assert machines.folder() == tmp_path / "b" / "peft_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert machines.folder() == tmp_path / "c" / ".cache" / "peft_fx"


def test_calibrate_measures_and_stores(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """At toy size: a file in the cache's folder, or where asked for, whose constants `auto` or the path then has."""
    for name, small in (("LARGE", 32), ("WIDE", (32, 32)), ("STORED", 32), ("PASS", 1024)):
        monkeypatch.setattr(calibrate, name, {"cpu": small})
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "SETTLED", float("inf"))  # sizes at which the clock itself is what is measured
    monkeypatch.setattr(calibrate, "implausible", lambda machine: "")
    assert main(["calibrate", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    machine = machines.found(CPU)
    assert machine.name == f"calibrated {machines.described(CPU)}"
    assert not machine.mixed
    assert [d for d, _ in machine.speeds] == [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert all(text in shown.out for text in ("bfloat16", "TFLOP/s", "GB/s", str(machines.path_of(CPU))))
    assert "float64" in shown.err, "progress goes to stderr"
    path = tmp_path / "there.json"
    assert main(["calibrate", "--device", "cpu", "--output", str(path)]) == 0
    assert parse({"peft_fx.machine": path}).settings(CPU).machine == machines.load(path)
    assert machines.found(CPU) == machine, "a file asked for is not the one that auto finds"


RATES = {"bfloat16": 1.3e9, "float16": 1.3e9, "float32": 59e9, "float64": 25e9}  # a core of an AVX2 CPU
Taken = Callable[[calibrate.Key, float, int], float]  # of what would take so long, in which round


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Taken], None]:
    """Has each measurement of `calibrate` take what the core above would take, changed by a function; at toy size."""
    for name, small in (("LARGE", 32), ("WIDE", (32, 32)), ("STORED", 32), ("PASS", 1024)):
        monkeypatch.setattr(calibrate, name, {"cpu": small})
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    flops = {"large": 2 * 32**3, "small": 2 * sum(m * k * n for m, k, n in calibrate.SMALL)}
    others = {"memory": 12 * 1024 / 12e9, "kernels": 100 * 2e-6, "stores": 4 * (32 * 32 + 2 * 32 * 8) / 3e9}

    def ideal(key: calibrate.Key) -> float:
        if len(key) == 1:
            return others[key[0]]
        return (flops[key[1]] if len(key) == 2 else 2 * 32 * 32 * int(key[2])) / RATES[key[0]]

    def ticks(taken: Taken) -> Iterator[float]:
        now, keys = 0.0, [q.key for q in calibrate.quantities(CPU)]
        for i in itertools.count():
            for of in keys:
                yield now
                now += taken(of, ideal(of), i)
                yield now

    def use(taken: Taken) -> None:
        times = ticks(taken)
        monkeypatch.setattr(calibrate, "clock_of", lambda device: lambda: next(times))

    return use


def round_of_load(key: calibrate.Key, ideal: float, i: int) -> float:
    return ideal * (20 if i % 3 == 1 else 1)


def jitter(key: calibrate.Key, ideal: float, i: int) -> float:
    return ideal * (1 + 0.1 * ((len(str(key)) * 7 + i * 5) % 4))


@pytest.mark.parametrize("taken", [round_of_load, jitter])
def test_load_that_passes_changes_little(clock: Callable[[Taken], None], taken: Taken) -> None:
    """The constants are those of the quiet rounds; half precision that is 45 times slower than fp32 is none of load's
    doing."""
    clock(taken)
    assert main(["calibrate", "--device", "cpu"]) == 0
    machine = machines.found(CPU)
    for (dtype, speed), rate in zip(machine.speeds, RATES.values(), strict=True):
        assert speed.peak == pytest.approx(rate, rel=0.15), dtype
    assert machine.bandwidth == pytest.approx(12e9, rel=0.15)


DISTURBED: dict[str, tuple[Taken, str]] = {
    "fp32 slower than fp64": (lambda k, s, i: s * (4 if k == ("float32", "large") else 1), "sooner than float32"),
    "a best that is luck": (lambda k, s, i: s if i == 2 else s * (2 + i % 3), "times what the quickest took"),
    "one thing all over the place": (lambda k, s, i: s * 1.5**i if k == ("memory",) else s, "of one thing (memory)"),
    "no such memory": (lambda k, s, i: s * (1e4 if k == ("memory",) else 1), "a pass over memory"),
    "kernels that wait": (lambda k, s, i: s * (1e4 if k == ("kernels",) else 1), "kernels a second"),
}


@pytest.mark.parametrize("given", DISTURBED, ids=lambda name: name.replace(" ", "_"))
def test_nonsense_is_not_stored(clock: Callable[[Taken], None], capsys: Any, given: str) -> None:
    """It is said what is wrong and what to do, and the calibration that was there stays."""
    taken, wanted = DISTURBED[given]
    machines.store(SLOW, CPU, machines.path_of(CPU))
    clock(taken)
    assert main(["calibrate", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "Nothing is stored" in said
    assert wanted in said
    assert "try again while it rests" in said
    assert machines.found(CPU) == SLOW


def test_rounds_go_on_until_the_numbers_settle(clock: Callable[[Taken], None]) -> None:
    """Five where nothing disturbs them, more where something does at first, and not for ever."""

    def rounds(taken: Taken) -> int:
        seen = []
        clock(lambda k, s, i: seen.append(i) or taken(k, s, i))  # type: ignore[func-returns-value]
        main(["calibrate", "--device", "cpu"])
        return max(seen) + 1

    assert rounds(lambda k, s, i: s) == calibrate.ROUNDS
    assert calibrate.ROUNDS < rounds(lambda k, s, i: s * 2.0 ** -min(i, 8)) < calibrate.MOST
    assert rounds(lambda k, s, i: s * 2.0**-i) == calibrate.MOST


@pytest.mark.parametrize("name", MACHINES)
def test_the_table_is_plausible(name: str) -> None:
    """So no rule for what is nonsense turns a device away."""
    assert implausible(MACHINES[name]) == ""


@pytest.mark.parametrize("full", [False, True])
def test_a_folder_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, full: bool) -> None:
    """A full disk, or a file in the folder's place: what was measured is shown, and what was there before stays."""
    monkeypatch.setattr(calibrate, "measure", lambda device, say: SLOW)
    folder = tmp_path / "cache"
    monkeypatch.setenv("PEFT_FX_CACHE_DIR", str(folder))
    if full:
        machines.store(MACHINES["h100"], CPU, machines.path_of(CPU))
        monkeypatch.setattr(Path, "replace", failing)
    else:
        folder.write_text("not a folder")
    assert main(["calibrate", "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "slow" in shown.out
    assert "cannot be stored" in shown.err
    assert machines.found(CPU) == MACHINES["h100" if full else "cpu"]
    assert not full or [p.name for p in folder.iterdir()] == [machines.path_of(CPU).name]


def failing(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_calibrate_at_once() -> None:
    """Whoever reads meanwhile finds one of them, whole."""
    path, both = machines.path_of(CPU), (SLOW, MACHINES["h100"])
    machines.store(SLOW, CPU, path)

    def write(machine: Machine) -> None:
        for _ in range(200):
            machines.store(machine, CPU, path)

    writers = [multiprocessing.get_context("fork").Process(target=write, args=(m,)) for m in both]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert machines.load(path) in both
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_calibrate_says_that_there_is_no_gpu(capsys: Any) -> None:
    """Exit status 2, and nothing stored."""
    assert main(["calibrate", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not machines.folder().exists()


# ----------------------------------------------------------------------------------------------------- a probe


def test_a_probe_disturbs_nothing() -> None:
    """In the middle of a compile, whatever modes there are: powers of two, neither the random state nor the number of
    threads changed; and a CPU that there could be."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with compat.FakeTensorMode(), torch.autocast("cpu"), torch.inference_mode(), torch.device("meta"):
        machine = probing.probe("this")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert machine.is_cpu
    assert implausible(machine) == ""
    rates = [1e-12 * s.peak for _, s in machine.speeds] + [1e-9 * machine.bandwidth, 1e-9 * machine.stores]
    assert rates == pytest.approx([probing.rounded(r) for r in rates], rel=1e-12)


def test_one_disturbed_product_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first small product of each dtype takes ten milliseconds; quick ones are measured at the larger size all the
    same."""
    taken, late = probing._taken, dict.fromkeys(RATES, True)

    def disturbed(run: Any) -> float:
        dtype = str(run.args[0].dtype).removeprefix("torch.")
        small = run.args[0].shape == (probing.SMALL, probing.SMALL)
        return 0.01 if small and late.pop(dtype, False) else taken(run)

    monkeypatch.setattr(probing, "_taken", disturbed)
    _, sides = probing._seconds()
    assert sides["float32"] == probing.LARGE
    assert not late


def test_small_changes_of_a_probe_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of constants that decide: times that differ by a fifth give the same ones."""
    sides = dict.fromkeys(RATES, 64)

    def found(factor: float) -> Machine:
        taken = {d: factor * 2 * 64**3 / (2.0**e * 1e9) for d, e in zip(RATES, (0, 0, 6, 5), strict=True)}
        taken |= {"pass": factor * 12 * probing.PASS / 16e9, "stores": factor * 4 * 1024 * 1040 / 4e9}
        monkeypatch.setattr(probing, "_seconds", lambda: (taken, sides))
        return probing.probe("this")

    assert len({found(factor) for factor in (0.83, 0.95, 1.0, 1.1, 1.2)}) == 1
    assert found(1.0) != found(4.0)


@pytest.mark.parametrize("single", [80e9, 88e9, 90e9, 100e9])
def test_ratios_of_a_probes_rates_are_kept(monkeypatch: pytest.MonkeyPatch, single: float) -> None:
    """bfloat16 at 1.7 times float32's rate, as measured, is multiplied sooner, wherever the two lie between two powers
    of two."""
    ratios = dict(zip(RATES, (1.7, 0.05, 1.0, 0.45), strict=True))
    taken = {d: 2 * 64**3 / (single * ratio) for d, ratio in ratios.items()} | {"pass": 1e-3, "stores": 1e-3}
    monkeypatch.setattr(probing, "_seconds", lambda: (taken, dict.fromkeys(RATES, 64)))
    machine = probing.probe("this")
    assert machine.has_units_of(torch.bfloat16)
    assert machine.speed(torch.float64).peak == machine.speed(torch.float32).peak / 2


def test_cores_share_a_probes_rates_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core is measured: as many threads as may run at once have as many times its rates."""
    taken = dict.fromkeys((*RATES, "pass", "stores"), 1e-3)
    monkeypatch.setattr(probing, "_seconds", lambda: (taken, dict.fromkeys(RATES, 64)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def found(threads: int, cores: int) -> Machine:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(probing, "usable_cores", lambda: cores)
        return probing.probe("this")

    one, eight = found(1, 8), found(8, 8)
    assert [s.peak for _, s in eight.speeds] == [8 * s.peak for _, s in one.speeds]
    assert (eight.bandwidth, eight.stores) == (8 * one.bandwidth, 8 * one.stores)
    assert found(8, 1) == one


def probes(monkeypatch: pytest.MonkeyPatch, *found: Machine) -> list[str]:
    """Has one probe after another find these; the names that they were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(machines, "probed", PROBED)
    monkeypatch.setattr(machines, "probe", lambda name: asked.append(name) or found[len(asked) - 1])
    return asked


A, B = (cpu(name, (0.004, 0.004, 0.125, 0.0625), 32, 8) for name in "AB")


def test_a_cpu_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later processes read what was stored: two near a border between two powers of two have one machine."""
    asked = probes(monkeypatch, A, B)
    assert [machines.found(CPU), machines.found(CPU), machines.resolve("auto", torch.device("meta"))] == [A, A, A]
    machines._probes.clear()  # another process
    assert machines.found(CPU) == A
    assert asked == [f"probed {machines.described(CPU)}"]
    assert peft_fx.explain(Adapted(), torch.randn(4, 8)).sites[0].reason.endswith("on A")


def test_the_quicker_of_two_processes_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By both, where they probe at the same time."""
    probes(monkeypatch)
    monkeypatch.setattr(machines, "probe", lambda name: machines.store(A, CPU, machines.path_of(CPU, "probe")) or B)
    assert [machines.found(CPU), machines.found(CPU)] == [A, A]


def test_a_probe_that_fails_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU on which a dtype has no product: the table's closest machine."""

    def measured(*given: Any) -> Machine:
        raise NotImplementedError("addmm_impl_cpu_ not implemented for 'Half'")

    monkeypatch.setattr(machines, "probed", PROBED)
    monkeypatch.setattr(probing, "_measured", measured)
    with pytest.raises(RuntimeError, match="probe of this CPU failed: addmm"):
        probing.probe("this")
    assert machines.found(CPU) == machines.table_entry(CPU)


def test_a_folder_that_takes_nothing_costs_one_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each process."""
    asked = probes(monkeypatch, A, B)
    monkeypatch.setattr(machines, "store", failing)
    assert [machines.found(CPU), machines.found(CPU)] == [A, A]
    assert len(asked) == 1


@pytest.mark.parametrize(
    "switch", ["threads", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "cores", "oneDNN", "medium"]
)
def test_what_limits_a_process_is_another_machine(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    """Its threads, the instructions that it may use, its share of the cores: another probe, beside the first."""
    probes(monkeypatch, A, B)
    assert machines.found(CPU) == A
    with monkeypatch.context() as limited:
        if switch == "threads":
            limited.setattr(torch, "get_num_threads", lambda: 7)
        elif switch == "cores":
            limited.setattr(torch, "get_num_threads", lambda: 7)
            limited.setattr(probing, "usable_cores", lambda: 3)
            assert "3 cores" in machines.described(CPU)
        elif switch == "oneDNN":
            limited.setattr(type(torch.backends.mkldnn), "enabled", False)
        elif switch == "medium":
            limited.setattr(torch, "get_float32_matmul_precision", lambda: switch)
        else:
            limited.setenv(switch, "SSE41")  # whatever it is now
            assert f"{switch}=SSE41" in machines.described(CPU)
        assert machines.found(CPU) == B
    assert machines.found(CPU) == A


def test_a_group_gives_a_share_of_the_cores(tmp_path: Path) -> None:
    """In either version of control groups; none given is none taken."""
    assert probing._quota(tmp_path) == float("inf")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert probing._quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    assert probing._quota(tmp_path) == 3
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert probing._quota(tmp_path) == float("inf")
    assert probing.usable_cores() >= 1


def test_nobody_probes_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a machine is named, or a calibration fits, or the graph is a GPU's."""
    asked = probes(monkeypatch)
    machines.store(SLOW, CPU, tmp_path / "mine.json")
    for chosen in ("h100", "cpu", str(tmp_path / "mine.json")):
        parse({"peft_fx.machine": chosen}).settings(CPU)
    machines.store(SLOW, CPU, machines.path_of(CPU))
    parse(None).settings(CPU)
    parse(None).settings(torch.device("cuda"))
    assert asked == []


def test_a_probe_that_finds_nonsense_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's closest machine then, in this process, and nothing stored for others."""
    asked = probes(monkeypatch, cpu("odd", (0.1, 0.1, 0.1, 0.4), 32, 8), A)
    assert machines.found(CPU) == machines.found(CPU) == machines.table_entry(CPU)
    assert len(asked) == 1
    machines._probes.clear()
    assert machines.found(CPU) == A


@pytest.mark.parametrize(("capability", "name"), [("AVX512", "cpu"), ("AVX2", "avx2"), ("DEFAULT", "avx2")])
def test_the_tables_cpu_is_one_that_can_as_much(monkeypatch: pytest.MonkeyPatch, capability: str, name: str) -> None:
    """By what PyTorch says of it."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert machines.table_entry(CPU) == MACHINES[name]


# ------------------------------------------------------------------------------------------------------- a job

RANK = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from peft_fx import machines
from peft_fx.passes.decide.machine import MACHINES

rank, folder = int(sys.argv[1]), sys.argv[2]
cpu = torch.device("cpu")
os.environ["PEFT_FX_CACHE_DIR"] = f"{folder}/{rank}"
own = Path(folder) / f"own-{rank}.json"

def calibrate(name):
    mine = replace(MACHINES["cpu"], name=f"{name} {rank}", bandwidth=1e9 * (1 + rank))
    machines.store(mine, cpu, machines.path_of(cpu))
    machines.store(mine, cpu, own)

def names():
    return [machines.resolve(chosen, cpu).name for chosen in ("auto", own, "h100")]

calibrate("first")
said = [names()]
for group in ("one", "two"):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{group}", rank=rank, world_size=2)
    said.append(names())
    dist.barrier()
    calibrate(f"after {group}")
    said.append(names())
    dist.barrier()
    dist.destroy_process_group()
print(json.dumps(said))
"""


def test_rank_0s_constants_are_everyones(tmp_path: Path) -> None:
    """Two ranks with different calibrations, under auto and by a path each. In a group both have what rank 0 had when
    the group first asked, also after it measured again; a new group asks again; a known name needs nobody."""
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) for c in commands]
    said = [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]
    alone, *in_groups = zip(*said, strict=True)
    assert alone == (["first 0", "first 0", "h100"], ["first 1", "first 1", "h100"])
    for answers, name in zip(in_groups, ("first 0", "first 0", "after one 0", "after one 0"), strict=True):
        assert answers == ([name, name, "h100"], [name, name, "h100"])


class Store:
    """A job's store in which nobody ever says anything."""

    def wait(self, keys: list[str], timeout: Any) -> None:
        raise RuntimeError("timeout")


def test_a_rank_does_not_wait_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rank 0 compiles nothing, the others take the table's constants, and say so."""
    machines.store(SLOW, CPU, machines.path_of(CPU))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(machines.compat, "default_store", Store)
    with pytest.warns(RuntimeWarning, match="rank 0 compiled nothing"):
        assert machines.resolve("auto", CPU) == MACHINES["cpu"]


def test_only_rank_0_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a node at once would measure each other."""
    probes(monkeypatch)
    said = json.dumps(A.to_dict())
    store = type("Told", (Store,), {"wait": lambda *args: None, "get": lambda self, key: said})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(machines.compat, "default_store", store)
    assert machines.resolve("auto", CPU) == A


@pytest.mark.parametrize("said", ["true", "false", None])
def test_rank_0_tries_the_kernels_for_all(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank tries nothing; where rank 0 says nothing, there are none."""
    told = {} if said is None else {"wait": lambda *args: None, "get": lambda self, key: said}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(machines.compat, "default_store", type("Told", (Store,), told))
    monkeypatch.setattr(machines.trial, "exists", lambda device: True)
    monkeypatch.setattr(machines.trial, "failure", lambda device: pytest.fail("another rank's trial"))
    monkeypatch.setattr(machines.library, "has_triton", lambda: True)
    assert machines.has_kernels(torch.device("cuda")) == (said == "true")
