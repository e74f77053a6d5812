"""The backend as torch.compile meets it: options, failures, caches, the entry point, what calls may change."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import types
import uuid
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import Graph, GraphModule, Node

import peft_fx
from peft_fx import compat, compiling, inductor_passes, machines
from peft_fx.options import CHOICES, parse
from peft_fx.passes import pipeline
from peft_fx.passes.analyse import find
from peft_fx.passes.analyse.flow import Role
from peft_fx.passes.decide import machine, price
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph import joint as joints
from peft_fx.passes.graph.nodes import CAST, aten, is_random, value
from peft_fx.passes.keep import chains, in_place_reads
from peft_fx.passes.rewrite import merge_sums
from peft_fx.records import Record, records_of
from tests.oracle import Run, assert_bit_equal, integers, run, weight_form
from tests.peft_models import adapt, mlp
from tests.spellings import Case, K, Stack, lora, scale_right, x

ROOT = pathlib.Path(__file__).parent.parent
T = (2, 17, K)


def step(make: Callable[[], nn.Module] = Stack, **options: Any) -> tuple[Run, Any]:
    """One training step of a small model, compiled anew; and the compiled model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs = make(), x(*T)()
    f = weight_form(module, **options)
    return run(f, module, inputs), f


def plain(gm: GraphModule, example_inputs: list[Any]) -> Any:
    """The lowering of the tests with none of our code in it."""
    patches = {"fallback_random": True, "fx_graph_cache": False}
    return compat.compile_fx(gm, example_inputs, inner_compile=compiling._run_eagerly, config_patches=patches)


def plain_step(make: Callable[[], nn.Module] = Stack) -> Run:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs = make(), x(*T)()
    return run(torch.compile(module, backend=plain), module, inputs)


# ---------------------------------------------------------------------------------------------------------- options


KEYS = [f"peft_fx.{key}" for key in CHOICES]
WRONG = {
    "unknown_key": ("peft_fx.from", "weight", KEYS),
    "prefix_alone": ("peft_fx.", "weight", KEYS),
    "key_in_capitals": ("peft_fx.Form", "weight", KEYS),
    **{f"value_of_{key}": (f"peft_fx.{key}", "nonsense", valid) for key, valid in CHOICES.items()},
    "memory_weight_below_0": ("peft_fx.memory_weight", -1.0, ["seconds"]),
    "memory_weight_a_name": ("peft_fx.memory_weight", "much", ["seconds"]),
    "dense_where_strict": ("peft_fx.adapter_grad", "dense", ["auto", "low_rank"]),
    "value_none": ("peft_fx.form", None, CHOICES["form"]),
    "value_unhashable": ("peft_fx.form", ["weight"], CHOICES["form"]),
}


@pytest.mark.parametrize(("key", "chosen", "valid"), WRONG.values(), ids=WRONG)
def test_wrong_option_is_a_value_error(key: str, chosen: Any, valid: list[str]) -> None:
    """Beside right options too; the error says what was wrong and names each key or value that is right."""
    with pytest.raises(ValueError, match="valid") as caught:
        parse({"peft_fx.numerics": "strict", "max_autotune": True, key: chosen})
    assert repr(key) in str(caught.value)
    assert all(str(name) in str(caught.value) for name in valid)


@pytest.mark.parametrize(
    "arguments",
    [
        {"options": {"peft_fx.from": 1}},
        {"options": {"peft_fx.form": "wieght"}},
        {"options": {"form": "weight"}},
        {"mode": "lite"},
    ],
)
def test_wrong_option_is_told_through_torch_compile(arguments: dict) -> None:
    """Dynamo wraps what a backend raises; the ValueError is inside, its text on top."""
    f = torch.compile(Stack(), backend=peft_fx.backend, **arguments)
    with pytest.raises(BackendCompilerFailed, match="peft_fx") as caught:
        f(*x(*T)())
    assert type(caught.value.inner_exception) is ValueError
    assert str(caught.value.inner_exception) in str(caught.value)


