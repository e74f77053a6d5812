"""The key of Inductor's caches: what changes it, and what a warm cache answers."""

from __future__ import annotations

import json
import shutil
import types
from dataclasses import replace

import pytest
import torch
from torch.fx import Graph, GraphModule

from peft_fx import inductor_passes, machines
from peft_fx.options import CHOICES, parse
from peft_fx.passes.analyse.flow import Role
from peft_fx.passes.decide import machine
from peft_fx.records import Record
from tests.support.stepping import ROLES, ROOT, Noting, key, python


def test_equal_inputs_have_equal_keys() -> None:
    """Without it no cache would ever answer."""
    assert key() == key(dict(ROLES))
    assert key() == key(dict(reversed(ROLES.items())))
    assert key() == key(form="auto")


def test_an_option_changes_the_key() -> None:
    """Each value of each option that decides has a key of its own; of the machine, each one's constants."""
    decided = {k: tuple(n for n in v if (k, n) != ("machine", "auto")) for k, v in CHOICES.items() if k != "lowering"}
    keys = [key(**{k: v}) for k, values in decided.items() for v in values]
    assert {key(), key(machine="cpu")} == {key(**{k: getattr(parse({}), k)}) for k in decided}
    assert len(set(keys)) == len(keys) - len(decided) + 1


OTHER_ROLES = {
    "trainable": ROLES | {0: replace(ROLES[0], trainable=True)},
    "static": ROLES | {2: replace(ROLES[2], static=True)},
    "name": ROLES | {1: replace(ROLES[1], name="down.A")},
    "exchanged": ROLES | {0: ROLES[1], 1: ROLES[0]},
    "missing": {0: ROLES[0], 1: ROLES[1]},
    "moved": {0: ROLES[0], 1: ROLES[1], 3: ROLES[2]},
}


@pytest.mark.parametrize("roles", OTHER_ROLES.values(), ids=OTHER_ROLES)
def test_a_role_changes_the_key(roles: dict[int, Role]) -> None:
    """What an input is decides what may be merged and what a site is called."""
    assert key(roles) != key()


def test_the_machine_changes_the_key(monkeypatch) -> None:
    """Not by its name alone: a constant in the table decides as well."""
    before = key()
    slower = replace(machines.MACHINES["cpu"], bandwidth=1e9)
    monkeypatch.setattr(machines, "table_entry", lambda device: slower)
    assert key() != before


def test_the_instruction_set_changes_the_key(monkeypatch) -> None:
    """Inductor's code for AVX512, run by a process that `ATEN_CPU_CAPABILITY` holds to AVX2, has wrong numbers."""
    keys = set()
    for capability in ("DEFAULT", "AVX2", "AVX512", "SVE256"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(machine, "WIDE", {capability})
        keys.add(key())
    assert len(keys) == 4


def test_every_byte_of_the_source_changes_the_key(tmp_path, monkeypatch) -> None:
    """Of every file in every folder, and each one's place; a copy elsewhere with the same bytes has the same key."""
    shutil.copytree(ROOT / "peft_fx", tmp_path / "peft_fx", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(
        inductor_passes, "peft_fx", types.SimpleNamespace(__file__=str(tmp_path / "peft_fx/__init__.py"))
    )
    digest = inductor_passes.source_digest.__wrapped__
    before = digest()
    assert before == inductor_passes.source_digest()
    files = sorted((tmp_path / "peft_fx").rglob("*.py"))
    assert {f.parent.name for f in files} >= {"peft_fx", "passes"}
    seen = {before}
    inner = tmp_path / "peft_fx/passes/inner/deeper.py"
    inner.parent.mkdir()
    inner.write_text("x = 1\n")
    files.append(inner)
    seen.add(before := digest())
    for file in files:
        source = file.read_bytes()
        file.write_bytes(source[:-1] + b" ")
        seen.add(digest())
        file.write_bytes(source)
    assert len(seen) == len(files) + 2
    assert digest() == before
    inner.rename(inner.parent.parent / inner.name)
    assert digest() not in seen


def test_the_source_is_part_of_the_key(monkeypatch) -> None:
    """So code that a former version made is not found."""
    before = key()
    monkeypatch.setattr(inductor_passes, "source_digest", lambda: "other")
    assert key() != before


def test_a_lowering_without_code_has_no_key() -> None:
    """None: Inductor's caches must not hold what is not Inductor's code."""
    assert key(lowering="aot_eager") is None


def test_a_users_own_pass_is_part_of_the_key() -> None:
    """And one without a key leaves us without one."""
    record = Record(GraphModule({}, Graph()), [torch.zeros(1)], ROLES, parse({}), True)
    noting, other = Noting(), Noting()
    other.uuid = lambda: "other"  # type: ignore[method-assign]
    keys = [inductor_passes.AdapterPass(record, others).uuid() for others in ([], [noting], [other])]
    assert len(set(keys)) == 3
    assert inductor_passes.AdapterPass(record, [lambda graph: None]).uuid() is None


TRAIN = """
    import hashlib, json, torch
    torch.set_num_threads(1)
    import peft_fx
    from peft_fx import inductor_passes
    from peft_fx.records import records_of
    from torch._dynamo.utils import counters
    from tests.support.oracle import leaves, run
    from tests.support.spellings import Stack, x

    keys = []
    real = inductor_passes.AdapterPass.uuid
    inductor_passes.AdapterPass.uuid = lambda self: keys.append(real(self)) or keys[-1]
    torch.manual_seed(0)
    module, inputs = Stack(), x(64, 96)()
    f = torch.compile(module, backend=peft_fx.backend, options={"peft_fx.form": "weight"})
    result = run(f, module, inputs)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in result.items() if t is not None)).hexdigest()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    passes = sum(len(r.outcomes) for r in records_of(module))
    sites = peft_fx.explain(f).to_dict()["sites"]
    print(json.dumps({"keys": keys, "hits": hits, "passes": passes, "digest": digest, "sites": sites}))
"""


@pytest.mark.slow
def test_a_warm_cache_answers_and_is_explained(tmp_path) -> None:
    """In a second process, hashed with another seed: the same key, a hit, no pass run, the same bits and sites."""
    cold, warm = (
        json.loads(python(TRAIN, tmp_path, PYTHONHASHSEED=seed, PYTHONPATH=str(ROOT)).stdout.splitlines()[-1])
        for seed in ("1", "2")
    )
    assert (cold["hits"], cold["passes"]) == (0, 1)
    assert (warm["hits"], warm["passes"]) == (1, 0)
    assert cold["keys"][0]
    assert set(warm["keys"]) == set(cold["keys"])
    assert len(set(cold["keys"])) == 1
    assert warm["digest"] == cold["digest"]
    assert warm["sites"] == cold["sites"]
    assert [(s["name"], s["forward"], s["input_grad"]) for s in warm["sites"]] == [
        ("up.W", "weight", "weight"),
        ("down.W", "weight", "weight"),
    ]
