"""Whether training mode changes what a model computes: where no dropout and no noise acts, it does not."""

import functools
import re
import types
from collections.abc import Iterator
from typing import Any, Final

import torch

_SWITCH: Final = re.compile(r"\w*(drop|noise|jitter)\w*|gradient_checkpointing")
"""Settings that act in training mode only; the last one keeps a model from using its KV cache."""

_ALWAYS: Final = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.RReLU)  # noqa: SLF001 - the base of all of them


def acts_differently(model: Any) -> bool:
    """Say whether a module of a model is in training mode and would compute something else in evaluation mode.

    A class that asks for the mode and has no setting that is known is taken to.
    """
    return any(module.training and _acts(module) for module in model.modules())


def _acts(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # noqa: SLF001
        return module.p > 0
    if isinstance(module, _ALWAYS):
        return True
    kind: Any = type(module)
    if not _asks(kind):
        return False
    settings = list(_settings(module))
    return not settings or any(settings)


def _settings(module: torch.nn.Module) -> Iterator[Any]:
    held = vars(module)
    of_class = getattr(module, "gradient_checkpointing", None)
    if of_class is not None:
        yield of_class
    for holder in (held, vars(held["config"]) if hasattr(held.get("config"), "to_dict") else {}):
        for name, value in holder.items():
            if isinstance(value, bool | int | float) and _SWITCH.fullmatch(name) and "classifier" not in name:
                yield value


@functools.lru_cache(maxsize=1024)
def _asks(kind: Any) -> bool:
    """Whether a function of a class, or of one that it derives from, reads the training mode."""
    return any(
        "training" in code.co_names
        for base in kind.__mro__
        if base is not torch.nn.Module
        and issubclass(base, torch.nn.Module)
        and not base.__module__.startswith(("torch.", "transformers.modeling_utils"))
        for function in vars(base).values()
        for code in _codes(function)
    )


def _codes(function: Any) -> Iterator[types.CodeType]:
    function = getattr(function, "__wrapped__", function)
    waiting = [code] if (code := getattr(function, "__code__", None)) else []
    for each in waiting:  # grows under way
        yield each
        waiting += [one for one in each.co_consts if isinstance(one, types.CodeType)]
