"""Compute with a copy of a 16-bit model in fp32: rounding to 16 bits hides a state that was lost.

A small model is converted whole. Of a large one, one decoder layer is held in fp32 at a time, and embedding and head
are never converted whole. Only the copy is converted: it shares weights with the model, but has tables of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from agnostic_cache_adapters.transformers.model_copy import wrap_call

_WHOLE_BYTES: Final = 512 * 1024 * 1024
"""Weights that take less than this in fp32 are converted at once."""
_ROWS_BYTES: Final = 64 * 1024 * 1024  # of a head, that are converted at a time
_HALVES: Final = (torch.bfloat16, torch.float16)


def compute_in_fp32(copied: Any) -> bool:
    """Let a copy made by `copy_of` compute in fp32; False, and nothing changed, where its weights do not allow it.

    Quantised weights, and those that lie elsewhere until they are used, do not.
    """
    weights = list(copied.parameters())
    if not all(_plain(weight) for weight in weights):
        return False
    if not any(weight.dtype in _HALVES for weight in weights):
        return True
    if 4 * sum(weight.numel() for weight in weights) <= _WHOLE_BYTES:
        _convert(copied.modules())
    else:
        _convert_by_layer(copied)
    _name_dtype(copied)
    return True


def _plain(weight: torch.Tensor) -> bool:
    known = type(weight) in {torch.nn.Parameter, torch.Tensor} and not weight.is_meta
    return known and weight.dtype in {*_HALVES, torch.float32, torch.float64}


def _convert(modules: Iterable[Any]) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Put fp32 tensors in place of the 16-bit ones of some modules; return what stood where."""
    held = [table for each in modules for table in (vars(each)["_parameters"], vars(each)["_buffers"])]
    before = [(table, name, tensor) for table in held for name, tensor in table.items()]
    before = [each for each in before if each[2] is not None and each[2].dtype in _HALVES]
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for table, name, tensor in before:
        if id(tensor) not in made:
            wide = tensor.detach().float()
            whole = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(wide, requires_grad=False) if whole else wide
        table[name] = made[id(tensor)]
    return before


def _convert_by_layer(copied: Any) -> None:
    lists: list[Any] = [each for each in copied.modules() if isinstance(each, torch.nn.ModuleList) and len(each)]
    layers = max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()), default=())
    inside = {module for layer in layers for module in layer.modules()}
    for layer in layers:
        wrap_call(layer, _while_called)
    for module in copied.modules():
        if module in inside:
            continue
        if isinstance(module, torch.nn.Embedding):
            wrap_call(module, _widened)
        elif type(module) is torch.nn.Linear:
            wrap_call(module, _in_rows)
        else:
            _convert([module])


def _while_called(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def converted(*args: Any, **kwargs: Any) -> Any:
        before = _convert(layer.modules())
        try:
            return call(*args, **kwargs)
        finally:
            for table, name, tensor in before:
                table[name] = tensor

    return converted


def _widened(_: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """An embedding: one row per token, so that what rounds here rounds in every pass alike."""
    return lambda *args, **kwargs: call(*args, **kwargs).float()


def _in_rows(linear: Any, _: Callable[..., Any]) -> Callable[..., Any]:
    """A head of which some rows are converted at a time."""

    def computed(hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = linear.weight, linear.bias
        count = max(_ROWS_BYTES // (4 * weight.shape[1]), 1)
        parts = [torch.nn.functional.linear(hidden.float(), rows.float()) for rows in weight.split(count)]
        joined = torch.cat(parts, -1)
        return joined if bias is None else joined + bias.float()

    return computed


def _name_dtype(copied: Any) -> None:
    """Let configs say fp32: some classes make masks and states of the dtype that their config names."""
    for module in copied.modules():
        config = vars(module).get("config")
        if getattr(config, "dtype", None) in _HALVES:
            config.dtype = torch.float32
