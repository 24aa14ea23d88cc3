"""The table of element types."""

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import UnsupportedDtypeError


def test_a_dtype_is_its_name() -> None:
    for dtype in Dtype:
        assert Dtype.of(dtype.value) is Dtype.of(str(dtype)) is dtype
        assert dtype == dtype.value
        assert hash(dtype) == hash(dtype.value)


def test_names_and_codes_are_those_of_one_dtype() -> None:
    names = [dtype.safetensors for dtype in Dtype if dtype.safetensors is not None]
    codes = [dtype.lm_code for dtype in Dtype if dtype.lm_code is not None]
    assert len(set(names)) == len(names)
    assert len(set(codes)) == len(codes)


def test_items_are_as_large_as_their_names_say() -> None:
    for dtype in Dtype:
        bits = int("".join(c for c in dtype.value.split("_")[0].removeprefix("b") if c.isdigit()) or 8)
        assert dtype.itemsize == -(-bits // 8)  # of a 4-bit integer, one byte


def test_what_every_framework_keeps_is_in_the_table() -> None:
    both = {
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "int8": 1,
        "int32": 4,
        "bool": 1,
    }
    assert {dtype.value: dtype.itemsize for dtype in Dtype if dtype.value in both} == both  # fmt: skip
    assert [Dtype.of(name).is_integer for name in both] == [name.startswith("int") for name in both]


@pytest.mark.parametrize("name", ["", "float", "FLOAT32", "torch.float32", "object", "float4_e2m1fn"])
def test_another_name_is_an_error(name: str) -> None:
    with pytest.raises(UnsupportedDtypeError):
        Dtype.of(name)
