"""The fields of a dataclass instance."""

from dataclasses import fields, is_dataclass


def field_names(value: object) -> list[str] | None:
    """Return the names of the fields that `value` has set, or None where it is no instance of a dataclass."""
    if isinstance(value, type) or not is_dataclass(value):
        return None
    return [field.name for field in fields(value) if hasattr(value, field.name)]
