"""One document, three questions, three decoding loops, and a chat: what is computed once, what comes back, how fast.

    python docs/examples/demo.py [--json PATH] [--plot PATH] [--storage URL]

The loops are Hugging Face `generate` in PyTorch, a plain jitted JAX loop that donates its cache, and google-tunix's own
Llama model; all run the same trained weights. Each answers from nothing and from a `StateCache`; its entry is evicted,
and the memory that comes back is observed. Then one framework goes on from what another has put into a `PrefixCache`.
At last PyTorch and JAX hold a chat of five turns, each answered with such a cache and without one, and the time to its
first token is drawn. With a storage (``--storage file:///tmp/kv``) the chats begin with what is there: nothing in the
first run, and what PyTorch has just computed for JAX; in the next run, from the first turn on, what the last one left.

A token that differs, or a byte that does not come back, makes the program exit with 1.
"""

import argparse
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

import chat
import loops
import smollm2
from agnostic_cache import KVState, StateCache, open_storage, wrap
from agnostic_cache.errors import AgnosticCacheError
from agnostic_cache.eviction import PutStatus

ROUNDS = 5

Result = dict[str, Any]


def parse() -> argparse.Namespace:
    """Read the command line; end the program where something in it cannot be done."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw the chat here; by default beside the figures, or in demo.png")
    parser.add_argument("--storage", help="URL of what the chat begins with, and of where it leaves its states")
    arguments = parser.parse_args()
    arguments.plot = arguments.plot or (arguments.json or Path("demo.json")).with_suffix(".png")
    if arguments.plot.suffix[1:] not in chat.KINDS:
        parser.error(
            f"--plot {arguments.plot}: no kind of image; end the name with .{' or .'.join(sorted(chat.KINDS))}"
        )
    if arguments.storage:
        try:
            open_storage(arguments.storage).close()  # now, and not when minutes have passed
        except AgnosticCacheError as error:
            parser.error(f"--storage: {error}")
    return arguments


def main() -> int:
    """Run the demo; return 0 where every token is equal and every byte came back."""
    arguments = parse()
    console = Console()
    loops.keep_compiled(smollm2.kept_copy() / "compiled")
    results: dict[str, Result] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("loading SmolLM2-135M-Instruct", total=1 + 3 * 3 + 3 + 2 * len(chat.QUESTIONS))

        def say(what: str) -> None:
            progress.update(task, description=what, advance=1)

        model, tokenizer = smollm2.load_torch()
        weights = smollm2.load_weights()
        document = smollm2.document(tokenizer)
        questions = [smollm2.question(tokenizer, text) for text in smollm2.QUESTIONS]
        max_len = len(document) + chat.ROOM
        chosen = [
            loops.TorchLoop(model),
            loops.JaxLoop(weights, max_len),
            loops.TunixLoop(weights, max_len),
        ]
        say("loaded")
        answers: dict[str, list[list[int]]] = {}
        misses: dict[str, loops.Answer] = {}
        states: dict[str, KVState] = {}
        for loop in chosen:
            answers[loop.name], misses[loop.name], state, results[loop.name] = run_loop(loop, document, questions, say)
            states[loop.name] = wrap(state, length=len(document), layout=loop.layout).copy()  # as a cache keeps it
        in_torch, in_jax, in_tunix = chosen
        for source, target in ((in_torch, in_jax), (in_jax, in_torch), (in_torch, in_tunix)):
            say(f"{source.name} has prefilled, {target.name} goes on")
            crossed = cross(states[source.name], target, document, questions[:2], answers[target.name][:2])
            results[f"{source.name}_to_{target.name}"] = crossed
        chats = {}
        for loop in (in_torch, in_jax):
            known = None if arguments.storage else states[loop.name]
            chats[loop.name] = chat.talk(
                loop,
                document,
                tokenizer,
                say,
                known=known,
                first_miss=misses[loop.name],
                storage=arguments.storage,
            )
    show(console, results, [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers["torch"]])
    show_chats(console, chats)
    chat.draw(arguments.plot, chats)
    console.print(f"The chat is drawn in {arguments.plot}", highlight=False)
    for name, turns in chats.items() if arguments.storage else ():
        found, asked = (turns[0][f"{kind}_tokens"] for kind in ("hit", "prompt"))
        console.print(f"{name}: {found:,} of the first {asked:,} tokens came from the storage", highlight=False)
    results["chat"] = {"tokens_equal": all(turn["tokens_equal"] for turns in chats.values() for turn in turns), **chats}
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
) -> tuple[list[list[int]], loops.Answer, Any, Result]:
    """Answer from nothing and from a cache, time the first token, evict, and look at the memory.

    Returns:
        The token ids of the answers, the first answer from nothing, the state of the document, and the figures.
    """
    say(f"{loop.name}: compiling, and answering from nothing")
    loop.compile(document, questions[0])
    cold, state = loop.cold(document, questions[0], chat.NEW_TOKENS)
    say(f"{loop.name}: answering from the cache")
    key = ("document", len(document))
    entry_bytes = sum(wrap(state).compact_nbytes().values())
    cache = StateCache(entry_bytes)
    if cache.put(key, state) is not PutStatus.LEGAL:
        message = f"the state of {entry_bytes} bytes did not fit into a budget of that size"
        raise RuntimeError(message)
    warm, fork = [], []
    asked = [(question, chat.NEW_TOKENS) for question in questions]
    asked += [(questions[0], 1)] * (ROUNDS - len(questions))  # for the time to the first token alone
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
        "cold_seconds": cold.first_seconds,
        "warm_seconds": statistics.median(answer.first_seconds for answer in warm),
        "fork_seconds": statistics.median(answer.first_seconds for answer in fork),
        "tokens_equal": warm[0].ids == cold.ids and all(a.ids[:1] == b.ids for a, b in zip(warm, fork, strict=True)),
        "entry_bytes": entry_bytes,
        "freed_bytes": freed_bytes,
    }
    return answers, cold, state, figures


def cross(
    prefilled: KVState, target: loops.Loop, document: list[int], questions: list[list[int]], expected: list[list[int]]
) -> Result:
    """Let `target` answer from a state that another framework computed, and time the crossing by itself."""
    begin = time.perf_counter()
    crossed = prefilled.to(target.framework)
    seconds = time.perf_counter() - begin
    zero_copy, copied = shared_bytes(prefilled, crossed)
    answers, hits = [], []
    for question in questions:
        cache = chat.make_cache()
        cache.insert(document, prefilled)
        answers.append(target.reply(document + question, chat.NEW_TOKENS, cache).ids)
        hits.append(cache.stats().hit_tokens)
    return {
        "tokens_equal": answers == expected and hits == [len(document)] * len(questions),
        "zero_copy_bytes": zero_copy,
        "copied_bytes": copied,
        "seconds": seconds,
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


def show_chats(console: Console, chats: dict[str, list[Result]]) -> None:
    """Print what was said, and what it took."""
    table = Table(title="A chat of five turns: time to the first token, without a PrefixCache and with one")
    for column in ("question", "answer", *(f"{name}, {kind}" for name in chats for kind in ("without", "with"))):
        table.add_column(column, justify="left" if column in {"question", "answer"} else "right")
    for turns in zip(*chats.values(), strict=True):
        times = [turn[f"{kind}_seconds"] for turn in turns for kind in ("without", "with")]
        equal = all(turn["tokens_equal"] for turn in turns)
        said = turns[0]["answer"] if equal else "[red]DIFFERS[/red]"
        table.add_row(turns[0]["question"], said, *(f"{seconds * 1000:,.0f} ms" for seconds in times))
    console.print(table)


def megabytes(nbytes: int) -> str:
    """Return a size in MB, as people read it."""
    return f"{nbytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
