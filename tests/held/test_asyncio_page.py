"""The page on asyncio: its code runs, and what it says of leases, cancelling and missing together is so."""

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

from host_memory import HostMemory, check, fills

from agnostic_cache import KVState, StateCache
from agnostic_cache.eviction import PutStatus

PAGE = Path(__file__).parents[2] / "docs" / "asyncio.md"
HANG_SECONDS = 10


class Page:
    """The functions of the page, around states that are filled with the length of their document."""

    def __init__(self) -> None:
        self.memory = HostMemory()
        self.computed: list[str] = []
        self.may_go_on, self.generating = threading.Event(), threading.Event()
        self.may_go_on.set()
        self.fails = False
        self.names: dict[str, Any] = {"generate": self.generate, "prefill": self.prefill}
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
            exec(block, self.names)  # noqa: S102 - the page's own code
        self.cache: StateCache = self.names["cache"]

    def prefill(self, document: str) -> Any:
        self.computed.append(document)
        assert self.may_go_on.wait(HANG_SECONDS)
        if self.fails:
            self.fails = False
            raise ZeroDivisionError
        return self.memory.state(64, fill=len(document))

    def generate(self, state: KVState, question: str) -> list[Any]:
        self.generating.set()
        assert self.may_go_on.wait(HANG_SECONDS)
        return [question, *fills(state.unwrap())]


def test_what_is_there_is_answered_from_and_the_rest_is_a_miss() -> None:
    async def main() -> None:
        assert await page.names["answer"]("doc", "why?") is None
        await page.names["ensure"]("doc")
        assert await page.names["answer"]("doc", "why?") == ["why?", 3]
        await page.names["ensure"]("doc")

    page = Page()
    asyncio.run(main())
    assert page.computed == ["doc"]
    assert page.cache.stats().borrowed_bytes == 0


def test_a_lease_stays_open_across_await_and_ends_with_a_cancelled_task() -> None:
    async def main() -> None:
        await page.names["ensure"]("doc")
        page.may_go_on.clear()
        task = asyncio.create_task(page.names["answer"]("doc", "why?"))
        await asyncio.to_thread(page.generating.wait, HANG_SECONDS)
        assert page.cache.stats().borrowed_bytes == 64
        page.cache.remove("doc")
        assert page.cache.stats().deferred_bytes == 64
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert page.cache.current_bytes == 0
        page.may_go_on.set()

    page = Page()
    asyncio.run(main())
    check(page.cache, page.memory)


def test_many_that_miss_together_compute_once() -> None:
    async def main() -> None:
        page.may_go_on.clear()
        tasks = [asyncio.create_task(page.names["ensure"]("doc")) for _ in range(8)]
        other = asyncio.create_task(page.names["ensure"]("another"))
        await asyncio.wait([tasks[0]], timeout=0)
        page.may_go_on.set()
        await asyncio.gather(*tasks, other)

    page = Page()
    asyncio.run(main())
    assert sorted(page.computed) == ["another", "doc"]
    assert page.names["computing"] == {}


def test_who_is_cancelled_does_not_stop_it_for_the_others() -> None:
    async def main() -> None:
        page.may_go_on.clear()
        first, second = (asyncio.create_task(page.names["ensure"]("doc")) for _ in range(2))
        await asyncio.wait([first, second], timeout=0)
        first.cancel()
        await asyncio.wait([first])
        third = asyncio.create_task(page.names["ensure"]("doc"))
        await asyncio.wait([third], timeout=0)
        page.may_go_on.set()
        await asyncio.gather(second, third)

    page = Page()
    asyncio.run(main())
    assert page.cache.contains("doc")
    assert page.computed == ["doc"]


def test_a_computation_that_fails_is_tried_again_by_the_next() -> None:
    async def main() -> None:
        page.fails = True
        found = await asyncio.gather(*(page.names["ensure"]("doc") for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in found] == [ZeroDivisionError] * 3
        await page.names["ensure"]("doc")

    page = Page()
    asyncio.run(main())
    assert page.computed == ["doc", "doc"]
    assert page.names["computing"] == {}


def test_a_cancelled_put_is_whole() -> None:
    async def main() -> None:
        inside, go_on = threading.Event(), threading.Event()

        def put() -> PutStatus:
            inside.set()
            assert go_on.wait(HANG_SECONDS)
            return page.cache.put("doc", state)

        state = page.memory.state(64, fill=7)
        task = asyncio.create_task(asyncio.to_thread(put))
        await asyncio.to_thread(inside.wait, HANG_SECONDS)
        task.cancel()
        await asyncio.wait([task])
        go_on.set()

    page = Page()
    asyncio.run(main())  # waits for its threads
    assert fills(page.cache.get("doc")) == [7]
    assert page.cache.current_bytes == 64
