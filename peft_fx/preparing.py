"""`prepare`: PEFT's adapters without the graph breaks that have nothing to do with what they compute, in the models of
transformers that have them.

A layer is cured by making it an instance of a subclass of its own class. What the subclass overrides acts only while
Dynamo traces: in eager mode PEFT's own code runs, so nothing changes there, neither a bit nor a random draw. No class
of a third party is changed, PEFT is imported only where a layer of its own needs that, and `restore` gives each layer
its class back.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fx import compat
from peft_fx.outputs import needs_module, with_all_outputs

log = logging.getLogger("peft_fx")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Cure:
    """One module that `prepare` cures: its name, what breaks the graph there, and what is traced instead."""

    name: str
    broke: str
    done: str


def prepare(model: Model) -> Model:
    """Cures the graph breaks known in PEFT's adapters, and in models of transformers around them and their losses, in
    place, and returns the model; `cures` lists what was done.

    Parameters, buffers and the keys of the state dict stay as they are, copies of the model are prepared too, and a
    second call finds nothing left to do; call it again after adding an adapter. Eager mode runs PEFT's code as before.
    What torch.compile traces computes the same, with these differences:

    - LoHa and LoKr do not draw the random number that they would compare with a module_dropout of 0, so what is drawn
      after it is another draw. (In eager mode they skip the adapter where it is exactly 0, once in 2²⁴ draws.)
    - FRoD multiplies by its sparse factor as a dense matrix, as PEFT does in half precision: the sum is rounded in
      another order.
    - aLoRA's adapter is computed for all tokens and multiplied by a mask, so that its sums over tokens are rounded in
      another order, and its dropout draws for more tokens.
    - VB-LoRA's check of its logits and Poly's of its tasks are assertions in the graph; on a GPU they fail as those do,
      for the whole process.

    The hook by which gradient checkpointing has the embeddings' output require a gradient is left out too, where no
    checkpoint is reentrant: only those need it.

    VeLoRA's init_type "batch_average_once" compiles twice, for its first step and for the others.

    Writes one line of level INFO to the logger "peft_fx". Raises TypeError for what is not a torch.nn.Module, and for
    what torch.compile returned.
    """
    counts: Counter[str] = Counter()
    left = []
    for name, owner, row in list(_matches(model, "prepare")):
        if row.cured is None:
            left.append(f"left {name} as it is ({row.broke}: {row.done})")
        else:
            counts[f"{type(owner).__module__}.{type(owner).__qualname__}"] += 1
            owner.__class__ = _subclass(row.cured, type(owner))
    for _, module, key in _requiring_hooks(model):
        module._forward_hooks[key] = EagerHook(module._forward_hooks[key])
        counts["hook of gradient checkpointing"] += 1
    said = [f"cured {n} × {kind}" for kind, n in counts.items()] + left
    log.info("prepare: %s", "; ".join(said) or "nothing to cure")
    return model


def restore(model: Model) -> Model:
    """Undoes `prepare` and `loss_only`, in place, and returns the model. Raises TypeError for what is not a
    torch.nn.Module, and for what torch.compile returned."""
    for _, _, owner in _owners(model, "restore"):
        if isinstance(owner, Cured):
            owner.__class__ = owner._original
    for _, module, key, hook in _eager_hooks(model):
        module._forward_hooks[key] = hook.hook
    with_all_outputs(model)
    return model


def cures(model: nn.Module) -> list[Cure]:
    """What `prepare` did to a model, module by module. Raises TypeError for what is not a torch.nn.Module, and for what
    torch.compile returned."""
    found: dict[Cure, None] = {}
    for name, _, owner in _owners(model, "cures"):
        if isinstance(owner, Cured):
            row = next(r for r in TABLE if r.cured in type(owner).__bases__ and r.matches(owner._original))
            found[Cure(name, row.broke, row.done)] = None  # once for a layer with several adapters
    return [*found, *(Cure(name, *EagerHook.broke_and_done) for name, *_ in _eager_hooks(model))]


def curable(model: nn.Module) -> list[str]:
    """The names of the modules that `prepare` would cure."""
    broken = [name for name, _, row in _matches(model, "prepare") if row.cured is not None]
    return list(dict.fromkeys([*broken, *(name for name, *_ in _requiring_hooks(model))]))


def _matches(model: nn.Module, caller: str) -> Iterator[tuple[str, Any, Row]]:
    """What in a model breaks graphs and is not cured yet, with the first row of the table that is about it."""
    for name, layer, owner in _owners(model, caller):
        row = next((row for row in TABLE if row.matches(type(owner)) and row.applies(layer)), None)
        if row is not None and not isinstance(owner, Cured):
            yield name, owner, row


def _owners(model: nn.Module, caller: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """Whatever may hold code of PEFT's, after the name and the layer that it belongs to: each module, and the objects
    that vary a LoRA layer."""
    needs_module(model, caller)
    for name, module in model.named_modules():
        yield name, module, module
        for variant in getattr(module, "lora_variant", {}).values():
            yield name, module, variant


# --------------------------------------------------------------------------------------------------------------- hooks


class EagerHook:
    """A forward hook that is not traced."""

    names = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers' and PEFT's
    broke_and_done = (
        "output.requires_grad_(), the hook of gradient checkpointing",
        "no hook: a checkpoint that is not reentrant needs none",
    )

    def __init__(self, hook: Callable[..., Any]):
        self.hook = hook

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if torch.compiler.is_compiling() else self.hook(module, args, output)


def _requiring_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Hooks that make the embeddings' output require a gradient, where no checkpoint needs that. A reentrant one does:
    a graph break inside of it would leave its layers without gradients."""
    checkpoints = [f for m in model.modules() if (f := getattr(m, "_gradient_checkpointing_func", None)) is not None]
    if any(getattr(f, "keywords", {}).get("use_reentrant") is not False for f in checkpoints):
        return
    for name, module in model.named_modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in EagerHook.names:
                yield name, module, key


