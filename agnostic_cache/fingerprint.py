"""A name for the weights of a model, so that states computed with others are never met."""

from hashlib import blake2b

from agnostic_cache.arrays.models import SupportsModels
from agnostic_cache.arrays.registry import loaded_adapters
from agnostic_cache.state.tree import flatten

PREFIX = "weights-"


def model_fingerprint(model_or_params: object) -> str:
    """Name the weights of a model: its configuration, and dtype, shape and a sample of every parameter.

    Another checkpoint, dtype or quantisation, weights that training or a merge has changed, and another active adapter
    give another name; the same weights give the same in every process. Names are per framework: to share states
    between frameworks, both sides pass one explicit namespace.

    A sample is read of each parameter, not all of it: an update that spares the sampled elements is not seen here. The
    verbs of PyTorch also watch the version of each parameter.

    Args:
        model_or_params: A model of a framework that has an adapter (``torch.nn.Module``), or its parameters: any
            nesting of dict, list, tuple and dataclass, or a JAX pytree.

    Raises:
        UnknownValueError: It holds nothing that an adapter knows.
    """
    for adapter in loaded_adapters():
        if isinstance(adapter, SupportsModels) and (parts := adapter.model_parts(model_or_params)) is not None:
            config, arrays = parts
            break
    else:
        flat = flatten(model_or_params)
        adapter, config, arrays = flat.adapter, "", flat.arrays
    digest = blake2b(config.encode(), digest_size=16)
    for name, array in arrays.items():
        spec = adapter.describe(array)
        digest.update(f"\n{name} {spec.dtype} {spec.shape}\n".encode())
        digest.update(adapter.sample(array))
    return f"{PREFIX}{adapter.framework}-{digest.hexdigest()}"


def same_weights(one: str | None, other: str | None) -> bool:
    """Say whether two fingerprints may name the same weights: as far as is known, and two frameworks' always may."""
    return one is None or other is None or one == other or _framework(one) != _framework(other)


def _framework(fingerprint: str) -> str:
    return fingerprint.rpartition("-")[0] if fingerprint.startswith(PREFIX) else ""
