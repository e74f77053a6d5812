"""`check`: a user's own model and batch in eager mode, through Inductor and through peft_fx; what each gets wrong, and
what each keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from peft_fx import compat
from peft_fx.compat import pytree
from peft_fx.compiling import lowered, record_of
from peft_fx.copying import Casts
from peft_fx.explaining import explain, unwrapped
from peft_fx.gradients import left_as_it_was, named_loss
from peft_fx.measuring import memory_of
from peft_fx.options import PREFIX, Options, parse
from peft_fx.reports import Report
from peft_fx.tracing import by_nothing_but, compiled_call, telling_of_a_batch

EAGER, INDUCTOR, OURS = "eager", "Inductor", "peft_fx"
GATE = 1.25  # an error over that of the same model without peft_fx
SEED = 0
FLOOR = 4.0  # roundings: of a few numbers, what chance makes of them


@dataclass(frozen=True)
class Variant:
    """One way to run the model. Errors are relative to the reference, root of the mean square: of the loss, of all
    gradients, of the worst one; `kept` and `peak` are bytes above the weights."""

    name: str
    loss: float
    loss_error: float
    error: float
    worst: float
    kept: int
    peak: int


@dataclass(frozen=True)
class Check:
    """What `check` found. `ok` is whether nothing speaks against peft_fx; `verdict` says so in words, and `problems`
    what does. `reference` is the dtype that errors are relative to; `report` is `explain`'s."""

    variants: tuple[Variant, ...]
    reference: str
    problems: tuple[str, ...]
    verdict: str
    report: Report = field(repr=False)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {
            "variants": [asdict(v) for v in self.variants],
            "reference": self.reference,
            "ok": self.ok,
            "problems": list(self.problems),
            "verdict": self.verdict,
            "report": self.report.to_dict(),
        }

    def __str__(self) -> str:
        head = ("", "loss", "its error", "gradients' error", "the worst", "kept MB", "peak MB")
        rows = [
            (v.name, f"{v.loss:.6g}", *map(_percent, (v.loss_error, v.error, v.worst)), _mb(v.kept), _mb(v.peak))
            for v in self.variants
        ]
        table = tabulate(rows, head, colalign=("left", *6 * ("right",)), disable_numparse=True)
        problems = "\n".join(f"problem: {p}" for p in self.problems)
        return "\n\n".join(filter(None, [self.verdict, problems, f"{table}\n\nerrors against {self.reference}"]))


