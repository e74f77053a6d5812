"""`estimate`: what a training step takes, by variant, from traced graphs alone: no weights, no computing, no GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from peft_fx import budgeting, compat, machines, preparing
from peft_fx.budgeting import OPTIMIZERS
from peft_fx.compat import pytree
from peft_fx.components import ADAPTERS, partitioned, returned
from peft_fx.estimates import Estimate, Row
from peft_fx.explaining import own_inputs, unwrapped
from peft_fx.graphs import copy_graph
from peft_fx.inductor_passes import Finish, PassError
from peft_fx.inputs import roles_in, roles_of
from peft_fx.lengths import Sized, filled
from peft_fx.options import PREFIX, Options, parse
from peft_fx.outputs import loss_only
from peft_fx.passes.analyse.flow import Role, is_tangent
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.keep.policies import POLICIES
from peft_fx.records import Record
from peft_fx.retargeting import Home, Retarget, RetargetedPass, device_of
from peft_fx.step.traced import Halves, step_of
from peft_fx.tracing import (
    IDLE,
    Ghosts,
    answer,
    call_compiled,
    device_traced,
    new_fake_mode,
    nothing_changed,
    telling_of_a_batch,
)

DEPTH = 2  # layers of a deep model that are traced, and one more: a further layer costs what that one did
AGAIN = 1  # more where layers are made again: memory that waits for the next one is all there once there are three
PATTERNS = ("pattern_matcher", "joint_graph_constant_folding")  # Inductor's passes over a joint graph
DEEP = 6  # equal layers, from which on a model is deep


class LeftOut(ValueError):
    """Why a variant cannot be had of a model."""


# -------------------------------------------------------------------------------------------------------- variants


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _without_adapters(model: nn.Module) -> nn.Module:
    """The base, nothing trained: by PEFT's `unload`, which other libraries have too."""
    if hasattr(model, "unload"):
        base: nn.Module = model.unload()
        return base.requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    if any(trained) and not all(trained):
        raise LeftOut("the model has no unload() that takes its adapters off")
    return model.requires_grad_(False)


def _frozen(model: nn.Module) -> nn.Module:
    """No adapters, and a gradient down to the embeddings: what the base costs an adapter in the first layer."""
    model = _without_adapters(model)
    if not hasattr(model, "get_input_embeddings"):
        raise LeftOut("the model has no get_input_embeddings(), down to which a gradient would go")
    first = model.get_input_embeddings()
    weight = next(first.parameters())
    shift = nn.Parameter(torch.zeros((), dtype=weight.dtype, device=weight.device))
    for embeddings in {m for m in model.modules() if next(m.parameters(recurse=False), None) is weight} | {first}:
        embeddings.shift = shift
        embeddings.register_forward_hook(_shifted)
    return model


