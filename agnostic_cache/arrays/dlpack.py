"""DLPack: arrays that cross to another framework without passing through host bytes."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SupportsDLPack(Protocol):
    """Capability of an adapter: its arrays cross to another framework without passing through host bytes."""

    def export_dlpack(self, array: Any) -> Any:
        """Return an object with ``__dlpack__`` that any consumer takes without copying.

        It shares memory with `array` where that is dense and aligned to 64 bytes, and is a compact copy otherwise.
        """

    def import_dlpack(self, exported: Any) -> Any:
        """Make an array over the memory of `exported`, which somebody else may be reading: it is never written.

        Raises:
            UnsupportedDtypeError: This framework cannot hold the dtype without changing values.
        """
