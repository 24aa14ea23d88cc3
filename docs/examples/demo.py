"""One document, three questions, three decoding loops: what is computed once, what comes back, and how fast.

    python docs/examples/demo.py [--json PATH]

The loops are Hugging Face `generate` in PyTorch, a plain jitted JAX loop that donates its cache, and google-tunix's own
Llama model; all run the same trained weights. Each answers from nothing and from a `StateCache`; its entry is evicted,
and the memory that comes back is observed. At last one framework continues from the state that the other prefilled. A
token that differs, or a byte that does not come back, makes the program exit with 1.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import loops
import smollm2
from agnostic_cache import KVState, StateCache, wrap
from agnostic_cache.eviction import PutStatus

NEW_TOKENS = 16
ROUNDS = 5
COLD_SECONDS = 12.0  # how long a loop may answer from nothing before it stops repeating that

Result = dict[str, Any]


def main() -> int:
    """Run the demo; return 0 where every token is equal and every byte came back."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    console = Console()
    loops.keep_compiled(smollm2.kept_copy() / "compiled")
    results: dict[str, Result] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("loading SmolLM2-135M-Instruct", total=1 + 3 * 3 + 2)

        def say(what: str) -> None:
            progress.update(task, description=what, advance=1)

        model, tokenizer = smollm2.load_torch()
        weights = smollm2.load_weights()
        document = smollm2.document(tokenizer)
        questions = [smollm2.question(tokenizer, text) for text in smollm2.QUESTIONS]
        max_len = len(document) + max(map(len, questions)) + NEW_TOKENS
        chosen = [
            loops.TorchLoop(model),
            loops.JaxLoop(weights, max_len),
            loops.TunixLoop(weights, max_len),
        ]
        say("loaded")
        answers: dict[str, list[list[int]]] = {}
        states: dict[str, KVState] = {}
        for loop in chosen:
            answers[loop.name], state, results[loop.name] = run_loop(loop, document, questions, say)
            states[loop.name] = wrap(state, length=len(document), layout=loop.layout).copy()  # as a cache keeps it
        for source, target in ((chosen[0], chosen[1]), (chosen[1], chosen[0])):
            say(f"{source.name} has prefilled, {target.name} goes on")
            crossed = cross(states[source.name], target, document, questions, answers[target.name])
            results[f"{source.name}_to_{target.name}"] = crossed
    show(console, results, [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers["torch"]])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    right = all(result["tokens_equal"] for result in results.values())
    same = answers["torch"] == answers["jax"] == answers["tunix"]
    freed = all(
        result["freed_bytes"] == result["entry_bytes"] for result in results.values() if "entry_bytes" in result
    )
    return 0 if right and same and freed else 1