def check(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Check:
    """Runs one forward and backward of `model(*args, **kwargs)` in eager mode, through Inductor and through peft_fx.

    Says by how much the loss and every gradient err against the same model in float64 (float32 where that cannot be),
    what each keeps for backward and needs at its peak, and whether anything speaks against peft_fx. `options` are those
    of `torch.compile`, for both compiled forms. The loss is the output's `loss`, or the output itself where it is one
    number, else the mean square of all outputs. A model that draws random numbers, as dropout does, is judged as in
    evaluation, because no two compilers draw alike; its bytes are those of training.

    Each form is compiled for itself, whatever the model, or a module of it, was compiled with before. The model, what
    it was compiled to, its gradients and the random state are left as they were. Raises TypeError for what is no
    module, or has nothing to train; ValueError for an unknown option. Costs four times the model's own memory in
    float32, and two or four compiles.
    """
    model, _ = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"check() needs a torch.nn.Module, not {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise TypeError("check() needs a model with parameters to train: none of this one's requires a gradient")
    chosen = parse(options)
    theirs = {k: v for k, v in (options or {}).items() if not k.startswith(PREFIX)}
    device = next(model.parameters()).device
    with left_as_it_was(model), telling_of_a_batch("check", model, args, kwargs):
        report = explain(model, *args, options=options, **kwargs)
        rows = {EAGER: Row(None), INDUCTOR: Row(_inductor(theirs)), OURS: Ours(chosen)}
        memory, runs = {}, {}
        with compat.forgetting(), compat.functorch_config.patch(enable_autograd_cache=False):
            for name, row in rows.items():
                with row.alone():
                    memory[name] = memory_of(
                        lambda row=row: _loss(row.call(model, args, kwargs)),  # type: ignore[misc]
                        lambda: model.zero_grad(set_to_none=True),
                        device,
                    )
            counts = {name: row.graphs for name, row in rows.items()}
            with rows[EAGER].alone():
                draws = _draws(model, args, kwargs)
            if draws:
                model.eval()
            for name, row in rows.items():
                with row.alone():
                    runs[name] = _run(row.call, model, args, kwargs)
            with rows[EAGER].alone():
                reference, truth = _reference(model, args, kwargs, runs[EAGER])
    variants = tuple(_variant(n, run, truth, memory[n]) for n, run in runs.items())
    failures = [*dict.fromkeys([*report.failures, *rows[OURS].failures])]
    problems = [*_left_out(counts, report), *_problems(runs, truth, variants, failures)]
    return Check(variants, reference, tuple(problems), _verdict(variants, problems, report), report)


# -------------------------------------------------------------------------------------------------------------- running


class Row:
    """One way to run a model, by one compiler, or by none (None), alone: whatever the model, its modules or its class
    were compiled with before, and whatever torch.compiler.set_stance says. `graphs` is how many were compiled."""

    def __init__(self, compiler: Callable[..., Any] | None):
        self.graphs = 0
        self.failures: list[str] = []

        def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
            assert compiler is not None
            self.graphs += 1
            return compiler(gm, example_inputs)

        # a function of its own: Dynamo keeps what it compiles by its backend
        self.backend = None if compiler is None else backend
        self.call: Callable[..., Any] = _call if compiler is None else compiled_call(backend)

    def alone(self) -> AbstractContextManager[None]:
        """Around all of a step: what is checkpointed is called again in backward."""
        return by_nothing_but(self.backend)


class Ours(Row):
    """The backend itself, without a record that `explain` would tell of, and whatever PEFT_FX_DISABLE says."""

    def __init__(self, options: Options):
        def compiler(gm: GraphModule, example_inputs: list[Any]) -> Any:
            record = record_of(gm, example_inputs, options)
            compiled = lowered(gm, example_inputs, record)
            self.failures += [record.failure] if record.failure else []
            return compiled

        super().__init__(compiler)


def _inductor(options: dict[str, Any]) -> Callable[..., Any]:
    """What torch.compile hands graphs to, by itself."""
    compiled: Any = torch.compile(nn.Identity(), options=options or None)
    found: Callable[..., Any] = compat.innermost_backend(compat.callback_of(compiled))
    return found


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _left_out(graphs: dict[str, int], report: Report) -> list[str]:
    """Rows that are not what they are called."""
    return [
        f"{name} compiled {graphs[name]} of the {report.graphs} graphs of this model, and the rest ran in eager mode"
        for name in (INDUCTOR, OURS)
        if graphs[name] < report.graphs
    ]


@dataclass(frozen=True)
class Run:
    """A loss, and the gradients by name; None where a parameter has none."""

    loss: Tensor
    gradients: dict[str, Tensor | None]


def _run(call: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any) -> Run:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    loss = _loss(call(model, args, kwargs))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return Run(loss.detach(), found)


def _loss(output: Any) -> Tensor:
    """One number to derive by."""
    named = named_loss(output)
    if named is not None:
        return named.mean()
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise TypeError("check() found nothing in the model's output that a loss could be made of")
    if len(tensors) == 1 and tensors[0].numel() == 1:
        return tensors[0].sum()
    return torch.stack([t.to(torch.promote_types(t.dtype, torch.float32)).square().mean() for t in tensors]).sum()


def _draws(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call draws random numbers."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]

    before = states()
    with torch.no_grad():
        model(*args, **kwargs)
    return any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))


class Widening(TorchFunctionMode):
    """Makes casts to any float dtype casts to one: a reference is not coarse because a model calls `logits.float()`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func, args = Tensor.to, (args[0], self.dtype)

        def widened(x: Any) -> Any:
            return self.dtype if isinstance(x, torch.dtype) and x.is_floating_point else x

        args, kwargs = pytree.tree_map(widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _reference(model: nn.Module, args: Any, kwargs: Any, eager: Run) -> tuple[str, Run]:
    """The same model in float64; in float32 where that fails, as on a device without it; else eager's own numbers."""
    for dtype in (torch.float64, torch.float32):
        try:
            casts = Casts(dtype)
            exact = casts(model).to(dtype)
            given = casts((args, kwargs))
            with Widening(dtype):
                found = _run(_call, exact, *given)
            same = all((g is None) == (eager.gradients[name] is None) for name, g in found.gradients.items())
            if found.loss.dtype == dtype and torch.isfinite(found.loss) and same:
                return str(dtype).removeprefix("torch."), found
        except Exception:  # whatever it is, there is no such reference
            continue
    return "eager mode, for want of a finer reference", eager


