"""Training by other people's loops: transformers' Trainer and TRL's SFTTrainer, from checkpoint to checkpoint; and all
that one does with adapters between the steps of one's own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

import peft_fx
from peft_fx import compat
from peft_fx.step.budget import Held
from tests.support.oracle import EAGER, WEIGHT, Run, assert_no_worse, exact, pooled, shuffle
from tests.support.peft_models import VOCAB, adapt, fill, llama_config, mlp

STEPS, LENGTH = 10, 32
OF = "peft_fx.memory_budget_of"
DRAWS = 4  # of the parameters: the errors of one curve's losses hang together, and one curve's ratio is chance


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One layer, adapted; two sequences of its vocabulary are a batch."""
    torch.manual_seed(0)
    return adapt(tf.LlamaForCausalLM(llama_config(64, 128, 1)), dtype=dtype)


def compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="peft_fx", options=WEIGHT)
    return model


def texts(n: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, kind: type = tf.TrainingArguments, **settings) -> tf.TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "bf16": False}
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    return kind(str(folder), use_cpu=True, **(quiet | usual | settings))


def losses(trainer: tf.Trainer, **kwargs) -> Tensor:
    trainer.train(**kwargs)
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def assert_all_rewritten(model: nn.Module) -> None:
    """In the graph that trains; evaluation has one of its own."""
    report = peft_fx.explain(model)
    assert report.refusals == []
    assert report.failures == []
    assert len({s.name for s in report.sites}) == 7
    assert {s.forward for s in report.sites} == {"weight"}


def assert_same_curve(
    by: Callable[[nn.Module], Tensor], dtype: torch.dtype, compile_it: Callable[[nn.Module], nn.Module] = compiled
) -> None:
    """The losses of each step are no further from those of a run in float64 than eager PEFT's are."""
    start, models = llama(dtype), (exact(llama(dtype)), llama(dtype), compile_it(llama(dtype)))

    def once(seed: int) -> tuple[Run, ...]:
        shuffle(start, seed)
        curves = []
        for model in models:
            model.load_state_dict(start.state_dict())
            curves.append(by(model))
        assert [len(c) for c in curves] == [STEPS] * 3
        assert curves[0][-5:].mean() < curves[0][:5].mean(), "nothing is learnt"
        return tuple(Run([c.float() if i else c], [], {}) for i, c in enumerate(curves))

    assert_no_worse(*pooled(once, DRAWS))
    assert_all_rewritten(models[2])


# ------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "loss_only"), [(torch.float32, True), (torch.bfloat16, False)], ids=["fp32, loss_only", "bf16 base"]
)
def test_trainer(dtype: torch.dtype, loss_only: bool, tmp_path: Path) -> None:
    """Steps of two batches each, clipped, with an evaluation after every seven."""

    def train(model: nn.Module) -> Tensor:
        args = arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=7)
        model = peft_fx.loss_only(model) if loss_only else model
        return losses(tf.Trainer(model, args, train_dataset=texts(), eval_dataset=texts(2)))

    assert_same_curve(train, dtype)


@pytest.mark.slow
def test_resuming_a_trainer(tmp_path: Path) -> None:
    """From a checkpoint half way of an eager run, compiled: the curve of the run that was not interrupted."""

    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)

    def trainer(model: nn.Module) -> tf.Trainer:
        return tf.Trainer(model, args, train_dataset=texts())

    whole = losses(trainer(llama(torch.float64)))
    resumed = trainer(compiled(llama(torch.float64)))
    curve = losses(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(curve, whole, rtol=1e-6, atol=0)  # transformers computes its loss in float32
    assert_all_rewritten(resumed.model)


def test_a_trainer_within_a_budget(tmp_path: Path) -> None:
    """The same losses to the bit, for a step that is held to nine tenths of what it took."""

    def train(budget: int) -> tuple[Tensor, list[Held]]:
        model = llama()
        model.compile(backend="peft_fx", options=EAGER | {"peft_fx.memory_budget": budget, OF: "step"})
        curve = losses(tf.Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=texts()))
        return curve, peft_fx.explain(model).budgets

    free, untouched = train(10**15)
    within, held = train(int(0.9 * max(h.peak["after"] for h in untouched)))
    assert torch.equal(free, within)
    assert all(h.is_held for h in held)
    assert any(h.rebuilt for h in held)


