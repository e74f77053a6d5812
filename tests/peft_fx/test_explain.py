"""`explain` tells the truth, of any kind of model, and leaves no trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx import GraphModule

import peft_fx
from peft_fx import compat, compiling
from tests.support.oracle import assert_bit_equal, integers, run, weight_form
from tests.support.peft_models import adapt, layers, mlp, trained_inputs
from tests.support.spellings import NEAR_MISSES, SPELLINGS, Case, K, Stack, scale_right, x

WEIGHT = {"peft_fx.form": "weight"}
T = 50
LONG = 1024  # tokens at which every site of `mlp` takes the weight form by its price


def batch(tokens: int = T) -> Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def told(report: peft_fx.Report) -> list[tuple]:
    """What a report says of each adapter, without prices."""
    sites = [(s.name, s.tokens, s.in_features, s.out_features, s.rank, s.forward, s.input_grad) for s in report.sites]
    return sites + [(r.name, r.code, r.detail) for r in report.refusals]


# --------------------------------------------------------------------------------------------------- nothing is changed


def test_parameters_gradients_and_modes_are_as_they_were() -> None:
    """Bits of parameters and buffers, gradients (None or not), and the train/eval flag of each module."""
    model = adapt(mlp())
    model.base_model.model[0].eval()
    model(batch()).sum().backward()
    for p in list(model.parameters())[::2]:
        p.grad = None
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    objects, flags = list(model.parameters()), [m.training for m in model.modules()]
    given = batch()
    peft_fx.explain(model, given, options=WEIGHT)
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.grad is g is None or torch.equal(p.grad, g)
    assert [m.training for m in model.modules()] == flags
    assert given.grad is None
    assert torch.equal(given, batch())


def test_buffers_are_as_they_were() -> None:
    """A batch norm in training updates its statistics in forward; an explained one does not."""
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))
    peft_fx.explain(model, batch())
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(32))


def test_random_state_is_as_it_was() -> None:
    """Also where the model draws a dropout mask."""
    model = adapt(mlp(), lora_dropout=0.5)
    before = torch.get_rng_state()
    peft_fx.explain(model, batch())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_mode_is_as_it_was(enabled: bool) -> None:
    """And it decides what is explained: without gradients there is no input gradient to rewrite."""
    with torch.set_grad_enabled(enabled):
        report = peft_fx.explain(adapt(mlp()), batch(), options=WEIGHT)
        assert torch.is_grad_enabled() is enabled
    assert {(s.forward, s.input_grad) for s in report.sites} == {("weight", "weight" if enabled else "none")}
    assert bool(report.kept_bytes) is enabled


def test_a_compiled_model_is_not_compiled_again() -> None:
    """The code compiled before explain answers after it."""
    counter = CompileCounter()
    model = adapt(mlp())
    f = torch.compile(model, backend=counter)
    f(batch())
    peft_fx.explain(model, batch())
    peft_fx.explain(f, batch())
    f(batch())
    assert counter.frame_count == 1


@torch._dynamo.config.patch(recompile_limit=3)
def test_explaining_does_not_use_up_the_recompiles() -> None:
    """Dynamo gives a function up after so many compiles; explained more often, it tells the same still."""
    module, inputs = Stack(), x(2, 17, K)()
    first = told(peft_fx.explain(module, *inputs))
    assert len(first) == 2
    for _ in range(6):
        assert told(peft_fx.explain(module, *inputs)) == first
    counter = CompileCounter()
    torch.compile(module, backend=counter)(*inputs)
    assert counter.frame_count == 1


@torch._dynamo.config.patch(recompile_limit=3)
def test_explaining_does_not_use_up_a_compiled_models_recompiles() -> None:
    """The same where the model was compiled before."""
    module, inputs = Stack(), x(2, 17, K)()
    counter = CompileCounter()
    f = torch.compile(module, backend=counter, dynamic=False)
    f(*inputs)
    for _ in range(4):
        assert len(told(peft_fx.explain(module, *inputs))) == 2
    f(*x(2, 5, K)())
    assert counter.frame_count == 2


def test_explaining_two_lengths_makes_no_later_compile_dynamic() -> None:
    """Dynamo remembers sizes that change, and then compiles for any size; those explained do not count."""
    module = Stack()
    for tokens in (17, 19):
        report = peft_fx.explain(module, *x(2, tokens, K)())
        assert {s.tokens for s in report.sites} == {2 * tokens}
    sizes: list[Any] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        sizes.extend(n for t in example_inputs if isinstance(t, Tensor) for n in t.shape)
        return gm

    torch.compile(module, backend=backend)(*x(2, 23, K)())
    assert all(type(n) is int for n in sizes)


# ------------------------------------------------------------------------------------------------ what can be explained


def small_llama() -> nn.Module:
    config = tf.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    config.num_key_value_heads, config.vocab_size, config.use_cache = 2, 128, False
    return tf.LlamaForCausalLM(config)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def test_a_model_without_weights_is_explained_alike() -> None:
    """On the meta device, inputs too: the same as with weights."""
    case = Case("", Stack, x(2, 17, K))
    want = peft_fx.explain(case.make()[0], *case.make()[1], options=WEIGHT)
    module = on_meta(Stack)
    got = peft_fx.explain(module, torch.empty(2, 17, K, device="meta", requires_grad=True), options=WEIGHT)
    assert told(got) == told(want)
    assert got.kept_bytes == want.kept_bytes
    assert all(p.is_meta for p in module.parameters())


def test_a_transformer_without_weights_is_explained() -> None:
    """A Llama with PEFT, built on the meta device, by its own inputs."""
    config = LoraConfig(r=8, target_modules="all-linear")
    with torch.device("meta"):
        model = get_peft_model(small_llama(), config)
    report = peft_fx.explain(model)
    assert {s.name for s in report.sites} == set(layers(model))
    assert {s.tokens for s in report.sites} == {2048}
    assert report.refusals == report.graph_breaks == report.failures == []


def test_a_transformers_model_brings_its_own_inputs() -> None:
    """Plain and wrapped by PEFT; at a length at which the price takes the weight form."""
    model = small_llama()
    assert peft_fx.explain(model).sites == []
    model = adapt(model)
    report = peft_fx.explain(model)
    assert {s.name for s in report.sites} == set(layers(model))
    assert len(report.sites) == 7
    assert {s.forward for s in report.sites} == {"weight"}


def test_a_transformer_whose_dummy_inputs_do_not_fit_asks_for_inputs() -> None:
    """transformers offers token ids to a model of pixels: the error shows the call to make."""
    config = tf.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(TypeError, match=r"explain\(model"):
        peft_fx.explain(adapt(tf.ViTModel(config)))


@pytest.mark.parametrize("compiled", [False, True])
def test_without_inputs_the_error_shows_the_call(compiled: bool) -> None:
    """Of a module that is no transformers model and has not run."""
    model = weight_form(Stack()) if compiled else Stack()
    with pytest.raises(TypeError, match=r"explain\(model, x\)"):
        peft_fx.explain(model)


class Named(nn.Module):
    """Takes its inputs by name, or an embedding's indices as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, input_ids: Any, scale: Any = 1.0, **other: Any) -> Tensor:
        return self.table(input_ids).sum() * scale