def _shifted(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + module.shift


def _full(model: nn.Module) -> nn.Module:
    return _without_adapters(model).requires_grad_(True)


def _checkpointed(model: nn.Module) -> nn.Module:
    """Each layer keeps its input alone, and is computed again in backward; without checkpointing's graph break."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise LeftOut("the model has no gradient_checkpointing_enable()")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return preparing.prepare(model)


@dataclass(frozen=True)
class Variant:
    """One way to train: `prepare` makes its model of a copy of the one given; `options` are ours beside those given,
    None for Inductor alone; `trains` is the component of what only gradients of parameters read; `prices` are those of
    a byte kept, in passes over it, at each of which the step is reckoned. What is not compiled keeps all that backward
    reads, and is reckoned with Inductor's kernels: its time is below eager mode's."""

    prepare: Callable[[nn.Module], nn.Module] = _as_it_is
    options: Mapping[str, Any] | None = None
    trains: str = ADAPTERS
    prices: tuple[float, ...] = (0.0,)
    compiles: bool = True


PRICES = (0.0, *(2.0**i for i in (*range(3, 9), 10, 12)))  # to sum K numbers takes as long as 0.005 to 0.02 K passes
VARIANTS: Mapping[str, Variant] = {
    "eager": Variant(compiles=False),
    "inductor": Variant(),
    "peft_fx": Variant(options={}),
    **{f"peft_fx-{keep}": Variant(options={f"{PREFIX}keep": keep}) for keep in POLICIES},
    "peft_fx-loss": Variant(loss_only, {}),
    "inductor-ckpt": Variant(_checkpointed),
    "peft_fx-ckpt": Variant(_checkpointed, {}),
    "peft_fx-ckpt-loss": Variant(lambda model: loss_only(_checkpointed(model)), {}),
    "peft_fx-budget": Variant(options={}, prices=PRICES),
    "peft_fx-loss-budget": Variant(loss_only, {}, prices=PRICES),
    "full": Variant(_full, trains="trained weights"),
    "frozen": Variant(_frozen),
}
WITHIN = tuple(name for name, variant in VARIANTS.items() if len(variant.prices) > 1)  # a budget
EXACT = tuple(  # compiled, no lossy keep, no budget
    name
    for name, variant in VARIANTS.items()
    if variant.compiles and name.removeprefix("peft_fx-") not in POLICIES and name not in WITHIN
)


# -------------------------------------------------------------------------------------------------------- estimate


def estimate(
    model: Any,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    machine: str | None = None,
    device: str | torch.device | None = None,
    optimizer: str = "adamw",
    variants: Sequence[str] | None = None,
    seq_lens: Iterable[int] | None = None,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Estimate:
    """Peak memory and time of a training step of a model, by variant. Nothing is computed; weights need not exist.

    `estimate(model, *args, **kwargs)` traces the call on fake tensors; a model on the meta device gives the same
    figures. `options` are torch.compile's, for the variants by peft_fx; `machine` is a known name or a calibration's
    file; `device`, "cpu" or "cuda", says whose graphs are reckoned with where that is not to be the machine's or where
    the model is, as in `explain`; `optimizer` is one of `OPTIMIZERS`; `variants` some of `VARIANTS` (default: those of
    `EXACT` that the model allows).
    `seq_lens` are numbers of tokens T: inputs [B, T', ...] of the call are taken as [B, T, ...]. Lengths between two
    whose graphs differ in nothing but sizes are not traced. Values that the model returns beside the loss are taken to
    be let go of before backward. A model of more than `DEEP` equal layers is traced at two depths, and a further layer
    costs what the last one did. With `"peft_fx.memory_budget"` among the options the variants of `WITHIN` are those of
    peft_fx within it, the others without. `progress` is called with a line of text for each trace to come: of some of
    the names in each of `by_preparation(variants)`, at some of the lengths.

    Raises ValueError for an unknown option, machine, device, optimiser or variant and for a variant asked for that the
    model does not allow, TypeError for what is no module, and RuntimeError where nothing of the call is trained.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"estimate() knows no optimizer {optimizer!r}; valid ones: {', '.join(OPTIMIZERS)}")
    unknown = [name for name in variants or () if name not in VARIANTS]
    if unknown:
        raise ValueError(f"estimate() knows no variant {unknown[0]!r}; valid ones: {', '.join(VARIANTS)}")
    plain, _ = unwrapped(model)
    if not isinstance(plain, nn.Module):
        raise TypeError("estimate() needs a module: what it trains are the module's parameters")
    kwargs = kwargs if args or kwargs else own_inputs(plain, "estimate")
    options = dict(options or {}) | ({f"{PREFIX}machine": machine} if machine else {})
    asked = parse(options)
    traced_on = device_traced(plain, args, kwargs)
    retarget = Retarget(traced_on, device_of(asked, device, traced_on))
    target = Target(machines.resolve(asked.machine, retarget.device), retarget, OPTIMIZERS[optimizer])
    budget = asked.budget(retarget.device)
    order = list(variants or (*EXACT, *WITHIN * (budget is not None)))
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    lengths = sorted(set(seq_lens)) if seq_lens is not None else [_length(args, kwargs)]
    for prepare, names in by_preparation(order).items():
        named = {Way(n, price): _options(VARIANTS[n], options) for n in names for price in VARIANTS[n].prices}
        try:
            tracer = Tracer(plain, prepare, (args, kwargs), named, target, progress)
            found = filled(lengths, named, tracer.at, tracer.between)
            rows += [tracer.row(way.name, T, traced) for (way, T), traced in found.items()]
        except LeftOut as reason:
            if variants is not None:
                raise LeftOut(f"{', '.join(names)}: {reason}") from reason
            left_out |= dict.fromkeys(names, str(reason))
    rows.sort(key=lambda r: (r.tokens, order.index(r.name)))
    plain, frontier = ([r for r in rows if (r.name in WITHIN) == within] for within in (False, True))
    return _held(Estimate(plain, target.machine.name, left_out, frontier), budget)


def _held(estimate: Estimate, asked: budgeting.Asked | None) -> Estimate:
    """Within the budget, where there is one, of the choices that a variant has; else the quickest of them."""
    if asked is None or not estimate.frontier:
        return estimate.within(math.inf)
    row = estimate.frontier[0]  # weights and states are the same in all
    beside = row.weight_bytes if asked.of == "step" or asked.beside_weights else 0
    return estimate.within(asked.bytes + beside + (row.optimizer_bytes if asked.of == "step" else 0))


@dataclass(frozen=True)
class Target:
    """What a step is reckoned for: speeds, the device that its graphs are on, and bytes of an optimiser's state for one
    of a parameter."""

    machine: Machine
    retarget: Retarget
    states: int


class Way(NamedTuple):
    """A variant, where a byte kept costs as much as so many passes over it."""

    name: str
    price: float


def _options(variant: Variant, given: Mapping[str, Any]) -> Options | None:
    """Ours, if any, without a budget: by its price a choice is the same at both depths of a deep model."""
    return None if variant.options is None else replace(parse({**given, **variant.options}), memory_budget=None)


def by_preparation(names: Iterable[str]) -> dict[Any, list[str]]:
    """The names of variants by what makes their model: those of one are traced together."""
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault(VARIANTS[name].prepare, []).append(name)
    return found


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, torch.Tensor)]


