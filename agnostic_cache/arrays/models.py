"""Models of a framework, as far as their fingerprint needs them."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SupportsModels(Protocol):
    """Capability of an adapter: it finds the parameters of a model of its framework."""

    def model_parts(self, model: object) -> tuple[str, Mapping[str, Any]] | None:
        """Return what describes a model of this framework in words, and its parameters by name; None where it is none.

        The words are equal for equal models in every process; they name what parameters alone do not tell: the
        configuration, which adapters are active.
        """
