"""AdapterSuite: the whole contract of an adapter and of the states that it makes.

A test class of one's own inherits it, says which framework it is, and how to make, read and spoil an array:

    class TestMyAdapter(AdapterSuite):
        framework = "mine"

        def make(self, shape, dtype, seed):
            return mine.from_bytes(pattern(shape, dtype, seed), shape, dtype.value)

        def values(self, array):
            return array.tobytes()

        def spoil(self, array):
            array.fill(0)

Everything is asserted through the public names of `agnostic_cache`: classes of errors, never their wording.
"""

from agnostic_cache.testing.array_suite import ArraySuite
from agnostic_cache.testing.batch_suite import BatchSuite
from agnostic_cache.testing.cache_suite import CacheSuite
from agnostic_cache.testing.container_suite import ContainerSuite
from agnostic_cache.testing.ownership_suite import OwnershipSuite
from agnostic_cache.testing.rows_suite import RowsSuite
from agnostic_cache.testing.template_suite import TemplateSuite


class AdapterSuite(ArraySuite, ContainerSuite, RowsSuite, BatchSuite, OwnershipSuite, TemplateSuite, CacheSuite):
    """Every suite at once; an adapter without buffers to fill inherits all but `TemplateSuite`."""
