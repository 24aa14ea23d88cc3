"""The fields of a dataclass instance, without importing `dataclasses`, which takes 15 ms of every start."""


def field_names(value: object) -> list[str] | None:
    """Return the names of the fields that `value` has set, or None where it is no instance of a dataclass."""
    if isinstance(value, type) or not hasattr(type(value), "__dataclass_fields__"):
        return None
    from dataclasses import fields  # noqa: PLC0415 - whoever made the dataclass has imported it

    return [field.name for field in fields(value) if hasattr(value, field.name)]  # type: ignore[arg-type]