NEAREST = {
    "form": "peft_fx.form",
    "Form": "peft_fx.form",
    "fomr": "peft_fx.form",
    "keep_layer": "peft_fx.keep_layers",
    "peft_fx.frm": "peft_fx.form",
    "peft_fx_form": "peft_fx.form",
    "peftfx.keep": "peft_fx.keep",
    "max_autotun": "max_autotune",
    "peft_fx.max_autotune": "max_autotune",
    "triton.cudagraph": "triton.cudagraphs",
}


@pytest.mark.parametrize(("key", "meant"), NEAREST.items())
def test_a_key_that_is_nearly_right(key: str, meant: str) -> None:
    """Without the prefix, or misspelt, ours or Inductor's: the error asks for the nearest."""
    with pytest.raises(ValueError, match=f"no option {key!r}; valid ones: .*did you mean .*{meant!r}"):
        parse({key: "weight"})


@pytest.mark.parametrize("key", ["lora", 3, None])
def test_a_key_that_nothing_is_near_to(key: Any) -> None:
    with pytest.raises(ValueError, match=r"valid ones: peft_fx\.form, ") as caught:
        parse({key: 1})
    assert "did you mean" not in str(caught.value)


def test_keys_of_inductor_are_taken_as_torch_compile_takes_them() -> None:
    """Dotted, private, with dashes."""
    given = {"triton.cudagraphs": False, "_micro_pipeline_tp": False, "max-autotune": True, "fallback_random": True}
    assert parse(given).inductor == {k.replace("-", "_"): v for k, v in given.items()}


def test_mode_lite_is_a_value_error() -> None:
    """It runs no joint-graph passes."""
    with pytest.raises(ValueError, match="lite"):
        parse(None, "lite")


def seen_by_inductor(monkeypatch: pytest.MonkeyPatch, names: list[str], **arguments: Any) -> dict[str, Any]:
    """Inductor's configuration while the passes run in a compile that stops before code generation."""
    seen: dict[str, Any] = {}
    lower, passes = compat.compile_fx, pipeline.run

    def look(*args: Any) -> Outcome:
        seen.update({name: attrgetter(name)(compat.inductor_config) for name in names})
        return passes(*args)

    monkeypatch.setattr(pipeline, "run", look)
    monkeypatch.setattr(compat, "compile_fx", lambda *a, **kw: lower(*a, inner_compile=compiling._run_eagerly, **kw))
    torch.compile(Stack(), backend=peft_fx.backend, **arguments)(*x(*T)())
    return seen


MODES = ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("mode", MODES)
def test_mode_is_mapped_as_inductor_does(mode: str, monkeypatch) -> None:
    """The passes run under the very configuration that Inductor lists for the mode."""
    wanted = compat.list_mode_options(mode)
    assert wanted
    assert seen_by_inductor(monkeypatch, list(wanted), mode=mode) == wanted


def test_other_options_reach_inductor(monkeypatch) -> None:
    """Keys without our prefix are Inductor's, dotted ones too; ours do not get there."""
    theirs = {"max_autotune": True, "triton.cudagraphs": True, "epilogue_fusion": False}
    assert not any(attrgetter(k)(compat.inductor_config) == v for k, v in theirs.items())
    assert seen_by_inductor(monkeypatch, list(theirs), options={"peft_fx.form": "weight", **theirs}) == theirs
    assert parse({"peft_fx.form": "weight", **theirs}).inductor == theirs


def test_an_option_overrides_the_mode() -> None:
    """Where a backend is called with both, the option given by name wins."""
    chosen = parse({"triton.cudagraphs": False}, "reduce-overhead")
    assert chosen.inductor == {**compat.list_mode_options("reduce-overhead"), "triton.cudagraphs": False}


