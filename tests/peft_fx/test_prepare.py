"""`prepare` cures the graph breaks of PEFT's adapters, and changes nothing else."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

import peft_fx
from peft_fx.curing import TABLE
from peft_fx.passes.analyse.merged import ALREADY
from peft_fx.preparing import curable
from tests.support import joint
from tests.support.oracle import weight_form
from tests.support.peft_models import adapt, llama_config
from zoo import methods


class Block(methods.Block):
    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear):
        super().__init__(linear(64, 128), linear(128, 64))


class Invoked(Block):
    """Tells its adapters from which token on they are invoked, counted from the end of each sequence."""

    OFFSETS = 5, None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(self.up(x, alora_offsets=self.OFFSETS))
        return self.down(h, alora_offsets=self.OFFSETS)


class Tasks(Block):
    """Tells its adapters which task each sequence is of."""

    IDS = torch.tensor([1, 0])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(self.up(x, task_ids=self.IDS))
        return self.down(h, task_ids=self.IDS)


class Experts(nn.Module):
    """Two parameters of one module, each the weights of several experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 128) / 8)
        self.down = nn.Parameter(torch.randn(4, 128, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.nn.functional.gelu(x[:, None] @ self.up) @ self.down).mean(dim=1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


class Words(nn.Module):
    """Reads x as indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(32, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.detach().abs().mul(8).long().clamp(max=31))).sum(dim=2) * x


class Writer(nn.Module):
    """A model of transformers whose class's name tells of no loss."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 32, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
        self.model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))

    def forward(self, x: Tensor) -> Tensor:
        ids = x.detach().abs().mul(8).long().clamp(max=31)[0]
        return self.model(input_ids=ids, labels=ids).loss * x


def lora(**options: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 8, "target_modules": ["up", "down"], **options})


def other(name: str, **options: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: getattr(peft, name)(target_modules=["up", "down"], **options)


def of(name: str) -> Callable[[], peft.PeftConfig]:
    """As bench coverage has it."""
    return methods.METHODS[name].configured


def velora(init_type: str) -> Callable[[], LoraConfig]:
    return lora(velora_config=VeloraConfig(num_groups=8, init_type=init_type))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], peft.PeftConfig]]] = {
    "dora": (Block, of("dora")),
    "dora, dropout": (Block, of("dora+dropout")),
    "dora, Conv1D": (lambda: Block(lambda K, N: Conv1D(N, K)), of("dora, Conv1D")),
    "dora, embedding": (Words, lora(use_dora=True, target_modules=["table"])),
    "loha": (Block, of("loha")),
    "loha, rank_dropout": (Block, of("loha, rank dropout")),
    "lokr": (Block, of("lokr")),
    "velora": (Block, velora("batch_average")),
    "velora, once": (Block, velora("batch_average_once")),
    "velora, dropout": (Block, lora(velora_config=VeloraConfig(num_groups=8), lora_dropout=0.1)),
    "alora": (Invoked, of("alora")),
    "poly": (Tasks, of("poly")),
    "shira": (Block, of("shira")),
    "vblora": (Block, of("vblora")),
    "frod": (Block, of("frod")),
    "waveft": (Block, of("waveft")),
    "waveft, coif2": (Block, other("WaveFTConfig", n_frequency=64, wavelet_family="coif2")),
    "parameters": (Block, lora(target_modules=[], target_parameters=["up.weight", "down.weight"])),
    "experts": (Mixture, lora(target_modules=[], target_parameters=["experts.up", "experts.down"])),
    "loss": (Writer, lora(target_modules=["c_attn"], fan_in_fan_out=True)),
}
DRAWS_LESS = {"loha, rank_dropout"}  # after the draw that compiled code leaves out, a mask is another
RECOMPILES = {"velora, once": 1}  # the first step initializes
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Adapters that are not zero, in training mode."""
    make, config = CASES[name]
    torch.manual_seed(0)
    model = get_peft_model(make().to(dtype), config()).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape))
    return model


def batch() -> Tensor:
    return torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def steps(f: Callable[[Tensor], Tensor], model: nn.Module) -> list[dict[str, Tensor | None]]:
    """A few steps of gradient descent: what each gave, the model's state after it, and the next random number."""
    torch.manual_seed(2)
    found = []
    for _ in range(3):
        x = batch()
        y = f(x)
        model.zero_grad()
        y.square().mean().backward()
        got = {"y": y.detach(), "x": x.grad, **{f"gradient of {k}": p.grad for k, p in model.named_parameters()}}
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
        found.append(got | {k: v.clone() for k, v in model.state_dict().items()} | {"rng": torch.get_rng_state()})
    return found


