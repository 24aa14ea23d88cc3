"""What a verdict on a model is filed under: the source that computes it, and what its config says of kinds.

Sizes are left out, and so are settings that treat every token alike. A function that replaces a method of a class
counts by its own source, and so does an attention function that transformers does not bring.
"""

import functools
import inspect
import json
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SHARED: Final = (
    "cache_utils",
    "masking_utils",
    "modeling_rope_utils",
    "generation.utils",
    "integrations.sdpa_attention",
)
"""Modules of transformers that decide about positions, masks and caches of every model."""

_OURS: Final = tuple(str(Path(str(package.__file__)).parent) for package in (torch, transformers))
_STATIC_ROPES: Final = frozenset({None, "default", "linear", "yarn", "llama3", "proportional"})
ROPES_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})
"""Types of rotary embedding that depend on the total length."""
_NO_KIND: Final = re.compile(
    r"_.*|.*(token|pad|bos|eos|sep)_(id|index|ids)|.*token|.*(bias|dropout|drop|act|activation|function|init|initializer)"
    r"|(tie|output|return|use_cache|problem|dtype|torch_dtype|transformers_version|model_type|architectures).*"
    r"|(id2label|label2id|chunk_size_feed_forward|is_encoder_decoder|name_or_path|auto_map|quantization_config)"
    r"|hidden_act.*|.*_init_.*|initializer.*|tokenizer_class|task_specific_params|rope_(scaling|parameters|theta|type)"
)


def digest_of(model: Any) -> str:
    """Name the code that computes a model, and the kinds of its config: the key of the shipped table."""
    classes = sorted({type(module) for module in model.modules()}, key=_name)
    parts = list(_parts(model, classes))
    kinds = kinds_of(model.config)
    kinds["flags"] = {name: value for name, value in kinds["flags"].items() if any(name in part for part in parts)}
    return blake2b("\0".join([*parts, json.dumps(kinds, sort_keys=True)]).encode(), digest_size=16).hexdigest()


def kinds_of(config: Any) -> dict[str, Any]:
    """Return what a config says of kinds, JSON-able: of layers, of rope, windows, and flags other than the default."""
    text = config.get_text_config(decoder=True)
    held = vars(text)
    layers = {
        name: sorted({*value})
        for name, value in held.items()
        if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value) and _counts(name)
    }
    windows = sorted(name for name, value in held.items() if "window" in name and type(value) is int)
    flags = {name: value for each in (config, text) for name, value in _flags(each)}
    ropes = sorted(str(kind) for kind in rope_types(text) - _STATIC_ROPES)
    return {"type": config.model_type, "layers": layers, "rope": ropes, "windows": windows, "flags": flags}


def rope_types(config: Any) -> set[Any]:
    """Return the types of rotary embedding that a text config names."""
    return {one.get("rope_type", one.get("type")) for one in _ropes(config)}


def rope_switch(config: Any) -> int | None:
    """Return the tokens up to which the rotary embedding does not depend on the total length; None: any number."""
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    found = []
    for one in _ropes(text):
        if one.get("rope_type", one.get("type")) in ROPES_BY_LENGTH:
            original = one.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None) or longest
            found.append(original if isinstance(original, int) else 0)
    return min(found, default=None)


def marks_of(model: Any) -> tuple[Any, ...]:
    """Return what differs once a class or a module of a model computes otherwise: compared before each call."""
    kinds, own = set(), []
    modules = [model]
    for module in modules:  # grows under way
        held = vars(module)
        kinds.add(type(module))
        if "forward" in held:
            own.append(held["forward"])
        modules += [child for child in held["_modules"].values() if child is not None]
    root = type(model)
    prepares = getattr(root, "prepare_inputs_for_generation", None)
    attention = getattr(model.config, "_attn_implementation", None)
    return frozenset((kind, kind.forward) for kind in kinds), own, prepares, attention, model.dtype


def _parts(model: Any, kinds: Iterable[type]) -> Iterator[str]:
    yield from (_source(sys.modules[f"transformers.{name}"]) for name in _SHARED)
    bases = {base for kind in kinds for base in kind.__mro__}
    for name in sorted({base.__module__ for base in bases if _models(base)}):
        source = _source(sys.modules.get(name))
        yield source or "".join(_class_source(base) for base in sorted(bases, key=_name) if base.__module__ == name)
    for base in sorted(bases, key=_name):
        if base.__module__ != "builtins":
            yield from _replaced(base)
    for module in model.modules():
        own = vars(module).get("forward")
        if own is not None and _written(own) is not _written(type(module).forward):
            yield f"{type(module).__qualname__}.forward of its own: {_function_source(_written(own))}"
    for attention in sorted(_attentions(model.config)):
        function = ALL_ATTENTION_FUNCTIONS.get(attention)
        if function is not None and not str(getattr(function, "__module__", "")).startswith("transformers."):
            yield f"{attention}: {_function_source(_written(function))}"


def _models(kind: type) -> bool:
    """Whether the file of a class is part of a model, not of the libraries under it."""
    first, *rest = kind.__module__.split(".")
    if first in {"torch", "builtins", "typing", "abc", "enum", "collections"}:
        return False
    return first != "transformers" or rest[:1] == ["models"]


@functools.cache
def _source(module: types.ModuleType | None) -> str:
    if module is None:
        return ""
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # a notebook, a frozen program
        return ""


def _class_source(kind: type) -> str:
    functions = [value for value in vars(kind).values() if isinstance(value, types.FunctionType)]
    return kind.__qualname__ + "".join(_function_source(_written(function)) for function in functions)


def _function_source(function: Any) -> str:
    try:
        return f"{getattr(function, '__qualname__', function)} {inspect.getsource(function)}"
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        if code is None:
            return f"{type(function).__module__}.{type(function).__qualname__}"
        constants = [one for one in code.co_consts if not isinstance(one, types.CodeType)]
        return f"{code.co_qualname} {code.co_code.hex()} {code.co_names} {constants}"


def _written(function: Any) -> Any:
    """Return the function that a compiler or a bound method stands for."""
    while True:
        inner = getattr(function, "_torchdynamo_orig_callable", None) or getattr(function, "__func__", None)
        inner = inner or (getattr(function, "func", None) if isinstance(function, functools.partial) else None)
        if inner is None:
            return function
        function = inner


def _replaced(kind: type) -> Iterator[str]:
    """Yield the source of functions of a class that its file does not define: somebody put them in place."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    for name, value in vars(kind).items():
        function = value
        while isinstance(function, types.FunctionType):
            inner = getattr(function, "__wrapped__", None)
            code = function.__code__
            at_home = code.co_filename == file and (inner or code.co_qualname == f"{kind.__qualname__}.{name}")
            if not at_home and not code.co_filename.startswith(("<frozen", "<string>", *_OURS)):
                yield f"{kind.__qualname__}.{name}: {_function_source(function)}"
            function = inner


def _attentions(config: Any) -> set[str]:
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    return {str(getattr(each, "_attn_implementation", None)) for each in configs if each is not None}


def _flags(config: Any) -> Iterator[tuple[str, Any]]:
    kind: Any = type(config)
    usual = _defaults(kind)
    for name, value in vars(config).items():
        if isinstance(value, bool | str) and not _NO_KIND.fullmatch(name) and value != usual.get(name, value is None):
            yield name, value


@functools.cache
def _defaults(kind: Any) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = vars(kind())
    except Exception:  # noqa: BLE001 - a config class that wants arguments has no defaults: every flag of it counts
        return {}
    return found


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]


def _counts(name: str) -> bool:
    return not name.startswith("_") and name not in {"architectures", "keys_to_ignore_at_inference"}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
