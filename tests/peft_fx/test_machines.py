"""Which machine the price reckons with: names, files, calibrations, and one for all ranks of a job."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_fx
from peft_fx import compat, machines, probing
from peft_fx.options import parse
from peft_fx.passes.decide.machine import MACHINES, Machine, Speed, cpu, implausible
from tests.peft_fx.cli.test_calibrate import CPU, RATES, SLOW, Adapted, failing
from tests.support.stepping import key

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
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) for c in commands]
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