def same(got: list[dict[str, Tensor | None]], want: list[dict[str, Tensor | None]]) -> bool:
    """To the bit."""
    pairs = [(g[k], w[k]) for g, w in zip(got, want, strict=True) for k in g.keys() | w.keys()]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


# ------------------------------------------------------------------------------------------------- every cured method


@each
def test_eager_mode_is_as_it_was(name: str) -> None:
    """Outputs, gradients, parameters, buffers and random draws of three steps, to the bit."""
    assert same(steps(model := peft_fx.prepare(build(name)), model), steps(model := build(name), model))


@each
def test_one_graph(name: str) -> None:
    """Compiled as one graph with its backward, once for all steps, with eager's results: to the bit, as aot_eager runs
    the same ops, but for FRoD and aLoRA, whose sums are rounded in another order."""
    model = peft_fx.prepare(build(name))
    counter = CompileCounterWithBackend("aot_eager")
    got = steps(torch.compile(model, backend=counter, fullgraph=True), model)
    assert counter.frame_count == 1 + RECOMPILES.get(name, 0)
    if name not in DRAWS_LESS:
        want = steps(reference := build(name), reference)
        for g, w in zip(got, want, strict=True):
            del g["rng"], w["rng"]
        if name in ("frod", "alora"):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        else:
            assert same(got, want)


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name or "embedding" in name])
def test_restore(name: str) -> None:
    """The graphs break as before, and every class is PEFT's own."""
    model = build(name)
    classes = [type(m) for m in model.modules()]
    state = list(model.state_dict())
    assert curable(peft_fx.prepare(model)) == []
    assert peft_fx.cures(model)
    assert list(model.state_dict()) == state
    assert peft_fx.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert peft_fx.cures(model) == []
    counter = CompileCounter()
    torch.compile(model, backend=counter)(batch())
    assert counter.frame_count > 1


@pytest.mark.parametrize("name", ["dora", "frod", "waveft", "experts", "alora"])
def test_explain_tells_of_prepare(name: str) -> None:
    """A hint beside each break, and neither of them after it."""
    model = build(name)
    before = peft_fx.explain(model, batch())
    assert before.graph_breaks
    assert all("peft_fx.prepare(model) cures" in b for b in before.graph_breaks)
    after = peft_fx.explain(peft_fx.prepare(model), batch())
    assert (after.graphs, after.graph_breaks) == (1, [])


# --------------------------------------------------------------------------------------------------------- what stays

LEFT = {
    "monteclora": of("monteclora"),
    "loha": other("LoHaConfig", r=4, module_dropout=0.5),
    "lokr": other("LoKrConfig", r=4, module_dropout=0.5),
    "parameters": CASES["parameters"][1],
}


def test_every_row_is_tested() -> None:
    """The table's cures by the cases above, what it leaves by those below."""
    models = [build(name) for name in CASES]
    cured = {
        row for row in TABLE for m in models for n in m.modules() for o in _with_variants(n) if row.matches(type(o))
    }
    assert cured >= {row for row in TABLE if row.cured}
    assert sum(row.cured is None for row in TABLE) == 3


def _with_variants(module: nn.Module) -> list[Any]:
    return [module, *getattr(module, "lora_variant", {}).values()]


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """By name and with the reason, and its class is its own."""
    model = get_peft_model(Block(), LEFT[name]())
    if name == "parameters":
        model.base_model.model.to(torch.float8_e4m3fn)
    classes = [type(o) for m in model.modules() for o in _with_variants(m)]
    with caplog.at_level(logging.INFO, "peft_fx"):
        peft_fx.prepare(model)
    (line,) = [r.message for r in caplog.records if r.name == "peft_fx"]
    assert "left base_model.model.up as it is (" in line
    assert "cured" not in line
    assert [type(o) for m in model.modules() for o in _with_variants(m)] == classes
    assert peft_fx.cures(model) == curable(model) == []


@pytest.mark.parametrize("config", [None, lora(), velora("random"), of("ia3")])
def test_nothing_to_cure(config: Callable[[], peft.PeftConfig] | None, caplog: pytest.LogCaptureFixture) -> None:
    """The same model, not touched."""
    model = get_peft_model(Block(), config()) if config else Block()
    classes = [type(o) for m in model.modules() for o in _with_variants(m)]
    with caplog.at_level(logging.INFO, "peft_fx"):
        assert peft_fx.prepare(model) is model
    assert [r.message for r in caplog.records if r.name == "peft_fx"] == ["prepare: nothing to cure"]
    assert [type(o) for m in model.modules() for o in _with_variants(m)] == classes
    assert peft_fx.cures(model) == []


