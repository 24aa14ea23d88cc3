"""A program in which no package has entry points, as in a frozen one, and one array."""

import subprocess
import sys

PROGRAM = """
from importlib import metadata
import {framework}
from agnostic_cache.arrays import registry

metadata.entry_points = lambda group: metadata.EntryPoints()
value = {{"x": [{array}]}}
for adapter in registry.Registry().of(value), registry.Registry().named("{framework}"):
    assert type(adapter).__module__ == "agnostic_cache_adapters.{framework}", "the table does not have it"
registry.OWN_ADAPTERS = {{}}
for adapter in registry.adapter_for(value), registry.adapter_named("{framework}"):
    assert type(adapter).__module__ == "agnostic_cache_adapters.{framework}", "importing it is not enough"
"""


def check_adapter(framework: str, array: str) -> None:
    """Find the adapter of an array by the table, and, where the table is empty, because its module is imported."""
    subprocess.run([sys.executable, "-c", PROGRAM.format(framework=framework, array=array)], check=True)
