"""What every test of this package has."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def verdicts_aside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep verdicts on tiny models out of the user's folder, and the user's out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGNOSTIC_CACHE_DIR", str(tmp_path_factory.mktemp("verdicts")))
        yield
