"""Whether the weights of a model are still those that were seen last: asked before each call, so it must take no time.

No address and no count of writes names a weight for ever: memory that is freed is given out again, and a tensor that
is put in place of another counts from zero. So a model is compared with what was seen last, whose memory is watched,
and whatever differs begins a new epoch.
"""

import secrets
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.multiprocessing.reductions import StorageWeakRef

from agnostic_cache_adapters.torch import active_adapters
from agnostic_cache_adapters.transformers.modeling_source import ROPES_BY_LENGTH

if TYPE_CHECKING:
    from torch import Tensor


class _Seen(NamedTuple):
    """The tensors of a model as they were seen last.

    Attributes:
        epoch: A name that no other epoch has, in any process.
        marks: How often each was written, and where it lies.
        memory: What it lies in, watched and not kept alive.
    """

    epoch: str
    marks: list[int]
    memory: list[StorageWeakRef]


_seen: "weakref.WeakKeyDictionary[Any, _Seen]" = weakref.WeakKeyDictionary()


def stamp(model: Any) -> tuple[str, str, str]:
    """Return what changes whenever the weights of a model may have: in-place updates, other tensors, adapters.

    What is written through ``parameter.data`` is not seen: torch does not count it.
    """
    tensors: list[Tensor | None] = []
    modules = [model]
    for module in modules:  # grows under way; ``parameters()`` and its kin take ten times as long
        held = vars(module)
        tensors += held["_parameters"].values()
        if not _follows_length(held.get("rope_type")):
            tensors += held["_buffers"].values()
        modules += [child for child in held["_modules"].values() if child is not None]
    there = [tensor for tensor in tensors if tensor is not None]
    marks = [0 if tensor.is_inference() else tensor._version for tensor in there]  # noqa: SLF001
    marks += [tensor.data_ptr() for tensor in there]
    seen = _seen.get(model)
    if seen is None or seen.marks != marks or any(map(StorageWeakRef.expired, seen.memory)):
        memory: Any = [StorageWeakRef(tensor.untyped_storage()) for tensor in there]  # type: ignore[no-untyped-call]
        seen = _seen[model] = _Seen(secrets.token_hex(8), marks, memory)
    kinds = set(map(type, modules))
    adapted = any(hasattr(kind, "merged_adapters") for kind in kinds)
    adapted = adapted or any("merged_adapters" in vars(module) for module in modules)
    adapters = str(active_adapters(model)) if adapted else ""
    return seen.epoch, adapters, str(getattr(model.config, "_attn_implementation", None))


def _follows_length(rope: Any) -> bool:
    """Whether a rotary embedding writes its own buffers in each forward: they follow from its input."""
    kinds = rope.values() if isinstance(rope, Mapping) else [rope]
    return any(kind in ROPES_BY_LENGTH for kind in kinds)
