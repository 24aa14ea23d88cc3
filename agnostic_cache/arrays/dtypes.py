"""The one table of element types: ours, the safetensors name, the lm:// code and the size of an item."""

import enum
from typing import Self

from agnostic_cache.errors import UnsupportedDtypeError


class Dtype(enum.StrEnum):
    """Element type of an array. Equal to its name, which is the name that torch, JAX and NumPy use.

    >>> Dtype.BFLOAT16 == "bfloat16", Dtype.BFLOAT16.itemsize
    (True, 2)

    Attributes:
        itemsize: Bytes per element in memory (a 4-bit integer takes a whole byte, as it does in JAX).
        safetensors: Name in a safetensors header, or None where that format has none.
        lm_code: Code on the lm:// wire, or None where that protocol has none.
    """

    itemsize: int
    safetensors: str | None
    lm_code: int | None

    def __new__(cls, name: str, itemsize: int, safetensors: str | None, lm_code: int | None = None) -> Self:
        """Make a member from a row of the table."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.itemsize = itemsize
        member.safetensors = safetensors
        member.lm_code = lm_code
        return member

    BOOL = "bool", 1, "BOOL"
    UINT8 = "uint8", 1, "U8", 6
    INT8 = "int8", 1, "I8"
    UINT16 = "uint16", 2, "U16"
    INT16 = "int16", 2, "I16"
    UINT32 = "uint32", 4, "U32"
    INT32 = "int32", 4, "I32"
    UINT64 = "uint64", 8, "U64"
    INT64 = "int64", 8, "I64"
    UINT4 = "uint4", 1, None
    INT4 = "int4", 1, None
    FLOAT16 = "float16", 2, "F16", 2
    BFLOAT16 = "bfloat16", 2, "BF16", 3
    FLOAT32 = "float32", 4, "F32", 4
    FLOAT64 = "float64", 8, "F64", 5
    FLOAT8_E4M3FN = "float8_e4m3fn", 1, "F8_E4M3", 7
    FLOAT8_E4M3FNUZ = "float8_e4m3fnuz", 1, "F8_E4M3FNUZ"
    FLOAT8_E5M2 = "float8_e5m2", 1, "F8_E5M2", 8
    FLOAT8_E5M2FNUZ = "float8_e5m2fnuz", 1, "F8_E5M2FNUZ"
    FLOAT8_E8M0FNU = "float8_e8m0fnu", 1, "F8_E8M0"
    COMPLEX64 = "complex64", 8, "C64"
    COMPLEX128 = "complex128", 16, None

    @property
    def is_integer(self) -> bool:
        """Whether elements are plain integers (bool excluded)."""
        return self.value.startswith(("int", "uint"))

    @classmethod
    def of(cls, name: str) -> "Dtype":
        """Look a dtype up by name.

        Raises:
            UnsupportedDtypeError: No such row.
        """
        try:
            return cls._value2member_map_[name]  # type: ignore[return-value]
        except KeyError:
            known = ", ".join(cls)
            msg = f"dtype {name!r} is not in the table; convert the array to one of {known}"
            raise UnsupportedDtypeError(msg) from None