def test_a_class_with_code_of_its_own_is_left() -> None:
    """A user's subclass that replaces what the cure would replace; one that replaces something else is cured."""

    class OtherForward(LoHaLinear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x, *args, **kwargs)

    class OtherRepr(LoHaLinear):
        def __repr__(self) -> str:
            return "mine"

    model = build("loha")
    model.base_model.model.up.__class__ = OtherForward
    model.base_model.model.down.__class__ = OtherRepr
    assert [c.name for c in peft_fx.cures(peft_fx.prepare(model))] == ["base_model.model.down"]
    assert repr(model.base_model.model.down) == "mine"
    assert type(peft_fx.restore(model).base_model.model.down) is OtherRepr


def test_peft_is_not_imported() -> None:
    """It is an optional extra."""
    code = "import sys, torch, peft_fx; peft_fx.prepare(torch.nn.Linear(2, 2)); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------ what is told


def test_cures_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """One cure for each layer, one line for all; the second call finds nothing."""
    model = build("loha")
    with caplog.at_level(logging.INFO, "peft_fx"):
        assert peft_fx.prepare(model) is model
        found = peft_fx.cures(model)
        assert peft_fx.cures(peft_fx.prepare(model)) == found
    assert [c.name for c in found] == ["base_model.model.up", "base_model.model.down"]
    assert found[0] == peft_fx.Cure(found[0].name, "torch.rand(1) > module_dropout, which is 0", found[0].done)
    lines = [r.message for r in caplog.records if r.name == "peft_fx"]
    assert lines == ["prepare: cured 2 × peft.tuners.loha.layer.Linear", "prepare: nothing to cure"]


@pytest.mark.parametrize("function", [peft_fx.prepare, peft_fx.restore, peft_fx.cures])
def test_what_is_no_module(function: Callable[[Any], Any]) -> None:
    """The error says what is valid."""
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, such as get_peft_model\(\) gives; got function"):
        function(lambda x: x)


@pytest.mark.parametrize("function", [peft_fx.prepare, peft_fx.restore, peft_fx.cures, peft_fx.loss_only])
def test_what_is_compiled_already(function: Callable[[Any], Any]) -> None:
    """As `loss_only` says it: the object that torch.compile returned is not the model. A layer inside may be one."""
    model = Block()
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) takes a torch.nn.Module that is not yet compiled"):
        function(torch.compile(model))
    model.up = torch.compile(model.up)
    function(model)