def _length(args: Any, kwargs: Any) -> int:
    """Tokens of a sequence: the second size of the first input that has two."""
    return next((int(t.shape[1]) for t in _tensors(args, kwargs) if t.ndim > 1), 1)


def _at_length(x: torch.Tensor, length: int, wanted: int) -> torch.Tensor:
    if x.ndim < 2 or x.shape[1] != length or length == wanted:
        return x
    return x.new_zeros((x.shape[0], wanted, *x.shape[2:]))


# ------------------------------------------------------------------------------------------------------------ depth


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of equal layers, where all are of one length and that is deep; the first layer of a list may
    differ, as where it alone has position biases."""
    lists: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len(module) > 1:
            lists.append(module)
            inside.update(module.modules())
    equal = all(len({_signature(layer) for layer in list(found)[1:]}) == 1 for found in lists)
    return lists if equal and len({len(found) for found in lists}) == 1 and len(lists[0]) > DEEP else []


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())


def _cut(model: nn.Module, depth: int) -> nn.Module:
    for layers in _stacks(model):
        deep = len(layers)
        del layers[depth:]
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if getattr(config, "num_hidden_layers", None) == deep:
                config.num_hidden_layers = depth
    return model


# ---------------------------------------------------------------------------------------------------------- tracing


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _prepared(model: Any, prepare: Callable[[nn.Module], nn.Module], ghosts: Ghosts) -> Any:
    """A copy on fake tensors, as a variant has it."""
    ghost = ghosts.of(model)
    with ghosts.fake_mode:
        return prepare(ghost)


Traced = list[list[Halves]]  # the graphs of a step, at each depth that is traced


class Tracer:
    """Traces the variants that share one prepared model, and reckons what their steps take."""

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[nn.Module], nn.Module],
        call: tuple[Any, Any],
        named: Mapping[Way, Options | None],
        target: Target,
        progress: Callable[[str], None] | None,
    ):
        self.prepare, self.call, self.named, self.target = prepare, call, named, target
        self.progress = progress
        self.whole = _prepared(model, prepare, Ghosts(new_fake_mode(), "estimate"))
        self.layers = len(stacks[0]) if (stacks := _stacks(self.whole)) else 0
        again = any(way.price for way in named) or any(
            getattr(m, "gradient_checkpointing", False) for m in self.whole.modules()
        )
        depth = DEPTH + AGAIN * again
        self.depths = (depth, depth + 1) if self.layers else (0,)
        # of a deep model the layers that are traced, cut out once: a copy of all of them takes longer
        self.cut = {n: _cut(Ghosts(new_fake_mode(), "estimate").of(model), n) for n in self.depths if n} or {0: model}

    def at(self, T: int, ways: Sequence[Way]) -> dict[Way, Traced]:
        """The graphs of some variants at T tokens."""
        if self.progress is not None:
            self.progress(f"T = {T}: {', '.join(dict.fromkeys(way.name for way in ways))}")
        given = _length(*self.call)
        one = functools.cache(lambda x: _at_length(x, given, T))  # ids that are labels too stay one input
        inputs = pytree.tree_map(lambda x: one(x) if isinstance(x, torch.Tensor) else x, self.call)
        named = {way: self.named[way] for way in ways}
        depths = [_traced(self.cut[n], inputs, self.prepare, named, self.target) for n in self.depths]
        return {way: [found[way] for found in depths] for way in ways}

    def between(self, low: Traced, high: Traced, share: Fraction) -> Traced | None:
        """The graphs at a length so far between two; None where those differ in more than sizes."""
        found: Traced = []
        for ours, theirs in zip(low, high, strict=True):
            graphs = [a.between(b, share) for a, b in zip(ours, theirs, strict=False)]
            if len(ours) != len(theirs) or None in graphs:
                return None
            found.append([graph for graph in graphs if graph is not None])
        return found

    def row(self, name: str, T: int, traced: Traced) -> Row:
        steps = [step_of([halves.part for halves in graphs]) for graphs in traced]
        step = steps[0].extended(steps[1], self.layers - self.depths[0]) if self.layers else steps[0]
        shift = {id(m.shift) for m in self.whole.modules() if hasattr(m, "shift")}
        parameters = [p for p in self.whole.parameters() if id(p) not in shift]
        weights = sum(_bytes(t) for t in (*parameters, *self.whole.buffers()))
        trained = [_bytes(p) for p in parameters if p.requires_grad]
        gradients, largest = sum(trained), max(trained, default=0)
        updated = gradients + 2 * largest  # an update is computed a parameter at a time
        told = {ADAPTERS: VARIANTS[name].trains}
        components = {told.get(k, k): round(n) for k, n in step.components.items() if round(n)}
        kept = sum(components.values())
        transient = max(*map(round, step.peaks), updated) - gradients - kept
        machine, states = self.target.machine, self.target.states
        seconds = step.seconds + (machine.one_pass((3 + 2 * states) * gradients) if gradients else 0.0)
        return Row(name, T, weights, gradients, states * gradients, kept, transient, seconds, components)


def _traced(
    model: Any,
    inputs: tuple[Any, Any],
    prepare: Callable[[nn.Module], nn.Module],
    named: Mapping[Way, Options | None],
    target: Target,
) -> dict[Way, list[Halves]]:
    ghosts = Ghosts(new_fake_mode(), "estimate")
    ghost = _prepared(model, prepare, ghosts)
    names = {p: name for name, p in ghost.named_parameters()}
    args, kwargs = ghosts(inputs)
    given = {id(copied) for copied in ghosts.known.values()}
    parts: list[dict[Way, Halves]] = []

    def capture(gm: GraphModule, example_inputs: list[Any]) -> Any:
        split = Split(gm, roles_of(gm, example_inputs, names), named, target, _handed_on(example_inputs, given))
        patches = {
            "joint_custom_pre_pass": split.joint,
            "custom_partitioner_fn": split,
            **IDLE,
            **dict.fromkeys(PATTERNS, False),  # each variant has its own
        }
        with compat.functorch_config.patch(enable_autograd_cache=False):
            called = compat.compile_fx(gm, example_inputs, inner_compile=answer, config_patches=patches)
        parts.append(split.parts)
        return called

    told = telling_of_a_batch("estimate", ghost, args, kwargs)
    with told, compat.forgetting(), nothing_changed(), ghosts.fake_mode:
        # not dynamic: Dynamo remembers that a size has changed
        call_compiled(ghost, args, kwargs, capture, "estimate", dynamic=False)
    if not any(parts):
        raise RuntimeError("nothing of this call is trained: no graph of it has a backward")
    return {way: [p[way] for p in parts if way in p] for way in named}


def _handed_on(inputs: Iterable[Any], given: Set[int]) -> dict[int, Role]:
    """The inputs of a graph that an earlier one of the step has made, by their places; `given` are the ids of what was
    there before the step."""
    tensors = {i: x for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and id(x) not in given}
    return {i: Role("", False, False) for i, x in tensors.items() if x.requires_grad and not x.is_leaf}


def _all_that_is_read(
    joint: GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int, **kwargs: Any
) -> tuple[GraphModule, GraphModule]:
    """Keeps what backward reads of forward, and makes nothing again, as autograd does."""
    forward, backward = compat.default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs)
    return forward, backward


def copied(gm: GraphModule, graph: Graph | None = None) -> GraphModule:
    """A graph, by default the module's own, once more: to be read, and never called."""
    lazy: GraphModule = compat.LazyGraphModule(gm, copy_graph(graph or gm.graph))
    return lazy


