"""Modules that moved after 0.1 are still found under the path that they had there."""

import importlib

import pytest

MOVED = {
    "state.adapter": "arrays.adapter",
    "state.blob": "blob.state_blob",
    "state.dtypes": "arrays.dtypes",
    "state.host": "arrays.host",
    "state.host_adapter": "arrays.host_adapter",
    "state.registry": "arrays.registry",
    "state.roles": "arrays.roles",
    "state.safetensors": "blob.safetensors",
    "state_cache": "held.state_cache",
    "storage.entry": "blob.entry",
}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_module_that_moved_is_found_under_both_paths(old: str, new: str) -> None:
    modules = [importlib.import_module(f"agnostic_cache.{path}") for path in (old, new)]
    assert modules[0] is modules[1]
