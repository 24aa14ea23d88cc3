"""Ask a tiny model of every type that transformers maps, each in a process with limits, and print one table.

``nox -s architectures`` runs it over all types and compares `docs/structures.md` with what came of it; ``-- --write``
writes that section anew. ``-- TYPE ...`` asks some types alone, ``-- --family causal`` those of one family.
"""

import argparse
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import architectures
import torch
from architecture_calls import BYPASS, EXCEPTION, PLAINFAIL, REUSE, UNBUILT, WRONG, Result, check

PAGE = Path(__file__).parents[2] / "docs" / "structures.md"
BEGIN, END = "<!-- written by nox -s architectures -- --write -->", "<!-- end of what is written -->"
# Of each family: its title, how many types must be built and run, and of 5.23 how many must be reused.
FAMILIES = {
    "causal": ("Causal language models", 184),
    "image-text": ("Image-text-to-text models, asked by text alone", 85),
    "seq2seq": ("Sequence-to-sequence models", 20),
}
MEMORY = 8 << 30  # bytes of address space: torch alone maps two
SECONDS = 90  # of CPU time: the slowest types take ten
PATIENCE = 10  # times that on the wall, on a machine with other work
ORDER = (EXCEPTION, WRONG, PLAINFAIL, UNBUILT, BYPASS, REUSE)


def main() -> int:
    """Ask the types; return 0 where all answers are right, enough types are built, and the page says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them where none is named")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at one time")
    parser.add_argument("--json", type=Path, help="where to write every call of every type")
    parser.add_argument("--write", action="store_true", help="write the section of docs/structures.md")
    asked = parser.parse_args()
    began = time.monotonic()
    results = list(sweep(asked.family or list(FAMILIES), asked.types, asked.jobs))
    results.sort(key=lambda result: (list(FAMILIES).index(result.family), ORDER.index(result.verdict), result.model_type))
    show("\n".join(table(results)))
    show(f"{len(results)} types in {(time.monotonic() - began) / 60:.0f} minutes, {asked.jobs} at a time")
    if asked.json:
        asked.json.write_text(json.dumps([plain_data(result) for result in results], indent=1), "utf-8")
    wrong = list(complaints(results, whole=not asked.types))
    if not asked.types and not asked.family:
        text = PAGE.read_text("utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        fresh = "".join([before, BEGIN, "\n\n", "\n".join(section(results)), "\n", END, after])
        if asked.write:
            PAGE.write_text(fresh, "utf-8")
        elif fresh != text:
            wrong.append(f"docs/{PAGE.name} says otherwise: nox -s architectures -- --write")
    show("\n".join(wrong))
    return bool(wrong)


def sweep(families: Iterable[str], types: Sequence[str], jobs: int) -> Iterator[Result]:
    """Ask types, some at a time, each in a process of its own, and yield what came of each as it ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["architecture_calls", "transformers.models.llama.modeling_llama"])
    todo = [(name, family) for family in families for name in types_of(family, types)]
    todo.reverse()
    running: dict[Any, tuple[str, str, Any, float]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            name, family = todo.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_ask, args=(name, family, theirs))
            process.start()
            theirs.close()
            running[ours] = name, family, process, time.monotonic()
        for ours in multiprocessing.connection.wait(list(running), timeout=1):
            name, family, process, _ = running.pop(ours)
            try:
                result = ours.recv()
            except EOFError:
                process.join()
                result = Result(name, family, EXCEPTION, f"its process ended with {process.exitcode}")
            process.join()
            show(line(result))
            yield result
        for _, _, process, began in running.values():
            if time.monotonic() - began > SECONDS * PATIENCE:
                process.kill()


def types_of(family: str, asked: Sequence[str]) -> list[str]:
    """Return the types of a family, those that are asked for where some are."""
    return [name for name in architectures.types(family) if not asked or name in asked]


def _ask(name: str, family: str, pipe: Any) -> None:
    """Ask one type; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # transformers tells of every default that a tiny config departs from
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")
    pipe.send(check(name, family))
    pipe.close()


def complaints(results: Sequence[Result], *, whole: bool) -> Iterator[str]:
    """Yield what is not as it must be."""
    for family, (title, least) in FAMILIES.items():
        own = [result for result in results if result.family == family]
        bad = [result.model_type for result in own if result.verdict in {WRONG, EXCEPTION}]
        if bad:
            yield f"{title}: not as plain generate: {', '.join(bad)}"
        built = sum(result.verdict not in {PLAINFAIL, UNBUILT} for result in own)
        if own and whole and built < least:
            yield f"{title}: {built} types built and run, {least} are asked for"


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of the table: totals of each family, and each type with what came of it."""
    for family, (title, _) in FAMILIES.items():
        own = [result for result in results if result.family == family]
        if own:
            counted = Counter(result.verdict for result in own)
            yield f"\n{title}: {len(own)} types: " + ", ".join(f"{counted[v]} {v}" for v in ORDER if counted[v])
            yield from map(line, own)


def line(result: Result) -> str:
    """A type in one line."""
    calls = result.calls
    hits = [calls[name].hit for name in ("question 2", "chat turn 2", "even batch after the part") if name in calls]
    cannot = f" [plain cannot: {', '.join(result.unasked)}]" if result.unasked else ""
    weak = " [weak]" if result.weak else ""
    return f"{result.verdict:9} {result.model_type:28} {result.layers:24} {hits or ''} {result.reason}{cannot}{weak}"


def section(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of the section of the page: types by what came of them, and by what their layers keep."""
    for family, (title, _) in FAMILIES.items():
        own = [result for result in results if result.family == family]
        built = sum(result.verdict not in {PLAINFAIL, UNBUILT} for result in own)
        yield f"### {title}: {built} of {len(own)} types"
        yield ""
        yield "| result | layers keep | types |"
        yield "|---|---|---|"
        rows: dict[tuple[str, str], list[str]] = {}
        for result in own:
            rows.setdefault((_in_words(result), result.layers or "-"), []).append(f"`{result.model_type}`")
        order = [REUSE, BYPASS, WRONG, EXCEPTION, PLAINFAIL, UNBUILT]
        first = {_in_words(result): order.index(result.verdict) for result in own}
        for (words, layers), names in sorted(rows.items(), key=lambda row: (first[row[0][0]], row[0])):
            yield f"| {words} | {layers} | {', '.join(sorted(names))} |"
        yield ""


def _in_words(result: Result) -> str:
    """What came of a type, without what differs from machine to machine."""
    why = result.reason.partition(" (")[0].partition(": ")[0].replace("|", "\\|")
    return {
        REUSE: "reused",
        BYPASS: f"bypassed: {result.reason.partition('; ')[0]}",
        WRONG: "**not as plain `generate`**",
        EXCEPTION: "**raises**",
        PLAINFAIL: f"plain `generate` raises {why}",
        UNBUILT: f"no tiny model: {why}",
    }[result.verdict]


def plain_data(result: Result) -> dict[str, Any]:
    """A result as JSON takes it; infinity as a word."""
    calls = {name: {**call._asdict(), "off": str(call.off)} for name, call in result.calls.items()}
    return {**result._asdict(), "calls": calls}


def show(text: str) -> None:
    """Print, at once."""
    if text:
        print(text, flush=True)  # noqa: T201 - a program


if __name__ == "__main__":
    sys.exit(main())
