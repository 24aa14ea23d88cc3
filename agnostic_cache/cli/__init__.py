"""The program ``agnostic-cache``, also ``python -m agnostic_cache.cli``. Needs the extra ``cli``."""