def test_accelerate_has_no_name_for_us(tmp_path: Path) -> None:
    """Arguments that name us can be made, a Trainer of them cannot. Once it can, README's and the examples' way in
    through `model.compile` is no longer the only one."""
    args = arguments(tmp_path, torch_compile_backend="peft_fx")
    assert args.torch_compile
    with pytest.raises(ValueError, match="'PEFT_FX' is not a valid DynamoBackend"):
        tf.Trainer(mlp(), args)


# ----------------------------------------------------------------------------------------------------------------- TRL


def words() -> tf.PreTrainedTokenizerFast:
    """A tokenizer without a download; the data are numbers already."""
    from tokenizers import Tokenizer, models

    known = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.slow
def test_sft_trainer(tmp_path: Path) -> None:
    """TRL's loss comes from kernels of its own, so what is compiled are the layers."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def train(model: nn.Module) -> Tensor:
        args = arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=False)
        data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in texts()])
        return losses(trl.SFTTrainer(model, args, train_dataset=data, processing_class=words()))

    def layers(model: nn.Module) -> nn.Module:
        compiled(model.get_base_model().base_model)
        return model

    assert_same_curve(train, torch.float32, layers)


# ----------------------------------------------------------------------------------------------------- one's own loop


def session(f: Callable, model: nn.Module, folder: Path) -> Iterator[Tensor]:
    """Losses and results of an eventful life with two adapters: steps of accumulated, scaled and clipped gradients,
    switching, disabling, merging, saving, swapping in place, loading."""
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(adapters, lr=0.3, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    batches = iter(torch.randn(32, 12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))

    def step() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(2):
            loss = f(next(batches)).square().mean() / 2
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(adapters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return total

    @torch.no_grad()
    def look() -> Tensor:
        model.eval()
        y = f(torch.linspace(-1, 1, 12 * 64, dtype=torch.float64).view(12, 64))
        model.train()
        return y

    yield step()
    yield look()
    yield step()
    model.set_adapter("other")
    yield step()
    yield look()
    with model.disable_adapter():
        yield look()
    model.set_adapter("default")
    yield look()
    yield step()
    model.merge_adapter()
    yield look()
    model.unmerge_adapter()
    yield step()
    saved = copy.deepcopy(model.state_dict())
    model.save_pretrained(folder, selected_adapters=["default"])
    yield look()
    yield step()
    hotswap_adapter(model, folder, adapter_name="default")
    model.set_adapter("default")  # PEFT 0.17 leaves it frozen
    yield look()
    yield step()
    model.load_state_dict(saved)
    yield look()


class Counted:
    """A backend that counts the graphs that it is given."""

    def __init__(self, backend: Callable) -> None:
        self.backend, self.graphs = backend, 0

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        self.graphs += 1
        return self.backend(gm, example_inputs)


def test_a_life_with_adapters(tmp_path: Path) -> None:
    """Whatever is done to the adapters between calls, the next call has them as they are then, and Dynamo compiles no
    more often than it does for another backend."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        adapted = adapt(mlp(), dtype=torch.float64)
        adapted.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
        fill(adapted)
        return adapted.double()

    eager = model()
    want = list(session(eager, eager, tmp_path / "eager"))
    graphs = []
    for backend in (lookup_backend("aot_eager"), functools.partial(peft_fx.backend, options=WEIGHT)):
        torch._dynamo.reset()
        ours, counted = model(), Counted(backend)
        with compat.dynamo_config.patch(recompile_limit=64):
            got = list(session(torch.compile(ours, backend=counted), ours, tmp_path / "compiled"))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        graphs.append(counted.graphs)
    assert graphs[1] <= graphs[0]
    report = peft_fx.explain(ours)
    assert {s.forward for s in report.sites} == {"weight"}
    assert str(report).startswith("3 of 3 adapters in weight form;"), "not one for each graph"


@pytest.mark.slow
def test_generating_between_steps() -> None:
    """The tokens that a model in training picks are those that it would pick in eager mode at that moment."""
    prompt = texts(1)[0]["input_ids"][None, :8]

    def life(model: nn.Module) -> tuple[list[Tensor], Tensor]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        picked = []
        for batch in texts(3):
            picked.append(model.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=0))
            loss = model(**{name: t[None] for name, t in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return picked, loss.detach()

    want, got = life(llama(torch.float64)), life(compiled(llama(torch.float64)))
    assert not torch.equal(want[0][0], want[0][-1]), "training changes nothing"
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # transformers computes its loss in float32
