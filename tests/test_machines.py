"""Which machine the price reckons with: names, files, calibrations, and one for all ranks of a job."""

from __future__ import annotations

import errno
import json
import multiprocessing
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
from peft_fx import calibrating, machines
from peft_fx.__main__ import main
from peft_fx.options import parse
from peft_fx.passes.machine import MACHINES, Machine, Speed
from tests.test_backend import key

CPU = torch.device("cpu")
SLOW = replace(MACHINES["cpu"], name="slow", bandwidth=1e9)
positive = st.floats(1e-9, 1e18)
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
        monkeypatch.setattr(calibrating, name, {"cpu": small})
    monkeypatch.setattr(calibrating, "SECONDS", 0.0)
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


@pytest.mark.parametrize("full", [False, True])
def test_a_folder_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, full: bool) -> None:
    """A full disk, or a file in the folder's place: what was measured is shown, and what was there before stays."""
    monkeypatch.setattr(calibrating, "measure", lambda device, say: SLOW)
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


# ------------------------------------------------------------------------------------------------------- a job

RANK = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from peft_fx import machines
from peft_fx.passes.machine import MACHINES

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
