"""What every test of this package has."""

from collections.abc import Iterator
from typing import Any

import pytest

from agnostic_cache import PrefixCache


@pytest.fixture(autouse=True, scope="session")
def verdicts_aside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep verdicts on tiny models out of the user's folder, and the user's out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGNOSTIC_CACHE_DIR", str(tmp_path_factory.mktemp("verdicts")))
        yield


@pytest.fixture(autouse=True, scope="session")
def strict() -> Iterator[None]:
    """Let an error of ours fail a test, unless the test asks for ``strict=False``: no call is bypassed by one."""
    defaults: dict[str, Any] = PrefixCache.__init__.__kwdefaults__ or {}
    before = defaults["strict"]
    defaults["strict"] = True
    yield
    defaults["strict"] = before