def _eager_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, EagerHook]]:
    for name, module in model.named_modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, EagerHook):
                yield name, module, key, hook


# ---------------------------------------------------------------------------------------------------------- subclasses


# the base weights that PEFT's dequantize_module_weight hands back as they are
PLAIN = (nn.Parameter, Tensor, compat.FakeTensor)


class View:
    """An object as one of its methods is to see it: some attributes are replaced, the others are its own."""

    def __init__(self, owner: Any, **replaced: Any):
        self._owner = owner
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name)


class Cured:
    """What is traced in place of a class's own methods; `_original` is that class, and the next base of the subclass
    made of the two."""

    _original: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickling: the subclass is found by no name, its bases are."""
        state = super().__reduce_ex__(protocol)[2:]
        return _new, type(self).__bases__, *state


_subclasses: dict[tuple[type, type], Any] = {}


def _subclass(cured: type, original: type) -> Any:
    """One for each pair. Named like the original: PEFT looks at names of classes, and so do readers of a model."""
    body = {"_original": original, "__module__": original.__module__, "__qualname__": original.__qualname__}
    if (cured, original) not in _subclasses:
        _subclasses[cured, original] = type(original.__name__, (cured, original), body)
    return _subclasses[cured, original]


def _new(cured: type, original: type) -> Any:
    made = _subclass(cured, original)
    return made.__new__(made)


class Dora(Cured):
    def forward(self: Any, x: Tensor, *, base_layer: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and type(getattr(base_layer, "weight", None)) in PLAIN:
            # transposed, PEFT makes it a parameter of its own, which no gradient comes back from
            weight = base_layer.weight.detach() if self.fan_in_fan_out else base_layer.weight
            base_layer = View(base_layer, weight=weight, W_q=None, dequantize=lambda: weight)  # W_q asks for dequantize
        return self._original.forward(self, x, base_layer=base_layer, **kwargs)


class ModuleDropout(Cured):
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self
        if torch.compiler.is_compiling() and not any(self.module_dropout.values()):
            layer = View(self, training=False)  # for forward itself; what it calls sees the layer's own mode
        return self._original.forward(layer, x, *args, **kwargs)


class Shira(Cured):
    def get_delta_weight(self: Any, adapter: str) -> Any:
        if not torch.compiler.is_compiling():
            return self._original.get_delta_weight(self, adapter)
        values = self.shira_weight[adapter] * self.scaling[adapter]
        return _dense(self.shira_indices[adapter], values, (self.out_features, self.in_features))


class VBLoRA(Cured):
    def _get_lora_matrices(self: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
        layer = self
        if torch.compiler.is_compiling() and self.training:
            infinite = self.vblora_logits_A[adapter][0, 0].isinf().any()
            compat.assert_async(~infinite, "infinity in VB-LoRA's logits: was it resumed from save_only_topk_weights?")
            layer = View(self, training=False)  # which is looked at for this check alone
        return self._original._get_lora_matrices(layer, adapter, *args, **kwargs)


class Frod(Cured):
    def _get_frod_tensors(self: Any, adapter: str, *, device: torch.device, dtype: torch.dtype) -> Any:
        if not torch.compiler.is_compiling():
            return self._original._get_frod_tensors(self, adapter, device=device, dtype=dtype)
        held = self.frod_U, self.frod_V, self.frod_lambda_s_values, self.frod_lambda_l
        U, V, values, diagonal = (tensors[adapter].to(device, dtype) for tensors in held)
        S = _dense(self.frod_s_indices[adapter], values, (diagonal.numel(), diagonal.numel()))
        return U, V, S, diagonal

    def _sparse_activation_mm(self: Any, z: Tensor, S: Tensor) -> Any:
        return z @ S.t() if torch.compiler.is_compiling() else self._original._sparse_activation_mm(self, z, S)


class WaveFT(Cured):
    def get_delta_weight(self: Any, adapter: str) -> Any:
        if not torch.compiler.is_compiling() or not self.waveft_use_idwt[adapter]:
            return self._original.get_delta_weight(self, adapter)
        from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
        from peft.tuners.waveft.waverec2d import _construct_2d_filt, _get_filter_tensors

        family, spectrum = self.waveft_wavelet_family[adapter], self.waveft_spectrum[adapter]
        size = self.out_features, self.in_features
        padded = [n + extra + (n + extra) % 2 for n, extra in zip(size, WAVELET_REDUCTIONS[family], strict=True)]
        # never outside of the padded matrix, where PEFT looks for indices that are
        offset = [(m - n) // 2 for m, n in zip(padded, size, strict=True)]
        indices = [i + k for i, k in zip(self.waveft_indices[adapter].to(spectrum.device), offset, strict=True)]
        bands = [b for rows in _dense(indices, spectrum, padded).chunk(2) for b in rows.chunk(2, dim=1)]
        # waverec2d for a single level, its two crops in one
        bank = _get_filter_tensors(family, flip=False, device=spectrum.device, dtype=spectrum.dtype)
        kernels = _construct_2d_filt(lo=bank.rec_lo, hi=bank.rec_hi)
        delta = F.conv_transpose2d(torch.stack(bands)[None], kernels, stride=2)[0, 0]
        for dim, n in enumerate(size):
            delta = delta.narrow(dim, (delta.shape[dim] - n) // 2, n)
        return delta * self.waveft_scaling[adapter]


class Velora(Cured):
    def forward(self: Any, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            x = module.lora_dropout[active_adapter](x)
            _update_projection(module, active_adapter, x)
            # both are done: no projection to initialize, no dropout
            module = View(module, lora_velora_initialized={}, lora_dropout={active_adapter: lambda x: x})
        return self._original.forward(module, active_adapter, x, result, **kwargs)


def _update_projection(module: Any, adapter: str, x: Tensor) -> None:
    """VeloraLinearVariant._maybe_update_embed, but what depends on the norm is chosen by torch.where."""
    from peft.tuners.lora.velora import _reshape_to_grouped_subtokens

    kind = module.lora_velora_init_type[adapter]
    if kind == "random" or (kind == "batch_average_once" and module.lora_velora_initialized[adapter]):
        return
    with torch.no_grad():
        tokens = _reshape_to_grouped_subtokens(x, module.lora_velora_num_groups[adapter])
        mean = tokens.reshape(-1, tokens.shape[-1]).mean(dim=0).float()
        mean = torch.where(torch.linalg.vector_norm(mean) == 0, torch.ones_like(mean), mean)
        embed = mean / torch.linalg.vector_norm(mean)
    module.lora_velora_embed[adapter] = embed.to(module.lora_velora_embed[adapter])
    module.lora_velora_initialized[adapter] = True


class Alora(Cured):
    def forward(self: Any, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._original.forward(module, active_adapter, x, result, **kwargs)
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        tokens = result.shape[1] if result.ndim == 3 else 1
        offsets = kwargs.get("alora_offsets") or [None] * result.shape[0]
        first = [tokens - min(int(o or 0), tokens) for o in offsets]  # without an invocation, none
        adapted = torch.arange(tokens, device=result.device) >= torch.tensor(first, device=result.device)[:, None]
        delta = B(A(module.lora_dropout[active_adapter](x.to(A.weight.dtype)))) * module.scaling[active_adapter]
        delta = delta * adapted.view(*result.shape[:-1], 1).to(delta.dtype)
        return (result + delta).to(result.dtype)


class PolyRouter(Cured):
    def forward(self: Any, task_ids: Any, input_ids: Tensor) -> Any:
        if torch.compiler.is_compiling() and task_ids is not None:
            known = task_ids.max() < self.n_tasks
            compat.assert_async(known, f"a task_id is beyond Poly's n_tasks={self.n_tasks}")
            task_ids = View(
                task_ids, max=lambda: View(known, item=lambda: 0)
            )  # which is looked at for this check alone
        return self._original.forward(self, task_ids, input_ids)


class ParamWrapper(Cured):
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        adapters = [a for a in self.active_adapters if a in self.lora_A]
        if not torch.compiler.is_compiling() or self.disable_adapters or self.merged or not adapters:
            return self._original.forward(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        W = self.get_param()
        if len(adapters) == 1 and self.num_experts > 1:
            left, right, scaling = self.get_delta_factors(adapters[0])
            with torch.autocast(W.device.type, enabled=False):
                W = torch.baddbmm(W, left, right, alpha=scaling)
        else:
            W = W + sum([self.get_delta_weight(a) for a in adapters[1:]], self.get_delta_weight(adapters[0]))
        name, inner = self.parameter_name, self.base_layer
        while inner is not self.get_base_layer():  # wrappers of several parameters of one module are nested
            name, inner = f"base_layer.{name}", inner.base_layer
        return torch.func.functional_call(self.base_layer, {name: W}, (x, *args), kwargs, tie_weights=False)


class UnnamedLoss(Cured):
    @property
    def loss_function(self: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._original.loss_function.fget(self)
        if hasattr(self, "_loss_function"):  # a user's own
            return self._loss_function
        from transformers.loss.loss_utils import LOSS_MAPPING

        return LOSS_MAPPING["ForCausalLM"]

    @loss_function.setter
    def loss_function(self: Any, chosen: Any) -> None:
        self._original.loss_function.fset(self, chosen)


def _dense(indices: Any, values: Tensor, size: Any) -> Tensor:
    rows, columns = indices
    return values.new_zeros(size).index_put((rows.to(values.device), columns.to(values.device)), values, True)


# --------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Row:
    """One break: the classes whose methods break, what they break on, and what `cured` has traced instead. Without
    `cured` they are left as they are, and `done` says why."""

    classes: tuple[str, ...]
    broke: str
    done: str
    cured: type[Cured] | None = None
    applies: Callable[[Any], bool] = lambda layer: True

    def matches(self, cls: type) -> bool:
        """Whether a class is one of those named, or derives from it and keeps the methods that `cured` replaces."""
        known = [c for c in cls.__mro__ if f"{c.__module__}.{c.__qualname__}" in self.classes]
        methods = [name for name in vars(self.cured or object) if not name.startswith("__")]
        return bool(known) and all(next(c for c in cls.__mro__ if name in vars(c)) in known for name in methods)


_COIN = ("peft.tuners.loha.layer.LoHaLayer", "peft.tuners.lokr.layer.LoKrLayer")

TABLE = (
    Row(
        ("peft.tuners.lora.dora.DoraLinearLayer",),
        "str.startswith on the module of the weight's class, in dequantize_module_weight",
        "a weight that is not quantized is read as it is",
        Dora,
    ),
    Row(
        ("peft.tuners.lora.dora.DoraEmbeddingLayer",),
        "a parameter made of the transposed weight",
        "the transposed weight stays a tensor",
        Dora,
    ),
    Row(
        _COIN,
        "torch.rand(1) > module_dropout",
        "each step drops other adapters, and one that is dropped has no gradient: that is no single graph",
        applies=lambda layer: any(layer.module_dropout.values()),
    ),
    Row(
        _COIN,
        "torch.rand(1) > module_dropout, which is 0",
        "the adapter always takes part",
        ModuleDropout,
    ),
    Row(
        ("peft.tuners.lora.variants.VeloraLinearVariant",),
        "if norm == 0, in _normalize_projection",
        "torch.where(norm == 0, …)",
        Velora,
        applies=lambda layer: set(layer.lora_velora_init_type.values()) != {"random"},  # drawn once and for all
    ),
    Row(
        ("peft.tuners.lora.variants.ALoraLinearVariant",),
        "a boolean mask as an index",
        "a product with the mask",
        Alora,
    ),
    Row(
        ("peft.tuners.poly.router.PolyRouter",),
        "if task_ids.max().item() >= n_tasks",
        "an assertion in the graph",
        PolyRouter,
    ),
    Row(
        ("peft.tuners.lora.layer.ParamWrapper",),
        "parametrize.register_parametrization in forward",
        "the sum of an 8-bit parameter and its delta is taken in a dtype that only PEFT's code knows",
        applies=lambda layer: layer.get_param().dtype.itemsize < 2,
    ),
    Row(
        ("peft.tuners.lora.layer.ParamWrapper",),
        "parametrize.register_parametrization in forward",
        "torch.func.functional_call with the adapted parameter",
        ParamWrapper,
    ),
    Row(("peft.tuners.shira.layer.Linear",), "torch.sparse_coo_tensor", "the delta as a dense matrix", Shira),
    Row(("peft.tuners.vblora.layer.Linear",), "if logits.isinf().any()", "an assertion in the graph", VBLoRA),
    Row(
        ("peft.tuners.frod.layer.Linear",),
        "Tensor.tolist and torch.sparse_coo_tensor",
        "the sparse factor as a dense matrix, its size that of the diagonal one",
        Frod,
    ),
    Row(
        ("peft.tuners.waveft.layer.WaveFTLayer",),
        "a boolean mask as an index, and subscripted types in waverec2d",
        "no mask, as it is always true, and the transform written out",
        WaveFT,
    ),
    Row(
        ("peft.tuners.lora.variants.MontecloraLinearVariant",),
        "if isnan(sample).any(), and samples taken by a counter from a list, which compiles anew in each step",
        "Python draws the samples: a graph that drew its own would train on others",
    ),
    Row(
        ("transformers.modeling_utils.PreTrainedModel",),
        "logger.warning_once in loss_function, where the class's name tells of no loss, as GPT2LMHeadModel's",
        "ForCausalLMLoss, as transformers takes it there, without the warning",
        UnnamedLoss,
        applies=lambda model: getattr(model, "loss_type", "") is None and model.base_model is not model,
    ),
)