CALLS = [peft_fx.explain, peft_fx.estimate, peft_fx.check]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", [dict, tf.BatchEncoding], ids=["dict", "BatchEncoding"])
def test_a_batch_whose_stars_were_forgotten(call: Callable[..., Any], kind: Callable[[dict], Any]) -> None:
    """What to write is said, whatever it is that failed."""
    given = kind({"input_ids": torch.tensor([[1, 2]]), "scale": 2.0})
    with pytest.raises(TypeError, match=rf"{kind.__name__} as one argument.*write {call.__name__}\(model, \*\*batch\)"):
        call(Named(), given)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_dictionary_that_the_model_takes(call: Callable[..., Any]) -> None:
    """It may take one; and what fails for another reason is told as it is."""

    class Taking(Named):
        def forward(self, batch: dict[str, Tensor], fail: bool = False) -> Tensor:
            return self.table(batch["wrong" if fail else "input_ids"]).square().mean()

    given = {"input_ids": torch.tensor([[1, 2]])}
    if call is not peft_fx.check:
        call(Taking(), given)
    with pytest.raises(Exception, match="wrong"):
        call(Taking(), given, fail=True)


@pytest.mark.parametrize("call", [peft_fx.explain, peft_fx.estimate], ids=["explain", "estimate"])
def test_a_failure_of_a_graph_names_the_call(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the function that stands for the backend there; what failed is the cause."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no such op")

    monkeypatch.setattr(compat, "compile_fx", fail)
    with pytest.raises(
        RuntimeError, match=rf"^{call.__name__}\(\) failed .* NotImplementedError: no such op"
    ) as caught:
        call(Stack(), *x(2, 3, K)())
    assert type(caught.value.__cause__) is NotImplementedError
    assert "capture" not in str(caught.value)