# --------------------------------------------------------------------------------------------- the rest of PEFT's life


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["dora", "velora", "loha", "loss"])
def test_copies_are_prepared(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """And are of their own parameters: training one leaves the other as it was."""
    model = peft_fx.prepare(build(name))
    copied = duplicate(model)
    assert peft_fx.cures(copied) == peft_fx.cures(model) != []
    assert same(steps(copied, copied), steps(model, model))
    peft_fx.restore(copied)
    assert peft_fx.cures(model)


@pytest.mark.parametrize("name", ["dora", "loha", "shira", "vblora", "frod", "waveft", "velora", "parameters", "loss"])
def test_saved_disabled_and_merged(name: str, tmp_path: Path) -> None:
    """As without prepare, to the bit; a compiled model follows disable_adapter()."""
    model, plain = peft_fx.prepare(build(name)).eval(), build(name).eval()
    x = batch().detach()
    f = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(f(x), plain(x), rtol=1e-5, atol=1e-6)
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
            assert torch.equal(f(x), plain(x))
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        make = CASES[name][0]()
        loaded = peft_fx.prepare(PeftModel.from_pretrained(make, tmp_path)).eval()
        assert torch.equal(loaded(x), plain(x))
        assert torch.equal(model.merge_and_unload()(x), plain.merge_and_unload()(x))


def test_an_adapter_added_later() -> None:
    """One that drops whole modules is PEFT's own affair, also in a layer that was cured before it came."""
    model = peft_fx.prepare(build("loha"))
    model.add_adapter("other", other("LoHaConfig", r=4, module_dropout=1.0, init_weights=False)())
    model.set_adapter("other")
    x = batch()
    compiled = torch.compile(model, backend="eager")
    base = model.get_base_model()
    with torch.no_grad():
        want = base.down.base_layer(torch.nn.functional.gelu(base.up.base_layer(x)))
        assert torch.equal(model(x), want)
        assert torch.equal(compiled(x), want)


def test_vblora_still_refuses_infinity() -> None:
    """What save_only_topk_weights leaves in the logits cannot be trained on, in compiled code either."""
    model = peft_fx.prepare(build("vblora"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(batch())
    with torch.no_grad():
        model.base_model.model.up.vblora_logits_A["default"][0, 0, 3] = -torch.inf
    for f in (model, compiled):
        with pytest.raises(RuntimeError, match="infinity"):
            f(batch())
    model.eval()(batch())


def test_poly_still_refuses_an_unknown_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled code too, though as another error."""
    model = peft_fx.prepare(build("poly"))
    monkeypatch.setattr(Tasks, "IDS", torch.tensor([1, 2]))
    for f, error in ((model, ValueError), (torch.compile(model, backend="aot_eager"), RuntimeError)):
        with pytest.raises(error, match="task"):
            f(batch())


@pytest.mark.parametrize("name", ["parameters", "experts"])
def test_what_is_in_weight_form_already_is_left(name: str) -> None:
    """PEFT's target_parameters, stacked experts among them: the same ops, each as often, and that is told."""
    model, x = peft_fx.prepare(build(name)), batch()
    captured = joint.capture(model, x)
    graph, outcome = captured.rewritten(form="weight", keep="inductor")
    before, after = (Counter(str(n.target) for n in g.nodes) for g in (captured.graph, graph))
    assert after == before
    assert outcome.sites == outcome.refusals == []
    assert [(s.forward, s.adapter_grad, s.rank > 0) for s in outcome.merged] == [("weight", "dense", True)] * 2
    told = peft_fx.explain(model, x, options={"peft_fx.form": "weight"})
    assert [s.name for s in told.sites] == [s.name for s in outcome.merged]
    assert "already in weight form" in str(told)


def test_experts_are_told_of_behind_a_graph_break() -> None:
    """As by PEFT itself: what is merged in one graph is read in another."""
    told = [peft_fx.explain(model, batch()).sites for model in (build("experts"), peft_fx.prepare(build("experts")))]
    assert [[(s.forward, s.reason) for s in sites] for sites in told[:1]] == [[("weight", ALREADY)] * 2]
    assert [s.reason for s in told[1]] == [ALREADY] * 2


def test_the_backend_sees_through() -> None:
    """What was behind a break is rewritten."""
    model = peft_fx.prepare(build("loha"))
    f = weight_form(model)
    f(batch()).sum().backward()
    assert [(s.forward, s.input_grad) for s in peft_fx.explain(f).sites] == [("weight", "weight")] * 2


# ------------------------------------------------------------------------------------------------ losses without a name


def test_a_loss_of_the_users_own_is_traced() -> None:
    """What was set before and what is set after; it is gone again with `restore`."""
    model = peft_fx.prepare(build("loss"))
    inner = model.base_model.model.model
    assert [cure.name for cure in peft_fx.cures(model)] == ["base_model.model.model"]  # the base has no loss
    inner.loss_function = lambda logits, labels, **others: logits.float().square().mean()
    want = model(x := batch())
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    assert peft_fx.restore(model).base_model.model.model.loss_function is inner.loss_function
    assert type(inner) is tf.GPT2LMHeadModel


# ------------------------------------------------------------------------------------------------- checkpointing's hook


def checkpointed(reentrant: bool) -> Any:
    model = adapt(tf.LlamaForCausalLM(llama_config(32, 48, 2)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def gradients(model: Any, f: Any) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    ids = torch.arange(16)[None] % 32
    f(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_checkpoints_are_one_graph() -> None:
    """The hook on the embeddings breaks it; without it, what is trained has the same gradients."""
    model = checkpointed(reentrant=False)
    want, counter = gradients(model, model), CompileCounterWithBackend("aot_eager")
    assert curable(model) == [cure.name for cure in peft_fx.cures(peft_fx.prepare(model))] != []
    got = gradients(model, torch.compile(model, backend=counter))
    assert counter.frame_count == 1
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_in_eager_mode_the_hook_acts() -> None:
    model = peft_fx.prepare(checkpointed(reentrant=False))
    embeddings = model.get_input_embeddings()
    assert embeddings(torch.arange(4)).requires_grad
    peft_fx.restore(model)
    assert peft_fx.cures(model) == []
    assert embeddings(torch.arange(4)).requires_grad
    model.get_base_model().disable_input_require_grads()
    assert not embeddings(torch.arange(4)).requires_grad


def test_reentrant_checkpoints_need_the_hook() -> None:
    model = checkpointed(reentrant=True)
    assert curable(model) == []
    assert peft_fx.cures(peft_fx.prepare(model)) == []
