"""What breaks graphs in PEFT's adapters and in models of transformers, and what is traced in its place: one table.

A layer is cured by making it an instance of a subclass of its own class. What the subclass overrides acts only while
Dynamo traces: in eager mode PEFT's own code runs, so nothing changes there, neither a bit nor a random draw. No class
of a third party is changed, and PEFT is imported only where a layer of its own needs that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fx import compat

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


def subclass(cured: type, original: type) -> Any:
    """One for each pair. Named like the original: PEFT looks at names of classes, and so do readers of a model."""
    body = {"_original": original, "__module__": original.__module__, "__qualname__": original.__qualname__}
    if (cured, original) not in _subclasses:
        _subclasses[cured, original] = type(original.__name__, (cured, original), body)
    return _subclasses[cured, original]


def _new(cured: type, original: type) -> Any:
    made = subclass(cured, original)
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


@dataclass(frozen=True)
class Break:
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
    Break(
        ("peft.tuners.lora.dora.DoraLinearLayer",),
        "str.startswith on the module of the weight's class, in dequantize_module_weight",
        "a weight that is not quantized is read as it is",
        Dora,
    ),
    Break(
        ("peft.tuners.lora.dora.DoraEmbeddingLayer",),
        "a parameter made of the transposed weight",
        "the transposed weight stays a tensor",
        Dora,
    ),
    Break(
        _COIN,
        "torch.rand(1) > module_dropout",
        "each step drops other adapters, and one that is dropped has no gradient: that is no single graph",
        applies=lambda layer: any(layer.module_dropout.values()),
    ),
    Break(
        _COIN,
        "torch.rand(1) > module_dropout, which is 0",
        "the adapter always takes part",
        ModuleDropout,
    ),
    Break(
        ("peft.tuners.lora.variants.VeloraLinearVariant",),
        "if norm == 0, in _normalize_projection",
        "torch.where(norm == 0, …)",
        Velora,
        applies=lambda layer: set(layer.lora_velora_init_type.values()) != {"random"},  # drawn once and for all
    ),
    Break(
        ("peft.tuners.lora.variants.ALoraLinearVariant",),
        "a boolean mask as an index",
        "a product with the mask",
        Alora,
    ),
    Break(
        ("peft.tuners.poly.router.PolyRouter",),
        "if task_ids.max().item() >= n_tasks",
        "an assertion in the graph",
        PolyRouter,
    ),
    Break(
        ("peft.tuners.lora.layer.ParamWrapper",),
        "parametrize.register_parametrization in forward",
        "the sum of an 8-bit parameter and its delta is taken in a dtype that only PEFT's code knows",
        applies=lambda layer: layer.get_param().dtype.itemsize < 2,
    ),
    Break(
        ("peft.tuners.lora.layer.ParamWrapper",),
        "parametrize.register_parametrization in forward",
        "torch.func.functional_call with the adapted parameter",
        ParamWrapper,
    ),
    Break(("peft.tuners.shira.layer.Linear",), "torch.sparse_coo_tensor", "the delta as a dense matrix", Shira),
    Break(("peft.tuners.vblora.layer.Linear",), "if logits.isinf().any()", "an assertion in the graph", VBLoRA),
    Break(
        ("peft.tuners.frod.layer.Linear",),
        "Tensor.tolist and torch.sparse_coo_tensor",
        "the sparse factor as a dense matrix, its size that of the diagonal one",
        Frod,
    ),
    Break(
        ("peft.tuners.waveft.layer.WaveFTLayer",),
        "a boolean mask as an index, and subscripted types in waverec2d",
        "no mask, as it is always true, and the transform written out",
        WaveFT,
    ),
    Break(
        ("peft.tuners.lora.variants.MontecloraLinearVariant",),
        "if isnan(sample).any(), and samples taken by a counter from a list, which compiles anew in each step",
        "Python draws the samples: a graph that drew its own would train on others",
    ),
    Break(
        ("transformers.modeling_utils.PreTrainedModel",),
        "logger.warning_once in loss_function, where the class's name tells of no loss, as GPT2LMHeadModel's",
        "ForCausalLMLoss, as transformers takes it there, without the warning",
        UnnamedLoss,
        applies=lambda model: getattr(model, "loss_type", "") is None and model.base_model is not model,
    ),
)