def test_estimate_without_inputs_shows_its_own_call() -> None:
    with pytest.raises(TypeError, match=r"estimate\(model, x\)"):
        peft_fx.estimate(Stack())


def test_explain_before_and_after_agree() -> None:
    """explain(model, x), explain(compiled, x) and explain(compiled) name the same sites at the same price."""
    model = adapt(mlp())
    f = torch.compile(model, backend=peft_fx.backend, options={"peft_fx.lowering": "aot_eager"})
    reports = [peft_fx.explain(model, batch(LONG)), peft_fx.explain(f, batch(LONG))]
    run(f, model, (batch(LONG),))
    reports += [peft_fx.explain(f), peft_fx.explain(model)]
    assert [r.sites for r in reports] == [reports[0].sites] * 4
    assert {s.forward for s in reports[0].sites} == {"weight"}
    assert {r.graphs for r in reports} == {1}


def test_explain_and_compile_agree_on_the_price() -> None:
    """Both forms are found at some length: what explain foretells is what the compile does."""
    forms = set()
    for tokens in (8, LONG):
        torch._dynamo.reset()
        model = adapt(mlp())
        before = peft_fx.explain(model, batch(tokens))
        f = torch.compile(model, backend=peft_fx.backend, options={"peft_fx.lowering": "aot_eager"})
        run(f, model, (batch(tokens),))
        assert peft_fx.explain(f).sites == before.sites
        forms |= {s.forward for s in before.sites}
    assert forms == {"weight", "activation"}


def test_explained_is_what_the_lowering_received() -> None:
    """The form told is the form in the forward graph handed to code generation: no product with both T and r there."""
    model = adapt(mlp())
    for form, products in (("weight", 0), ("activation", 6)):
        torch._dynamo.reset()
        received: list[GraphModule] = []
        real = compiling._run_eagerly

        def receive(gm: GraphModule, inputs: Any, received: list = received, real: Any = real, **kwargs: Any) -> Any:
            received.append(gm)
            return real(gm, inputs, **kwargs)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(compiling, "_run_eagerly", receive)
            f = weight_form(model, **{"peft_fx.form": form})
            run(f, model, (batch(),))
        assert {s.forward for s in peft_fx.explain(f).sites} == {form}
        sizes = [set(n.meta["val"].shape) for n in received[0].graph.nodes if "mm" in str(n.target)]
        inner = [n.args[-1].meta["val"].shape[0] for n in received[0].graph.nodes if "mm" in str(n.target)]
        assert sum((T in s) and (8 in s or k == 8) for s, k in zip(sizes, inner, strict=True)) == products


CONTAINERS = {
    "sequential": lambda: nn.Sequential(Stack(), nn.ReLU(), Stack()),
    "plain": Stack,
    "wrapped": lambda: Wrapper(Stack()),
}


class Wrapper(nn.Module):
    """A model whose first argument is not called self."""

    def __init__(this, inner: nn.Module):
        super().__init__()
        this.inner = inner

    def forward(this, x: Tensor) -> Tensor:
        return this.inner(x)


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_sites_are_named_by_their_path(make: Callable[[], nn.Module]) -> None:
    """A site's name is that of a module or a parameter of the model, as the model itself lists them."""
    model = make()
    report = peft_fx.explain(model, *x(2, 17, K)())
    names = {s.name for s in report.sites}
    assert len(names) == sum(name.endswith("W") for name, _ in model.named_parameters())
    assert names <= {name for name, _ in [*model.named_modules(), *model.named_parameters()]}


