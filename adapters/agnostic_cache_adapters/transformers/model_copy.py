"""A copy of a model around the same weights: computing with it leaves no trace on the model.

What has to hold: no attribute, buffer, config or training flag of the model changes; none of its hooks fires, nor a
global one; nothing that is compiled runs compiled; the weights are shared and never written. So every module, container
and small tensor is copied, parameters and large buffers are shared, and a copy calls `forward` itself.
"""

import contextlib
import copy
import enum
import functools
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig

_SHARED_BYTES: Final = 4 * 1024 * 1024
"""A buffer above this size holds weights of a quantised model, not a table of positions."""

_LOCKS: Final = (type(threading.Lock()), type(threading.RLock()))
_ATOMS: Final = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.Stream),
    *(types.BuiltinFunctionType, types.ModuleType, types.CodeType, *_LOCKS),
)
_HELD: Final = (torch.nn.Module, torch.Tensor, types.MethodType, functools.partial)
_CALL: Final = "_compiled_call_impl"  # what `Module.__call__` calls where it is set: in place of hooks and `forward`
_OF_CALLERS: Final = ("generate",)  # what `reuse` puts in place


def copy_of(model: Any) -> Any:
    """Return a copy of a model, in evaluation mode, which shares its weights and calls no hooks.

    Raises:
        Exception: Whatever a class raises that cannot be copied.
    """
    return _Copying({type(module).__module__ for module in model.modules()}).value(model)


def generating(model: Any) -> Any:
    """Return the model in a wrapper that hands ``generate`` on: PEFT's, or that of ``torch.compile``."""
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)


def uncompiled(model: Any) -> Any:
    """Return the model in a wrapper of ``torch.compile``, which hands all but calls on to it; others as they are."""
    while "_orig_mod" in getattr(model, "_modules", ()):
        model = model._modules["_orig_mod"]  # noqa: SLF001
    return model


def wrap_call(module: Any, wrap: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let calls of a module of a copy go through ``wrap(module, call)``."""
    vars(module)[_CALL] = wrap(module, vars(module)[_CALL])


@contextlib.contextmanager
def wrapped(modules: Iterable[Any], wrap: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let calls of some modules of a copy go through ``wrap(module, call)`` for a ``with`` block."""
    before = [(module, vars(module)[_CALL]) for module in modules]
    for module, _ in before:
        wrap_call(module, wrap)
    try:
        yield
    finally:
        for module, call in before:
            vars(module)[_CALL] = call


class _Copying:
    """One copy under way: what was copied is found again, so that aliases stay aliases."""

    def __init__(self, files: set[str]) -> None:
        self._files = files  # the Python modules that define the model
        self._done: dict[int, tuple[Any, Any]] = {}  # the original is kept, so that its id stays its own
        self._configs: dict[int, Any] = {}

    def value(self, value: Any) -> Any:
        """Return the copy of a value."""
        if isinstance(value, _ATOMS):
            return value
        done = self._done.get(id(value))
        if done is None:
            done = self._note(value, self._made(value))
        return done[1]

    def _note(self, value: Any, made: Any) -> tuple[Any, Any]:
        """Note a copy before what it holds is copied, which may hold the original in turn."""
        done = self._done[id(value)] = (value, made)
        return done

    def _made(self, value: Any) -> Any:  # noqa: PLR0911 - one kind each
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, PreTrainedConfig | GenerationConfig):
            return copy.deepcopy(value, self._configs)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.value(value.__self__))
        if isinstance(value, functools.partial):
            made = functools.partial(self.value(value.func), *self._each(value.args), **self._items(value.keywords))
            vars(made).update(self._items(vars(value)))
            return made
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, dict):
            return self._dict(value)
        if type(value) is list:
            items: list[Any] = []
            self._note(value, items)
            items += self._each(value)
            return items
        if type(value) in {tuple, set, frozenset}:
            return type(value)(self._each(value))
        return self._object(value)

    def _module(self, module: Any) -> Any:
        original = vars(module)["_modules"].get("_orig_mod")
        if original is not None:  # a wrapper of torch.compile
            return self.value(original)
        made = object.__new__(type(module))
        self._note(module, made)
        held: dict[str, Any] = {}
        made.__dict__ = held
        for name, value in vars(module).items():
            if name == "_parameters":
                held[name] = dict(value)
            elif name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                held[name] = OrderedDict()
            elif name != _CALL and name not in _OF_CALLERS:
                held[name] = self.value(value)
        held["training"] = False
        held[_CALL] = made.forward
        return made

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, torch.nn.Parameter) or tensor.is_meta or tensor.nbytes > _SHARED_BYTES:
            return tensor
        return tensor.detach().clone()

    def _function(self, function: Any) -> Any:
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:
            return self.value(original)
        if not function.__closure__:
            return function
        self._note(function, function)  # one that calls itself
        cells = [cell.cell_contents for cell in function.__closure__]
        copies = self._each(cells)
        if all(one is other for one, other in zip(cells, copies, strict=True)):
            return function
        closure = tuple(types.CellType(one) for one in copies)
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        made.__kwdefaults__ = function.__kwdefaults__
        vars(made).update(self._items(vars(function)))
        return made

    def _dict(self, value: dict[Any, Any]) -> Any:
        made = copy.copy(value)
        self._note(value, made)
        made.update(self._items(value))
        return made

    def _object(self, value: Any) -> Any:
        """Copy an object of a class that the model's files define, or that holds tensors or modules; share others."""
        held = getattr(value, "__dict__", None)
        if type(held) is not dict:
            return value
        if type(value).__module__ not in self._files and not any(isinstance(one, _HELD) for one in held.values()):
            return value
        made = object.__new__(type(value))
        self._note(value, made)
        made.__dict__.update(self._items(held))
        return made

    def _each(self, values: Iterable[Any]) -> list[Any]:
        return [self.value(value) for value in values]

    def _items(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {name: self.value(value) for name, value in values.items()}


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, compiler and TF32; then random numbers go on as if nothing had been drawn.

    Not for several threads at a time: the generators of random numbers are the process's.
    """
    random = generators(device)
    before = [get() for get, _ in random]
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _eager(), _whole_floats(device):
            yield
    finally:
        for state, (get, restore) in zip(before, random, strict=True):
            if not torch.equal(state, get()):  # another thread's draws are left alone where the model draws nothing
                restore(state)


def generators(device: torch.device) -> list[tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]]:
    """Return, for each generator of random numbers that a model draws from, how to get and to set its state."""
    found: list[tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]] = [
        (torch.get_rng_state, torch.set_rng_state)
    ]
    if device.type != "cpu":
        of_device = torch.get_device_module(device)
        if hasattr(of_device, "get_rng_state"):
            found.append(
                (
                    functools.partial(of_device.get_rng_state, device),
                    functools.partial(of_device.set_rng_state, device=device),
                )
            )
    return found


@contextlib.contextmanager
def _whole_floats(device: torch.device) -> Iterator[None]:
    """Let CUDA multiply fp32 as fp32: TF32, which is usual for convolutions, rounds to 11 bits."""
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv] if device.type == "cuda" else []
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run functions of a modeling file that are compiled as they were written; nothing where no compiler is there."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
