"""Which machine the price reckons with: a known one, a calibration's file, or what is found of this one.

A calibration is a measurement of this machine that `python -m peft_fx calibrate` stores in `folder()`, one file for
each device. It is used where it fits: same device, same minor version of PyTorch, on a CPU as many threads and the same
limits. Where there is none, a CPU is probed once, and what that finds is stored beside it and used alike.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from peft_fx import compat
from peft_fx.kernels import library, trial
from peft_fx.passes.decide.machine import MACHINES, Machine, implausible, table_entry
from peft_fx.probing import limits, probe

log = logging.getLogger("peft_fx")
SHARED = "peft_fx.machine"  # its place in the store of a job
KERNELS = "peft_fx.kernels"
PATIENCE = timedelta(minutes=2)  # with a rank 0 that does not compile


def folder() -> Path:
    """Where calibrations are: PEFT_FX_CACHE_DIR, or `peft_fx` in the user's cache directory."""
    own = os.environ.get("PEFT_FX_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_fx"


def path_of(device: torch.device, kind: str = "machine") -> Path:
    """The file of a device's calibration, there or not; of kind "probe" what a probe found."""
    return folder() / f"{kind}-{re.sub('[^a-z0-9]+', '-', described(device).lower()).strip('-')}.json"


def described(device: torch.device) -> str:
    """What a calibration is of: the device by its name, a CPU with the threads that PyTorch uses, and with what else
    limits this process."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return ", ".join((processor(), f"{torch.get_num_threads()} threads", *limits()))


@functools.cache
def processor() -> str:
    """The model's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def store(machine: Machine, device: torch.device, path: Path) -> None:
    """Writes a calibration; whoever reads the file meanwhile finds the former one or this one, and so does everyone
    after an OSError, of a folder that is read-only or full."""
    content = {"machine": machine.to_dict(), "device": described(device), "torch": _version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def load(path: Path) -> Machine:
    """A calibration's constants, whatever it is of; ValueError where the file is none."""
    return Machine.from_dict(_content(path)["machine"])


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a calibration: {error}") from None
    if not isinstance(content, dict) or not {"machine", "device", "torch"} <= set(content):
        raise ValueError(f"{path} is not a calibration: python -m peft_fx calibrate writes one")
    return content


def check(chosen: Any) -> None:
    """ValueError for what is neither "auto", nor a known name, nor the path of a calibration."""
    if chosen == "auto" or (isinstance(chosen, str) and chosen in MACHINES):
        return
    names = ", ".join(map(repr, ("auto", *MACHINES)))
    problem = f"'peft_fx.machine' cannot be {chosen!r}; valid values: {names}, or the path of a calibration"
    if not isinstance(chosen, (str, os.PathLike)) or not Path(chosen).is_file():
        raise ValueError(f"{problem}; there is no such file")
    try:
        load(Path(chosen))
    except ValueError as error:
        raise ValueError(f"{problem}; {error}") from None


def resolve(chosen: str, device: torch.device) -> Machine:
    """The constants for a device: "auto", a known name, or the path of a calibration.

    In a job of several processes rank 0's constants are everyone's, so that all compile the same graph: "auto" and
    paths, which may differ from one node to the next, are taken from rank 0 once for each process group.
    """
    if chosen in MACHINES:
        machine = MACHINES[chosen]
    else:
        machine = _shared(lambda: found(device) if chosen == "auto" else load(Path(chosen)), chosen, device)
    uses_tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return machine.with_tf32() if uses_tf32 else machine


def found(device: torch.device) -> Machine:
    """This device's calibration where there is one that fits; else what a probe finds of a CPU, and the closest machine
    of the table for a GPU."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return table_entry(device)
    return _stored(path_of(device), device) or (probed(device) if device.type in PROBED else table_entry(device))


PROBED = {"cpu", "meta"}  # a model on the meta device is one of this CPU's, without its numbers
_probes: dict[str, Machine] = {}  # this process's own, by what they are of


def probed(device: torch.device) -> Machine:
    """What a probe finds of this CPU, once for each machine: later processes read what the first one stored, so that
    the keys of compiled code stay the same. Where the numbers are those of no CPU, the closest machine of the table."""
    path, name = path_of(device, "probe"), described(device)
    known = _stored(path, device) or _probes.get(name)
    if known is not None:
        return known
    try:
        machine = probe(f"probed {name}")
        doubt = implausible(machine)
    except RuntimeError as error:
        doubt = str(error)
    if doubt:
        log.debug("a probe of this CPU is not believed: %s", doubt)
        machine = table_entry(device)
    elif other := _stored(path, device):  # of a process that was quicker
        machine = other
    else:
        with contextlib.suppress(OSError):
            store(machine, device, path)
    _probes[name] = machine
    return machine


def _stored(path: Path, device: torch.device) -> Machine | None:
    """The constants in a file, where they are this device's."""
    try:
        content = _content(path)
        fits = (content["device"], content["torch"]) == (described(device), _version())
        return Machine.from_dict(content["machine"]) if fits else None
    except ValueError:
        return None


def _shared(find: Callable[[], Machine], chosen: str, device: torch.device) -> Machine:
    """Rank 0's constants. Through the job's key-value store, not by a collective: ranks need not compile at the same
    time, or as many graphs. Its memory is the store's: what rank 0 said first holds while the group does."""
    if not _in_a_job():
        return find()
    key = f"{SHARED}/{'auto' if chosen == 'auto' else 'file'}/{device.type}"
    said = _of_rank_0(key, lambda: find().to_dict())
    if said is None:
        known = table_entry(device)
        text = f"rank 0 compiled nothing for {PATIENCE}: this rank's price reckons with the table's {known.name}"
        warnings.warn(f"peft_fx: {text}", RuntimeWarning, stacklevel=2)
        return known
    return Machine.from_dict(said)


def has_kernels(device: torch.device) -> bool:
    """Whether graphs on a device may use kernels of our own: where they work, by a trial on it. In a job rank 0's
    answer is everyone's, as its constants are; where it gives none, there are no kernels. So ranks whose cards differ
    are to switch them off if they work on some of them alone."""
    if not trial.exists(device):
        return True
    if not library.available(device):
        return False
    if not _in_a_job():
        return trial.works(device)
    return bool(_of_rank_0(f"{KERNELS}/{device.type}", lambda: trial.works(device)))


def _in_a_job() -> bool:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return bool(started and torch.distributed.get_world_size() > 1)


def _of_rank_0(key: str, find: Callable[[], Any]) -> Any:
    """What rank 0 found, as JSON takes it; None where it does not say so in time."""
    job = compat.default_store()
    if torch.distributed.get_rank() == 0:
        job.compare_set(key, "", json.dumps(find()))
    try:
        job.wait([key], PATIENCE)
    except RuntimeError:
        return None
    return json.loads(job.get(key))