def test_options_are_those_of_torch_compile() -> None:
    """One dictionary serves both; a wrong one is refused by both."""
    options = {"peft_fx.form": "activation", "max_autotune": False}
    module, inputs = Stack(), x(2, 17, K)()
    report = peft_fx.explain(module, *inputs, options=options)
    assert {(s.forward, s.input_grad) for s in report.sites} == {("activation", "activation")}
    assert all(s.reason.startswith("asked for") for s in report.sites)
    with pytest.raises(ValueError, match="valid"):
        peft_fx.explain(module, *inputs, options={"peft_fx.form": "wieght"})


def test_a_compiled_models_own_options_are_used() -> None:
    """explain(compiled, x) without options explains that compile; options given win."""
    f, inputs = weight_form(Stack()), x(2, 3, K)()
    assert {s.forward for s in peft_fx.explain(f, *inputs).sites} == {"weight"}
    chosen = peft_fx.explain(f, *inputs, options={"peft_fx.form": "activation"})
    assert {s.forward for s in chosen.sites} == {"activation"}


def test_keywords_are_the_calls() -> None:
    """Positional or by name."""
    module, (given,) = Stack(), x(2, 17, K)()
    assert told(peft_fx.explain(module, x=given)) == told(peft_fx.explain(module, given))


def loose(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return scale_right(x, W, A, B, 2.0)


def test_a_function_is_explained() -> None:
    """A plain function and a compiled one, of tensors that are arguments."""
    tensors = [torch.randn(*s, requires_grad=True) for s in ((64, 32), (32, 24), (32, 3), (3, 24))]
    reports = [peft_fx.explain(f, *tensors, options=WEIGHT) for f in (loose, torch.compile(loose))]
    for report in reports:
        assert [(s.rank, s.forward) for s in report.sites] == [(3, "weight")], str(report)


def test_a_model_compiled_in_place_is_explained() -> None:
    """model.compile(backend=...) and then explain(model)."""
    model = adapt(mlp())
    want = peft_fx.explain(model, batch(), options=WEIGHT)
    model.compile(backend=peft_fx.backend, options=WEIGHT | {"peft_fx.lowering": "aot_eager"})
    model(batch()).sum().backward()
    assert told(peft_fx.explain(model)) == told(want)


def test_what_was_compiled_before_does_not_answer() -> None:
    """A call is traced as it is, in place and behind a break too, and whatever the stance."""

    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            torch._dynamo.graph_break()
            return self.down(h)

    model, inputs = Broken(), x(2, 17, K)()
    want = peft_fx.explain(model, *inputs, options=WEIGHT)
    model.compile(backend=lambda gm, inputs: pytest.fail("another backend was called"))
    for stance in ("default", "force_eager", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            report = peft_fx.explain(model, *inputs, options=WEIGHT)
        assert (report.graphs, told(report)) == (2, told(want))


def test_training_and_evaluation_with_dropout() -> None:
    """lora_dropout is refused in training and nothing at all in evaluation."""
    model = adapt(mlp(), lora_dropout=0.1)
    training = peft_fx.explain(model, batch(), options=WEIGHT)
    assert [r.code for r in training.refusals] == ["dropout"] * 3
    assert {r.name for r in training.refusals} == set(layers(model))
    evaluation = peft_fx.explain(model.eval(), batch(), options=WEIGHT)
    assert evaluation.refusals == []
    assert {s.name for s in evaluation.sites if s.input_grad == "weight"} == trained_inputs(model, (batch(),))
    assert model.training is False


def test_graph_breaks_are_told() -> None:
    """With the reason, and adapters on both sides."""

    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            torch._dynamo.graph_break()
            return self.down(h)

    report = peft_fx.explain(Broken(), *x(2, 17, K)(), options=WEIGHT)
    assert report.graphs == 2
    assert len(report.graph_breaks) == 1
    assert len(report.sites) == 2
    assert f"graph break: {report.graph_breaks[0]}" in str(report)


def test_an_adapter_behind_a_break_is_refused() -> None:
    """Some tokens are picked by a mask, whose size no graph has: the base is in another graph than the adapter, and in
    training AOTAutograd turns the adapter's away. Told before a compile and after it."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Stack().up

        def forward(self, x: Tensor) -> Tensor:
            x, mask = x.view(-1, K), torch.arange(34) > 20
            y = x @ self.layer.W
            y[mask] += (x[mask] @ self.layer.A) @ self.layer.B
            return y

    module, inputs = integers(Picked(), 1), integers(x(2, 17, K)(), 2)
    reports = [peft_fx.explain(module, *inputs, options=WEIGHT)]
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    assert reports[0].graph_breaks
    if torch.__version__ < "2.12" and "nothing after it can be told" in reports[0].graph_breaks[0]:
        reports = []  # this Dynamo asks for the number of tokens that are picked
    for report in (*reports, peft_fx.explain(f)):
        assert [r.code for r in report.refusals] == ["different_input"], str(report)
        assert report.sites == report.failures == []
        assert report.refusals[0].name == "layer.A"


@pytest.mark.parametrize("case", [*SPELLINGS, *NEAR_MISSES], ids=lambda case: case.id)
def test_every_adapter_appears_once(case: Case) -> None:
    """As a site or as a refusal, never as both, and under a name of its own."""
    module, inputs = case.make()
    report = peft_fx.explain(module, *inputs, options=WEIGHT | case.options)
    names = [s.name for s in report.sites] + [r.name for r in report.refusals]
    assert len(set(names)) == len(names), str(report)
    assert names, "not a word about the adapter"


# ----------------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def report() -> peft_fx.Report:
    """Sites, and with dropout on one layer a refusal."""
    model = adapt(mlp(), lora_dropout=0.1)
    for name in ("2", "4"):
        model.base_model.model[int(name)].lora_dropout["default"] = nn.Identity()
    return peft_fx.explain(model, batch(), options=WEIGHT)


def test_report_has_both_kinds(report: peft_fx.Report) -> None:
    """What the tests below are about is there."""
    assert len(report.sites) == 2
    assert len(report.refusals) == 1
    assert report.graphs == 1


def test_kept_bytes_get_fewer() -> None:
    """On a PEFT model in its default dtypes, in fp32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = adapt(mlp(), dtype=dtype)
        given = batch(LONG).detach().to(dtype).requires_grad_()
        kept = peft_fx.explain(model, given, options=WEIGHT).kept_bytes
        assert set(kept) == {"before", "after"}
        assert 0 < kept["after"] < kept["before"]


def test_dict_and_json_hold_everything(report: peft_fx.Report) -> None:
    """JSON gives the dict back, and the dict the report."""
    as_dict = json.loads(report.to_json())
    assert as_dict == report.to_dict() == json.loads(report.to_json(indent=None))
    sites = [peft_fx.Site(**s) for s in as_dict.pop("sites")]
    refusals = [peft_fx.Refusal(**r) for r in as_dict.pop("refusals")]
    inputs = [peft_fx.KeptInput(**i) for i in as_dict.pop("inputs")]
    assert peft_fx.Report(sites, refusals, inputs=inputs, **as_dict) == report


def test_str_is_a_table_of_every_adapter(report: peft_fx.Report) -> None:
    """Each on a line of its own, with its forms and its price, or its code and reason; bytes in the summary."""
    lines = str(report).splitlines()
    assert lines[0].startswith("2 of 3 adapters in weight form, 1 refused; 1 graph; kept for backward: ")
    for s in report.sites:
        (line,) = (line for line in lines if line.split("  ")[0] == s.name)
        assert all(word in line for word in (s.forward, s.adapter_grad, s.reason, f"{T}×{s.in_features}"))
    for r in report.refusals:
        (line,) = (line for line in lines if line.split("  ")[0] == r.name)
        assert r.code in line
        assert r.detail in line


def test_flops_and_bytes_are_told_before_and_after(report: peft_fx.Report) -> None:
    """As numbers, fewer bytes moved in weight form than as written at many tokens."""
    many = peft_fx.explain(adapt(mlp()), batch(LONG), options=WEIGHT)
    for s in many.sites:
        assert set(s.flops) == set(s.bytes) == {"before", "after"}
        assert 0 < s.bytes["after"] < s.bytes["before"]
        assert s.flops["before"] > 2 * s.tokens * s.in_features * s.out_features


def test_an_empty_report_can_be_printed() -> None:
    """A model without adapters: nothing to tell, and said so."""
    empty = peft_fx.explain(nn.Sequential(nn.Linear(64, 8)), batch())
    assert (empty.sites, empty.refusals) == ([], [])
    assert str(empty).startswith("0 of 0 adapters")
    assert empty.kept_bytes["before"] == empty.kept_bytes["after"]