# -------------------------------------------------------------------------------------------------------------- judging


def _variant(name: str, run: Run, truth: Run, memory: Any) -> Variant:
    errors = [e for _, e in _errors(run, truth)]
    pooled = math.sqrt(sum(e * e for e in errors) / max(1, len(errors)))
    loss = _off(run.loss, truth.loss)
    return Variant(name, run.loss.item(), loss, pooled, max(errors, default=0.0), memory.kept, memory.peak)


def _errors(run: Run, truth: Run) -> Iterator[tuple[str, float]]:
    """By name of a gradient, how far it is from the truth's, relative to that."""
    for name, exact in truth.gradients.items():
        got = run.gradients.get(name)
        if exact is not None and got is not None:
            yield name, _off(got, exact)


def _off(got: Tensor, exact: Tensor) -> float:
    exact = exact.to(torch.float64) if exact.device.type != "mps" else exact.float()
    if not exact.numel():
        return 0.0
    size, off = (float(t.square().mean().sqrt()) for t in (exact, got.to(exact.dtype) - exact))
    return off / size if size else off


def _problems(runs: dict[str, Run], truth: Run, variants: tuple[Variant, ...], failures: list[str]) -> list[str]:
    found = [f"peft_fx failed on a graph, which Inductor then compiled as it was: {f}" for f in failures]
    eager, ours = runs[EAGER], runs[OURS]
    for name, want in eager.gradients.items():
        got = ours.gradients[name]
        if (got is None) != (want is None):
            found.append(f"the gradient of {name} {'is missing' if got is None else 'should not exist'}")
        elif got is not None and want is not None and not torch.equal(got.isfinite(), want.isfinite()):
            found.append(f"the gradient of {name} is infinite or NaN where eager's is not, or the other way round")
    plain, mine = max(variants[:2], key=lambda v: v.error), variants[2]
    floor = FLOOR * max((_eps(g) for g in eager.gradients.values() if g is not None), default=0.0)
    if not mine.error <= GATE * plain.error + (0 if plain.error else floor):
        worst = max(_errors(ours, truth), key=lambda e: e[1])
        times = f"{mine.error / plain.error:.1f} times {plain.name}'s" if plain.error else "where eager's are exact"
        found.append(f"gradients err by {_percent(mine.error)}, {times}; most in {worst[0]}, by {_percent(worst[1])}")
    # one number is off by chance as much as numbers of the model are, of which it is the mean
    if not mine.loss_error <= GATE * max(v.loss_error for v in variants[:2]) + max(
        FLOOR * _eps(eager.loss), plain.error
    ):
        found.append(f"the loss errs by {_percent(mine.loss_error)}, eager's by {_percent(variants[0].loss_error)}")
    if mine.kept > variants[1].kept:
        found.append(f"more is kept for backward than by Inductor: {_mb(mine.kept)} MB over {_mb(variants[1].kept)} MB")
    return found


def _eps(t: Tensor) -> float:
    return float(torch.finfo(t.dtype).eps)


def _verdict(variants: tuple[Variant, ...], problems: list[str], report: Report) -> str:
    _, inductor, ours = variants
    weight = sum("weight" in (s.forward, s.input_grad) for s in report.sites)
    adapters = len(report.sites) + len(report.refusals)
    if not adapters and not report.losses:
        return "There is no adapter in this model: peft_fx leaves it to Inductor."
    done = f"peft_fx puts {weight} of {adapters} adapters in weight form."
    if not adapters:
        done = "There is no adapter in this model; peft_fx computes its loss in chunks."
    exact = "Its results are as exact as without it." if not problems else "Something speaks against it."
    kept, peak = (_change(getattr(ours, k), getattr(inductor, k)) for k in ("kept", "peak"))
    return f"{done} {exact} Against Inductor alone, a step keeps {kept} for backward, and its peak is {peak}."


def _change(now: int, before: int) -> str:
    if not before or abs(now - before) < 0.01 * before:
        return "the same"
    return f"{abs(1 - now / before):.0%} {'less' if now < before else 'more'}"


def _percent(error: float) -> str:
    return f"{error:.2g}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
