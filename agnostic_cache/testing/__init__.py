"""The conformance suites, public: a test class of a third party inherits one of them."""

import pytest

_SUITES = (
    "array_suite",
    "batch_suite",
    "cache_suite",
    "container_suite",
    "evictor_suite",
    "ownership_suite",
    "rows_suite",
    "shelf",
    "storage_suite",
    "template_suite",
)
pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in _SUITES))  # before they are imported

from agnostic_cache.testing.adapter_suite import AdapterSuite  # noqa: E402
from agnostic_cache.testing.array_suite import ArraySuite  # noqa: E402
from agnostic_cache.testing.batch_suite import BatchSuite  # noqa: E402
from agnostic_cache.testing.cache_suite import CacheSuite  # noqa: E402
from agnostic_cache.testing.container_suite import ContainerSuite  # noqa: E402
from agnostic_cache.testing.evictor_suite import EvictorSuite  # noqa: E402
from agnostic_cache.testing.grid import Grid, pattern  # noqa: E402
from agnostic_cache.testing.ownership_suite import OwnershipSuite  # noqa: E402
from agnostic_cache.testing.rows_suite import RowsSuite  # noqa: E402
from agnostic_cache.testing.storage_suite import StorageSuite  # noqa: E402
from agnostic_cache.testing.subject import Subject  # noqa: E402
from agnostic_cache.testing.template_suite import TemplateSuite  # noqa: E402

__all__ = [
    "AdapterSuite",
    "ArraySuite",
    "BatchSuite",
    "CacheSuite",
    "ContainerSuite",
    "EvictorSuite",
    "Grid",
    "OwnershipSuite",
    "RowsSuite",
    "StorageSuite",
    "Subject",
    "TemplateSuite",
    "pattern",
]
