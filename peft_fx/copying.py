"""Copies of whatever a call reaches: models, their hooks, their inputs.

`copy.deepcopy` copies what agrees to be copied, and tensors that are leaves. Here every object is: what refuses is
copied attribute by attribute, and what has none, as a lock or an open file, is shared. One object has one copy, so ties
stay ties; a view of a tensor becomes a view of that tensor's copy, and tensors that share memory go on sharing it.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import gc
import weakref
from abc import ABC, abstractmethod
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peft_fx import compat

NUMBERS = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented))
SHARED = (
    *NUMBERS,
    *(type, CodeType, ModuleType, property, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch.UntypedStorage, torch.TypedStorage),
)
COMPILED, DISABLED = "_torchdynamo_orig_callable", "_torchdynamo_disable"  # what Dynamo puts on the functions it makes
_UNKNOWN = object()


class Copies(ABC):
    """Copies by the object that they are of. Called with an object it gives the one copy of that."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}  # copy.deepcopy's memo: by id, and under its own what must live as long
        self.known[id(self.known)] = []
        self.memory: dict[tuple[int, torch.dtype], Tensor] = {}

    @abstractmethod
    def all_of(self, x: Tensor) -> Tensor:
        """What stands for all of the memory that a tensor lies in, as a tensor of one dimension."""

    @abstractmethod
    def special(self, x: Tensor) -> Tensor:
        """What stands for a tensor of a class or a layout of its own."""

    def __call__(self, x: Any) -> Any:
        kind = type(x)
        if issubclass(kind, SHARED) or kind is object:
            return x
        found = self.known.get(id(x), _UNKNOWN)
        if found is not _UNKNOWN:
            return found
        try:
            return self._note(x, self._copied(x, kind))
        except Exception:  # whatever it is that this class will not have, or what is too deep to be walked
            return self._note(x, x)

    def _note(self, x: Any, copied: Any) -> Any:
        self.known[id(x)] = copied
        self.known[id(self.known)].append(x)
        return copied

    def _copied(self, x: Any, kind: type) -> Any:
        if issubclass(kind, Tensor):
            return self._tensor(x)
        if issubclass(kind, compat.OptimizedModule):
            module = self(x._orig_mod)  # as it was before it was compiled
            return kind(module, x.dynamo_ctx) if isinstance(x.dynamo_ctx, compat.DisableContext) else module
        if issubclass(kind, nn.Module):
            return self._by_attributes(x)  # whatever its own way to be copied is: some refuse
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self, x)
        if _is_torchs(kind, "torch._") and not leads_to_tensors(x):
            return x
        if hasattr(kind, "__del__"):
            return self._by_attributes(x)
        own = hasattr(kind, "__deepcopy__") and (_is_torchs(kind) or not leads_to_tensors(x))
        for way in (*[self._by_its_own] * own, self._by_pickling):
            try:
                return way(x)
            except Exception:  # it refuses, or a part of it does
                self.known.pop(id(x), None)
        return self._by_attributes(x)

    # ---------------------------------------------------------------------------------------------------- tensors

    def _tensor(self, x: Tensor) -> Tensor:
        if not _is_plain(x):
            return self.special(x)
        base = x._base
        if base is not None and _is_plain(base) and base.dtype == x.dtype:
            with torch.set_grad_enabled(not x.is_leaf):
                copied = self(base).as_strided(x.shape, x.stride(), x.storage_offset())
        else:
            with torch.no_grad():
                copied = self._memory_of(x).as_strided(x.shape, x.stride(), x.storage_offset()).detach()
        if isinstance(x, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=x.requires_grad)
        elif copied.grad_fn is None:
            copied.requires_grad_(x.requires_grad)
            if not x.is_leaf:  # the result of some computation: of one that is not done again
                with torch.enable_grad():
                    copied = copied.clone()
        self._note(x, copied)
        for name, value in vars(x).items():
            setattr(copied, name, self(value))
        return copied

    def _memory_of(self, x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata, x.dtype
        if key not in self.memory:
            self.memory[key] = self.all_of(x)
            self.known[id(self.known)].append(x)
        return self.memory[key]

    # --------------------------------------------------------------------------------------------------- any object

    def _by_its_own(self, x: Any) -> Any:
        return copy.deepcopy(x, self.known)

    def _by_pickling(self, x: Any) -> Any:
        kind: Any = type(x)
        reduced = copyreg.dispatch_table.get(kind, lambda x: kind.__reduce_ex__(x, 4))(x)
        if isinstance(reduced, str):  # the name of something that there is one of
            return x
        return copy._reconstruct(x, self.known, *reduced, deepcopy=lambda part, known: self(part))  # type: ignore[attr-defined]

    def _by_attributes(self, x: Any) -> Any:
        kind: Any = type(x)
        copied = self._note(x, object.__new__(_closing_nothing(kind) if hasattr(kind, "__del__") else kind))
        attributes = vars(x) if hasattr(x, "__dict__") else {}
        slots = {name: getattr(x, name) for name in copyreg._slotnames(kind) if hasattr(x, name)}  # type: ignore[attr-defined]
        for name, value in slots.items():
            object.__setattr__(copied, name, self(value))
        for name, value in list(attributes.items()):
            if name != "_compiled_call_impl":  # of a module that was compiled in place
                copied.__dict__[name] = self(value)
        return copied

    # ----------------------------------------------------------------------------------------------------- containers

    def _dict(self, x: dict[Any, Any]) -> Any:
        copied = self._note(x, {})
        copied.update((self(k), self(v)) for k, v in list(x.items()))
        return copied

    def _list(self, x: list[Any]) -> Any:
        copied = self._note(x, [])
        copied.extend(map(self, list(x)))
        return copied

    def _set(self, x: set[Any]) -> Any:
        copied = self._note(x, set())
        copied.update(map(self, list(x)))
        return copied

    def _fixed(self, x: Any) -> Any:
        copied = list(map(self, x))
        if id(x) in self.known:  # it is part of itself, by way of a list
            return self.known[id(x)]
        return x if all(a is b for a, b in zip(copied, x, strict=True)) else type(x)(copied)

    # ------------------------------------------------------------------------------------------------------ functions

    def _function(self, x: FunctionType) -> Any:
        """One with its own variables, where those are not the same for both."""
        if COMPILED in vars(x) and not vars(x).get(DISABLED):
            return self(vars(x)[COMPILED])
        parts: list[Any] = [x.__closure__, x.__defaults__, x.__kwdefaults__, vars(x)]
        if not any(parts) or (_is_torchs(x) and not leads_to_tensors(x)):  # Dynamo knows torch's functions by identity
            return x
        cells = tuple(self._cell_of(cell) for cell in x.__closure__ or ())
        copied = self._note(x, FunctionType(x.__code__, x.__globals__, x.__name__, None, cells))
        for name in ("__doc__", "__qualname__", "__module__", "__annotations__"):
            setattr(copied, name, getattr(x, name))
        changed = [self._fill(cell) for cell in x.__closure__ or ()]
        copied.__defaults__, copied.__kwdefaults__ = self(x.__defaults__), self(x.__kwdefaults__)
        copied.__dict__.update((name, self(value)) for name, value in vars(x).items())
        values = [(x.__defaults__, copied.__defaults__)]
        values += [(v, (copied.__kwdefaults__ or {})[k]) for k, v in (x.__kwdefaults__ or {}).items()]
        values += [(v, vars(copied)[k]) for k, v in vars(x).items()]
        return copied if any(changed) or any(a is not b for a, b in values) else x

    def _cell_of(self, cell: CellType) -> Any:
        return self.known[id(cell)] if id(cell) in self.known else self._note(cell, CellType())

    def _fill(self, cell: CellType) -> bool:
        """Copies what a variable holds; whether that is something else now."""
        copied = self._cell_of(cell)
        try:
            held = cell.cell_contents
        except ValueError:  # not assigned yet
            return False
        copied.cell_contents = self(held)
        return copied.cell_contents is not held

    def _cell(self, x: CellType) -> Any:
        copied = self._cell_of(x)
        self._fill(x)
        return copied

    def _method(self, x: Any) -> Any:
        owner, function = self(x.__self__), self(x.__func__)
        return x if owner is x.__self__ and function is x.__func__ else MethodType(function, owner)

    def _builtin(self, x: Any) -> Any:
        owner = self(x.__self__)
        return x if owner is x.__self__ else getattr(owner, x.__name__)

    def _weak(self, x: Any) -> Any:
        there = x()
        return weakref.ref(self(there)) if issubclass(type(there), (Tensor, nn.Module)) else x


_CONTAINERS: dict[type, Any] = {
    dict: Copies._dict,
    list: Copies._list,
    set: Copies._set,
    tuple: Copies._fixed,
    frozenset: Copies._fixed,
    FunctionType: Copies._function,
    CellType: Copies._cell,
    MethodType: Copies._method,
    BuiltinMethodType: Copies._builtin,
    MethodWrapperType: Copies._builtin,
    weakref.ref: Copies._weak,
}


class Casts(Copies):
    """Copies of another precision: floating-point tensors, whatever they were, are of `dtype`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def all_of(self, x: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())  # type: ignore[call-overload]
        return whole.to(self.dtype if x.is_floating_point() else x.dtype, copy=True)

    def special(self, x: Tensor) -> Tensor:
        copied = copy.deepcopy(x, self.known)
        return copied.to(self.dtype) if x.is_floating_point() and type(x) is Tensor else copied


@functools.cache
def _closing_nothing(kind: Any) -> Any:
    """A class whose objects do nothing when they go: what a copy shares is not its own to close."""
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__del__": lambda self: None}
    return type(kind)(kind.__name__, (kind,), {**body, "__slots__": ()})


def leads_to_tensors(x: Any) -> bool:
    """Whether a tensor or a module can be reached from an object."""
    seen: set[int] = set()
    todo = [x]
    while todo:
        one = todo.pop()
        kind = type(one)
        if issubclass(kind, (Tensor, nn.Module)):
            return True
        if issubclass(kind, SHARED) or id(one) in seen:
            continue
        seen.add(id(one))
        if kind is FunctionType:  # not its module's variables
            todo += [one.__closure__, one.__defaults__, one.__kwdefaults__, vars(one)]
        else:
            todo += gc.get_referents(one)
    return False


def _is_torchs(x: Any, package: str = "torch.") -> bool:
    return f"{getattr(x, '__module__', '')}.".startswith(package)


def _is_plain(x: Tensor) -> bool:
    """A tensor of numbers at strides, of no class of its own."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided
    return plain and not x.is_quantized and not x.is_nested