class Noting(compat.CustomGraphPass):  # type: ignore[misc]
    """A user's own pass: notes the sizes of the products that it sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append(sum(n.target is aten.mm.default for n in graph.nodes))

    def uuid(self) -> str:
        return "noting"


def test_a_users_own_pass_still_runs() -> None:
    """A pass given by option, by configuration, or as one of a list sees the graph before us, and once."""
    theirs = Noting()
    step(joint_custom_pre_pass=theirs)
    with compat.inductor_config.patch(joint_custom_pre_pass=theirs):
        _, f = step()
    assert len(theirs.seen) == 2
    assert theirs.seen[0] == theirs.seen[1] >= 12
    assert len(peft_fx.explain(f).sites) == 2


def test_a_list_of_passes_still_runs() -> None:
    """Inductor of 2.13 takes a list of joint passes as well."""
    theirs = Noting()
    _, f = step(joint_custom_pre_pass=[theirs, theirs])
    assert len(theirs.seen) == 2
    assert len(peft_fx.explain(f).sites) == 2


def test_a_pass_after_inductors_still_runs() -> None:
    theirs = Noting()
    step(joint_custom_post_pass=theirs)
    assert len(theirs.seen) == 1


def test_a_removed_no_op_leaves_its_tag_to_nobody() -> None:
    """Inductor hands the metadata of `1.0 * A`, which backward rebuilds, on to A, which is then not kept for it."""
    x, W, W2 = (torch.randn(*sizes).double() for sizes in ((2, 5), (5, 8), (5, 5)))
    A, B, A2, B2 = (nn.Parameter(torch.randn(*sizes).double()) for sizes in ((5, 3), (3, 8), (5, 2), (2, 5)))

    def f(x):
        return x @ W + ((1.0 * x) @ A) @ B, x @ W2 + ((2.0 * x) @ A2) @ B2

    options = {"peft_fx.lowering": "aot_eager", "peft_fx.form": "weight"}
    compiled = torch.compile(f, backend="peft_fx", options=options)
    got, want = (torch.autograd.grad(sum(y.sum() for y in g(x)), [A, B, A2, B2]) for g in (compiled, f))
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------------------- disabled


@pytest.mark.parametrize("setting", ["1", "true"])
def test_disabled_is_plain_lowering(setting: str, monkeypatch) -> None:
    """PEFT_FX_DISABLE: the bits of Inductor alone, no pass, no record."""
    monkeypatch.setenv("PEFT_FX_DISABLE", setting)
    monkeypatch.setattr(pipeline, "run", lambda *a: pytest.fail("a pass ran"))
    got, f = step()
    assert_bit_equal(got, plain_step())
    assert records_of(f._orig_mod) == []


@pytest.mark.parametrize("setting", ["", "0"])
def test_disabled_is_off(setting: str, monkeypatch) -> None:
    """An empty or zero PEFT_FX_DISABLE disables nothing."""
    monkeypatch.setenv("PEFT_FX_DISABLE", setting)
    assert len(peft_fx.explain(step()[1]).sites) == 2


# ---------------------------------------------------------------------------------------------------------- failures


class Injected(Exception):
    pass


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Injected("on purpose")


FAULTS = {
    "contract": (pipeline.Contract, "of"),
    "analysis": (joints, "Sums"),
    "refusals": (find, "refusals"),
    "price": (price, "decide"),
    "rewrite": (merge_sums.Rewriter, "rewrite"),
    "merge": (merge_sums.Rewriter, "_merge"),
    "transients": (in_place_reads, "read_in_place"),
    "keep": (chains.Recompute, "mark"),
    "verify": (pipeline, "verify"),
}


def assert_falls_back(make: Callable[[], nn.Module] = Stack, because: str = "") -> None:
    """One warning, the untouched graph's bits, and a report that says so."""
    with pytest.warns(RuntimeWarning, match=r"^peft_fx") as caught:
        got, f = step(make)
    assert [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] == [str(caught[0].message)]
    assert because in str(caught[0].message)
    assert_bit_equal(got, plain_step(make))
    report = peft_fx.explain(f)
    assert len(report.failures) == 1
    assert because in report.failures[0]
    assert (report.sites, report.refusals) == ([], [])


@pytest.mark.parametrize(("where", "name"), FAULTS.values(), ids=FAULTS)
def test_a_failure_of_ours_is_one_warning(where: Any, name: str, monkeypatch) -> None:
    """Whatever stage fails, training goes on with the untouched graph."""
    monkeypatch.setattr(where, name, boom)
    assert_falls_back(because="Injected: on purpose")


def test_a_failure_of_ours_in_inference_is_one_warning(monkeypatch) -> None:
    """The same without gradients."""
    monkeypatch.setattr(pipeline, "verify", boom)
    module, inputs = Stack(), x(*T)()
    f = weight_form(module)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"^peft_fx"):
        got = f(*inputs)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(got, torch.compile(module, backend=plain)(*inputs))


