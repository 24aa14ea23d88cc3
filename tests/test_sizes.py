"""Sizes as people write them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnostic_cache.errors import InvalidSizeError
from agnostic_cache.sizes import parse_size


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (1, 1),
        ("01", 1),
        ("7B", 7),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2MB", 2 * 10**6),
        ("2 MiB", 2 * 2**20),
        ("4GB", 4 * 10**9),
        (" 4GiB ", 4 * 2**30),
        ("3TB", 3 * 10**12),
        ("3TiB", 3 * 2**40),
        ("5PB", 5 * 10**15),
        ("5PiB", 5 * 2**50),
        ("1.5GiB", 3 * 2**29),
        ("0.1MB", 10**5),
        ("1.9B", 1),
    ],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@given(st.integers(1, 2**63), st.sampled_from([("", 1), ("KiB", 2**10), ("GB", 10**9), ("PiB", 2**50)]))
def test_sizes_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(number) == number
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]


NO_SIZES: list[Any] = [0, -1, True, 1.5, None, b"1"]
NO_SIZES += ["", " ", "B", "0", "0.9", "0.0GiB", "-1", "+1", "1e3", "1kb", "1K", "1iB", "1EB", "1 000", "1GB 1MB"]
NO_SIZES += ["1,5GB", ".5GB", "5.GB", "inf", "nan", "\u0664GB", "9" * 5000 + "PiB"]


@pytest.mark.parametrize("size", NO_SIZES, ids=range(len(NO_SIZES)))
def test_what_is_no_size_is_an_error(size: Any) -> None:
    with pytest.raises(InvalidSizeError):
        parse_size(size)
