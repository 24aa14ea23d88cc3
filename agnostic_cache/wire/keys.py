"""The keys of the wire, as objects and as text. Two spellings of one key (``0ff``, ``ff``) are one key.

Source: LMCache 0.5.6 (``lmcache.utils``), names and form kept.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Self

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import UnsupportedDtypeError, WireError

MAX_KEY_LENGTH: Final = 150
"""Bytes of a key on the wire, in UTF-8."""

_NAMES: Final = {  # of a dtype in a key
    "half": Dtype.FLOAT16,
    "bfloat16": Dtype.BFLOAT16,
    "float": Dtype.FLOAT32,
    "double": Dtype.FLOAT64,
    "int8": Dtype.INT8,
    "uint8": Dtype.UINT8,
    "int16": Dtype.INT16,
    "int32": Dtype.INT32,
    "int64": Dtype.INT64,
    "bool": Dtype.BOOL,
    "fp8_e4m3fn": Dtype.FLOAT8_E4M3FN,
    "fp8_e4m3fnuz": Dtype.FLOAT8_E4M3FNUZ,
    "fp8_e5m2": Dtype.FLOAT8_E5M2,
    "fp8_e5m2fnuz": Dtype.FLOAT8_E5M2FNUZ,
}
_NAME_OF: Final = {dtype: name for name, dtype in _NAMES.items()}
_TAG: Final = "lmcache.tag."
_INT: Final = re.compile(r"-?[0-9]{1,10}", re.ASCII)
_KEY: Final = re.compile(  # the model comes first and may hold "@" itself: what follows it tells where it ends
    rf"(?P<model>.+?)@(?P<world>-?[0-9]{{1,10}})@(?P<worker>-?[0-9]{{1,10}})@(?P<hash>-?[0-9a-fA-F]+)"
    rf"@(?P<dtype>{'|'.join(_NAMES)})(?:@(?P<layer>[0-9]{{1,10}}))?(?P<tags>(?:@[^@%]*%[^@]*)*)",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class CacheEngineKey:
    """The key of a chunk of tokens: ``model@world_size@worker_id@chunk_hash@dtype[@tag%value...]``.

    >>> CacheEngineKey("meta/llama", 1, 0, 255, "bfloat16").to_string()
    'meta/llama@1@0@ff@bfloat16'

    Attributes:
        model_name: Name of the model. "@" in it is fine here, and drops the connection of LMCache's own server.
        world_size: Number of workers.
        worker_id: Which of them.
        chunk_hash: Hash of the tokens; bytes are taken as a big-endian number. May be negative.
        dtype: Element type; a torch dtype, or anything else whose name is in the table, is taken for its name.
        request_configs: What else came with the request. Entries ``lmcache.tag.<name>`` are part of the key.
        tags: Those, as (name, value) pairs in order, or None where there are none.

    Raises:
        WireError: `dtype` has no name in keys, or a tag holds what separates tags.
    """

    model_name: str
    world_size: int
    worker_id: int
    chunk_hash: int
    dtype: Dtype
    request_configs: Mapping[str, Any] | None = field(default=None, compare=False)
    tags: tuple[tuple[str, str], ...] | None = field(init=False, default=None)
    _text: str = field(init=False, default="", repr=False, compare=False)  # once `to_string` was asked

    def __post_init__(self) -> None:
        """Normalise what callers may give in several forms."""
        dtype = dtype_of(self.dtype)
        if dtype not in _NAME_OF:
            msg = f"a key of dtype {self.dtype}; use one of {', '.join(_NAME_OF)}"
            raise WireError(msg)
        given = (self.request_configs or {}).items()
        tags = tuple((name.removeprefix(_TAG), str(value)) for name, value in given if name.startswith(_TAG))
        bad = [f"{name}%{value}" for name, value in tags if "%" in name or "@" in name or "@" in value]
        if bad:
            msg = f"tag {bad[0]!r}: a name must not hold '%', and neither name nor value '@'"
            raise WireError(msg)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "tags", tags or None)
        given_hash: Any = self.chunk_hash
        if isinstance(given_hash, bytes):
            object.__setattr__(self, "chunk_hash", int.from_bytes(given_hash, "big"))

    @property
    def chunk_hash_hex(self) -> str:
        """The hash in lower-case hexadecimal, without a prefix."""
        return f"{self.chunk_hash:x}"

    def to_string(self) -> str:
        """Return the key as text; equal for equal keys."""
        if not self._text:
            numbers = str(self.world_size), str(self.worker_id), self.chunk_hash_hex, _NAME_OF[self.dtype]
            tags = (f"{name}%{value}" for name, value in self.tags or ())
            object.__setattr__(self, "_text", "@".join((self.model_name, *numbers, *self._layer(), *tags)))
        return self._text

    def _layer(self) -> tuple[str, ...]:
        return ()

    @classmethod
    def from_string(cls, text: str) -> Self:
        """Read what `to_string` writes.

        Raises:
            WireError: It is no key, or one of another class; see `parse_cache_key`.
        """
        key = parse_cache_key(text)
        if type(key) is not cls:
            msg = f"{text!r} is a {type(key).__name__}; use parse_cache_key"
            raise WireError(msg)
        return key

    def split_layers(self, num_layers: int) -> list["LayerCacheEngineKey"]:
        """Return the keys of the single layers."""
        return [self._of_layer(layer) for layer in range(num_layers)]

    def get_first_layer(self) -> "LayerCacheEngineKey":
        """Return the key of layer 0."""
        return self._of_layer(0)

    def _of_layer(self, layer_id: int) -> "LayerCacheEngineKey":
        parts = (self.model_name, self.world_size, self.worker_id, self.chunk_hash, self.dtype, self.request_configs)
        return LayerCacheEngineKey(*parts, layer_id=layer_id)

    def with_new_worker_id(self, new_worker_id: int) -> Self:
        """Return the key of another worker."""
        return replace(self, worker_id=new_worker_id)


@dataclass(frozen=True, slots=True)
class LayerCacheEngineKey(CacheEngineKey):
    """The key of one layer of a chunk: ``...@dtype@layer_id[@tag%value...]``.

    Attributes:
        layer_id: Number of the layer, from 0.
    """

    layer_id: int = 0

    def _layer(self) -> tuple[str, ...]:
        return (str(self.layer_id),)


def parse_cache_key(key_str: str) -> CacheEngineKey | LayerCacheEngineKey:
    """Read a key, of a layer or of them all.

    >>> parse_cache_key("a/b@1@0@0FF@half@3@user%x").to_string()
    'a/b@1@0@ff@half@3@user%x'

    Raises:
        WireError: It is no key.
    """
    text = key_str.strip()
    found = _KEY.fullmatch(text)
    if found is None:
        form = "model@world_size@worker_id@hash@dtype[@layer][@tag%value...]"
        msg = f"{text[:MAX_KEY_LENGTH]!r} is no key; it should read {form}"
        raise WireError(msg)
    pairs = (tag.partition("%") for tag in found["tags"].split("@")[1:])
    configs = MappingProxyType({_TAG + name: value for name, _, value in pairs}) or None
    numbers = int(found["world"]), int(found["worker"]), int(found["hash"], 16)
    if found["layer"] is None:
        return CacheEngineKey(found["model"], *numbers, _NAMES[found["dtype"]], configs)
    return LayerCacheEngineKey(found["model"], *numbers, _NAMES[found["dtype"]], configs, layer_id=int(found["layer"]))


def dtype_of(given: Any) -> Dtype:
    """Return the dtype of that name; ``torch.float16`` calls itself that.

    Raises:
        WireError: There is none.
    """
    if isinstance(given, Dtype):
        return given
    try:
        return Dtype.of(str(getattr(given, "name", given)).rpartition(".")[2])
    except UnsupportedDtypeError as error:
        raise WireError(str(error)) from error
