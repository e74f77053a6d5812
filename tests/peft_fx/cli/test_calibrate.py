"""Calibrations: measured under load, stored, found again, plausible."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_fx
from peft_fx import machines
from peft_fx.__main__ import main
from peft_fx.cli import calibrate
from peft_fx.options import parse
from peft_fx.passes.decide.machine import MACHINES, Machine, implausible

CPU = torch.device("cpu")
SLOW = replace(MACHINES["cpu"], name="slow", bandwidth=1e9)


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