class Joint(compat.CustomGraphPass):  # type: ignore[misc]
    """Keeps a copy of the joint graph, as Dynamo's graph came out, with the attention of the device that is told of."""

    graph: Graph | None = None

    def __init__(self, retarget: Retarget):
        self.retarget = retarget

    def __call__(self, graph: Graph) -> None:
        self.retarget.exchange(graph, compat.V.fake_mode)
        self.graph = copy_graph(graph)

    def uuid(self) -> Any:
        return None


class Split(compat.CustomPartitionerFn):  # type: ignore[misc]
    """Partitions the joint graph as each variant would, and walks what comes out."""

    def __init__(
        self,
        gm: GraphModule,
        roles: Any,
        named: Mapping[Way, Options | None],
        target: Target,
        handed_on: dict[int, Role],
    ):
        self.gm, self.roles, self.named, self.handed_on = gm, roles, named, handed_on
        self.machine, self.retarget = target.machine, target.retarget
        self.joint, self.parts = Joint(self.retarget), dict[Way, Halves]()
        self.patterns = {name: getattr(compat.inductor_config, name) for name in PATTERNS}

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        for options, ways in self._alike():
            try:
                self.parts |= self._split(gm, joint_inputs, options, ways, kwargs)
            except PassError:  # then the backend leaves the graph to Inductor
                self.parts |= self._split(gm, joint_inputs, None, ways, kwargs)
        forward, backward = self.parts[ways[0]].graphs
        return copied(forward), copied(backward)

    def _alike(self) -> Iterator[tuple[Options | None, list[Way]]]:
        """The variants whose joint graphs are the same, the lowest price first."""
        given = [(options, VARIANTS[way.name].compiles) for way, options in self.named.items()]
        for alike in (x for i, x in enumerate(given) if x not in given[:i]):
            ways = [way for way, other in zip(self.named, given, strict=True) if other == alike]
            yield alike[0], sorted(ways, key=lambda way: way.price)

    def _split(
        self, gm: GraphModule, joint_inputs: Sequence[object], options: Options | None, ways: Sequence[Way], kwargs: Any
    ) -> dict[Way, Halves]:
        """The halves at each price: the first split is as the partitioner makes it, which is then told what to keep."""
        assert self.joint.graph is not None
        joint = copied(gm, self.joint.graph)
        ours = None
        if options is not None:
            record = Record(self.gm, [], self.roles, options, True, device=self.retarget.device)
            ours = RetargetedPass(record, self.retarget)
        after = None if ours is None else Finish(ours)
        kept: dict[float, set[str]] = {}
        compiles = VARIANTS[ways[0].name].compiles

        def choose(price: float, graph: Graph, alone: Callable[[float], list[Node]], share: float) -> list[Node]:
            values = alone(share)
            if not kept:
                kept.update(self._kept(graph, values, {p for way in ways for p in VARIANTS[way.name].prices}))
            return [n for n in graph.nodes if n.name in kept[price]] if price else values

        found: dict[Way, Halves] = {}
        with compat.inductor_config.patch(joint_custom_pre_pass=ours, joint_custom_post_pass=after, **self.patterns):
            joint = compat.joint_graph_passes(joint, skip_invoke_subgraph=True)
            self.retarget.exchange(joint.graph, compat.V.fake_mode)  # what patterns have made
            for way in ways:
                same = next((w for w in found if kept[w.price] == kept[way.price]), None)
                with compat.choosing(functools.partial(choose, way.price)):
                    found[way] = found[same] if same else self._halves(copied(joint), joint_inputs, kwargs, compiles)
        return found

    def _kept(self, graph: Graph, values: list[Node], prices: Iterable[float]) -> dict[float, set[str]]:
        """The names of what the partitioner is to keep at each price, where it would keep those values by itself."""
        hint, dear = compat.hint_for(compat.V.fake_mode), sorted(filter(None, prices))
        prices = [p / self.machine.bandwidth for p in dear]
        chosen = budgeting.along(graph, values, prices, self.machine, hint) if dear else []
        return {p: {n.name for n in nodes} for p, nodes in zip([0.0, *dear], [values, *chosen], strict=True)}

    def _halves(
        self, joint: GraphModule, joint_inputs: Sequence[object], kwargs: dict[str, Any], compiles: bool
    ) -> Halves:
        handed_on = {n.name for n in roles_in(joint.graph, self.handed_on)}
        partition = compat.min_cut_rematerialization_partition if compiles else _all_that_is_read
        forward, backward, saved = partitioned(joint, joint_inputs, self.roles, kwargs, handed_on, partition)
        (results,) = forward.graph.find_nodes(op="output")
        places = {n.name: i for i, n in enumerate(results.args[0]) if isinstance(n, Node)}
        if compiles and self.machine.is_cpu == (self.retarget.device.type == "cpu"):
            self._lowered(forward, backward)
        kept = {places[name]: component for name, (component, _) in saved.items()}
        theirs = returned(forward, kwargs["num_fwd_outputs"]) | handed_on
        lent = {n.name for n in backward.graph.find_nodes(op="placeholder") if is_tangent(n) or n.name in theirs}
        hint = compat.hint_for(compat.V.fake_mode)
        sized = Sized.of((forward, backward), hint)
        halves = Halves((forward, backward), kept, handed_on, lent, self.machine, sized)
        return replace(halves, part=halves.reckoned(hint))

    def _lowered(self, *graphs: GraphModule) -> None:
        """What Inductor does with products and sums on the device, and with what can be computed in place."""
        patterns_on_it = {"post_grad_custom_post_pass": Home(self.retarget)}
        for gm in graphs:  # one by one: what one hands the other would be home too early
            with compat.inductor_config.patch(patterns_on_it), self.retarget.there(gm.graph):
                compat.post_grad_passes(gm, is_inference=False)

    def uuid(self) -> Any:
        return None