def test_a_failure_of_ours_is_told_by_explain(monkeypatch) -> None:
    """explain before a compile foretells the failure instead of dying of it."""
    monkeypatch.setattr(pipeline, "verify", boom)
    report = peft_fx.explain(Stack(), *x(*T)())
    assert report.failures == ["Injected: on purpose"]
    assert "Injected: on purpose" in str(report)


Break = Callable[[Graph, list[Node]], None]
BREAKS: dict[str, tuple[Break, str]] = {}


def breaks(what: str) -> Callable[[Break], Break]:
    def note(change: Break) -> Break:
        BREAKS[change.__name__] = change, what
        return change

    return note


def output_of(graph: Graph) -> Node:
    (output,) = (n for n in graph.nodes if n.op == "output")
    return output


@breaks("")
def wrong_dtype_inside(graph: Graph, added: list[Node]) -> None:
    cast = next(n for n in added if n.target is CAST)
    cast.args = (cast.args[0], torch.float16)


@breaks("")
def wrong_shape_inside(graph: Graph, added: list[Node]) -> None:
    merge = next(n for n in added if n.target is aten.mm.default)
    merge.meta["val"] = value(merge)[1:]


@breaks("outputs")
def wrong_dtype_of_an_output(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    with graph.inserting_before(output):
        cast = graph.call_function(CAST, (output.args[0][0], torch.float64))
    cast.meta["val"] = value(output.args[0][0]).double()
    output.args = ((cast, *output.args[0][1:]),)


@breaks("outputs")
def gradient_dropped(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    last = max(i for i, n in enumerate(output.args[0]) if n is not None)
    output.args = (tuple(None if i == last else n for i, n in enumerate(output.args[0])),)


@breaks("outputs")
def output_dropped(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    output.args = (tuple(output.args[0][:-1]),)


@breaks("outputs")
def outputs_exchanged(graph: Graph, added: list[Node]) -> None:
    output = output_of(graph)
    output.args = (tuple(output.args[0][::-1]),)


@breaks("the graph is not well-formed")
def used_before_it_is_made(graph: Graph, added: list[Node]) -> None:
    graph.output_node().prepend(next(n for n in added if n.users))


@breaks("effects")
def random_draw_dropped(graph: Graph, added: list[Node]) -> None:
    draw = next(n for n in graph.nodes if is_random(n))
    with graph.inserting_before(draw):
        same = graph.call_function(aten.full.default, (list(value(draw).shape), 0.5))
    same.meta["val"] = value(draw)
    draw.replace_all_uses_with(same)
    graph.erase_node(draw)


class WithNoise(Stack):
    """A random draw outside of the adapters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.rand_like(x))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_graph_is_not_used(name: str, monkeypatch) -> None:
    """What a wrong pass leaves behind is found before Inductor sees it."""
    change, what = BREAKS[name]
    verify = pipeline.verify

    def verify_broken(graph: Graph, before: Any, fake_mode: Any) -> None:
        change(graph, [n for n in graph.nodes if n.op == "call_function" and n not in before.reads])
        verify(graph, before, fake_mode)

    monkeypatch.setattr(pipeline, "verify", verify_broken)
    assert_falls_back(WithNoise, f"VerificationError: {what}")


# ------------------------------------------------------------------------------------------------------ uuid, caches


ROLES = {0: Role("up.W", True, False), 1: Role("up.A", True, True), 2: Role("x")}


def key(roles: dict[int, Role] | None = None, **options: str) -> Any:
    """The pass's key in Inductor's caches."""
    chosen = parse({f"peft_fx.{k}": v for k, v in options.items()})
    record = Record(GraphModule({}, Graph()), [torch.zeros(1)], roles or ROLES, chosen, True)
    return inductor_passes.AdapterPass(record).uuid()


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
    from tests.oracle import leaves, run
    from tests.spellings import Stack, x

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


RUN = uuid.uuid4().hex


def python(source: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, whose graphs are cached for `cwd` alone; headers that g++ has read are everyone's."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "PEFT_FX_DISABLE")}
    variables |= {"TORCH_COMPILE_CACHE_KEY_TAG": f"{RUN} {cwd}", **environment}
    command = [sys.executable, "-W", "error:peft_fx:RuntimeWarning", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


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


# ----------------------------------------------------------------------------------------------- entry point, logging


BY_NAME = """
    import sys, torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.A, self.B = nn.Parameter(torch.randn(32, 2)), nn.Parameter(torch.randn(2, 32))

        def forward(self, x):
            return self.layer(x) + (x @ self.A) @ self.B

    print("peft_fx" in sys.modules)
    model = Model()
    options = {"peft_fx.lowering": "aot_eager", "peft_fx.form": "weight"}
    f = torch.compile(model, backend="peft_fx", options=options)
    f(torch.randn(8, 32)).sum().backward()
    assert model.A.grad is not None
    print([s.name for s in sys.modules["peft_fx"].explain(f).sites])
"""


def test_the_backend_has_a_name(tmp_path) -> None:
    """backend="peft_fx" works without importing peft_fx, from any folder, and says nothing."""
    done = python(BY_NAME, tmp_path)
    assert done.stdout.splitlines() == ["False", "['layer']"]
    assert "layer" not in done.stderr


def test_decisions_are_logged(tmp_path) -> None:
    """TORCH_LOGS="+peft_fx" prints each decision, with the prices that it came from."""
    done = python(BY_NAME, tmp_path, TORCH_LOGS="+peft_fx")
    (line,) = (line for line in done.stderr.splitlines() if "layer: forward weight" in line)
    assert "vs activation" in line


def test_refusals_are_logged(caplog) -> None:
    """With the reason."""
    case = Case("", lora(lambda x, W, A, B, s: x @ W + torch.relu(x @ A) @ B), x(*T))
    with caplog.at_level("DEBUG", "peft_fx"):
        module, inputs = case.make()
        weight_form(module)(*inputs)
    assert any("refused, nonlinear" in message for message in caplog.messages)


# --------------------------------------------------------------------------------------------------- between the calls


def assert_steps_agree(module: nn.Module, inputs: Any) -> None:
    """Three steps of SGD and momentum, compiled and in eager: the same integers throughout, without a recompile."""
    twin = copy.deepcopy(module)
    nets = (weight_form(module), module), (twin, twin)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.5) for _, m in nets]
    for _ in range(3):
        runs = []
        for (f, m), optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            y = f(*inputs)
            y.backward(torch.ones_like(y))
            runs.append(Run([y.detach()], [], {n: p.grad for n, p in m.named_parameters()}))
            optimizer.step()
        assert_bit_equal(*runs)
    assert_bit_equal(*(Run([], [], dict(m.named_parameters())) for _, m in nets))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_an_optimizer_step_is_followed() -> None:
    """W' is built from the weights as they are at each call."""
    module, _ = Case("", lora(scale_right), x(5, K)).make(torch.float64)
    integers(module, 1, 1)
    assert_steps_agree(module, integers((torch.zeros(5, K, dtype=torch.float64),), 2, 1))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_new_values_need_no_new_compile() -> None:
    """Adapters and base weights written to in place, and loaded from a state dict."""
    module = adapt(mlp(nn.ReLU))
    batch = integers((torch.zeros(9, 64),), 2, 1)
    f = weight_form(module)
    for seed in range(3):
        integers(module, seed, 1)
        assert_bit_equal(run(f, module, batch), run(module, module, batch))
    state = {name: torch.randint_like(p, -1, 2) for name, p in module.state_dict().items()}
    module.load_state_dict(state)
    assert_bit_equal(run(f, module, batch), run(module, module, batch))


def test_two_compiles_of_one_model_tell_apart() -> None:
    """Each compiled model is explained by its own compile, whatever the other was asked for."""
    module, inputs = Stack(), x(*T)()
    forms = {form: weight_form(module, **{"peft_fx.form": form}) for form in ("weight", "activation")}
    for f in forms.values():
        run(f, module, inputs)
    for form, f in forms.items():
        assert {(s.forward, s.input_grad) for s in peft_fx.explain(f).sites} == {(form, form)}
