"""The path that `agnostic_cache.arrays.adapter` had in 0.1."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("agnostic_cache.arrays.adapter")