def run_loop(
    loop: loops.Loop, document: list[int], questions: list[list[int]], say: Callable[[str], None]
) -> tuple[list[list[int]], Any, Result]:
    """Answer from nothing and from a cache, time the first token, evict, and look at the memory.

    Returns:
        The token ids of the answers, the state of the document, and the figures.
    """
    asked = [(question, NEW_TOKENS) for question in questions]
    asked += [(questions[0], 1)] * (ROUNDS - len(questions))  # for the time to the first token alone
    say(f"{loop.name}: compiling, and answering from nothing")
    # Both JAX loops compute prompts in chunks: two shapes, and that of one token, are all that they compile.
    loop.cold(document[: loops.CHUNK], questions[0], new_tokens=2)
    cold, begin = [], time.perf_counter()
    for question, new_tokens in asked:
        answer, state = loop.cold(document, question, new_tokens)
        cold.append(answer)
        if (time.perf_counter() - begin) * (len(cold) + 1) / len(cold) > COLD_SECONDS:
            break  # one more would not fit

    say(f"{loop.name}: answering from the cache")
    key = ("document", len(document))
    entry_bytes = sum(wrap(state).compact_nbytes().values())
    cache = StateCache(entry_bytes)
    if cache.put(key, state) is not PutStatus.LEGAL:
        message = f"the state of {entry_bytes} bytes did not fit into a budget of that size"
        raise RuntimeError(message)
    warm, fork = [], []
    for question, new_tokens in asked:  # in turns, so that a machine that is busy is busy for both
        warm.append(loop.warm(lambda: cache.get(key), document, question, new_tokens))
        fork.append(loop.warm(lambda: loop.fork_by_hand(state), document, question, 1))

    say(f"{loop.name}: evicting")
    newcomer = loop.small_state()
    before = loop.live_bytes()
    cache.put("newcomer", newcomer)  # does not fit beside the document
    freed_bytes = before + cache.current_bytes - loop.live_bytes()
    answers = [answer.ids for answer in warm[: len(questions)]]
    figures = {
        "prefix_tokens": len(document),
        "cold_seconds": statistics.median(answer.first_seconds for answer in cold),
        "cold_rounds": len(cold),
        "warm_seconds": statistics.median(answer.first_seconds for answer in warm),
        "fork_seconds": statistics.median(answer.first_seconds for answer in fork),
        "tokens_equal": all(hit.ids == miss.ids for hit, miss in zip(warm, cold, strict=False)),
        "entry_bytes": entry_bytes,
        "freed_bytes": freed_bytes,
    }
    return answers, state, figures


def cross(
    prefilled: KVState, target: loops.Loop, document: list[int], questions: list[list[int]], expected: list[list[int]]
) -> Result:
    """Let `target` answer from a state that another framework computed."""
    answers, seconds = [], []
    zero_copy = copied = 0
    for question in questions:
        begin = time.perf_counter()
        crossed = prefilled.to(target.framework)
        seconds.append(time.perf_counter() - begin)
        zero_copy, copied = shared_bytes(prefilled, crossed)
        native = functools.partial(crossed.unwrap, like=target.template(), layout=target.layout)
        answers.append(target.warm(native, document, question, NEW_TOKENS).ids)
    return {
        "tokens_equal": answers == expected,
        "zero_copy_bytes": zero_copy,
        "copied_bytes": copied,
        "seconds": statistics.median(seconds),
    }


def shared_bytes(state: KVState, crossed: KVState) -> tuple[int, int]:
    """Return how many bytes of `crossed` lie in the memory of `state`, and how many do not."""
    held = {storage.key for storage in state.storages()}
    zero_copy = sum(storage.nbytes for storage in crossed.storages() if storage.key in held)
    return zero_copy, crossed.nbytes - zero_copy


def show(console: Console, results: dict[str, Result], answers: list[str]) -> None:
    """Print the answers and the figures."""
    for text, answer in zip(smollm2.QUESTIONS, answers, strict=True):
        console.print(f"[bold]{text}[/bold]\n  {answer.strip()}", highlight=False)
    table = Table(title="Time to first token after a 2,048-token document, and the memory of its entry")
    for column in ("loop", "cold", "warm", "fork by hand", "tokens", "entry", "freed"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    crossing = Table(title="One framework prefills, the other goes on")
    for column in ("from, to", "tokens", "without a copy", "copied", "crossing"):
        crossing.add_column(column, justify="left" if column == "from, to" else "right")
    for name, result in results.items():
        equal = "equal" if result["tokens_equal"] else "[red]DIFFER[/red]"
        if "entry_bytes" in result:
            times = [f"{result[f'{kind}_seconds'] * 1000:,.0f} ms" for kind in ("cold", "warm", "fork")]
            table.add_row(name, *times, equal, megabytes(result["entry_bytes"]), megabytes(result["freed_bytes"]))
        else:
            moved = [megabytes(result[f"{kind}_bytes"]) for kind in ("zero_copy", "copied")]
            crossing.add_row(name.replace("_", " "), equal, *moved, f"{result['seconds'] * 1000:,.1f} ms")
    console.print(table)
    console.print(crossing)


def megabytes(nbytes: int) -> str:
    """Return a size in MB, as people read it."""
    return f"{nbytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
