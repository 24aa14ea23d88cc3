"""Write the table of verdicts that the adapter ships: prove a tiny model of every type, each in a process of its own.

``python tests/architectures/verdict_table.py`` proves all types with the installed transformers and puts what it finds
in place of this release's lines; lines of other releases stay. ``--family causal`` and ``TYPE ...`` prove some alone,
and ``--into PATH`` writes another file. Windows of tiny models are shorter than the proof, so that their verdicts hold
for windows of any length; types whose window may be missing are proven without it, too.
"""

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import architectures
import transformers
from architecture_fields import FIELDS

from agnostic_cache_adapters import transformers as adapter
from agnostic_cache_adapters.transformers.modeling_source import digest_of
from agnostic_cache_adapters.transformers.proof import prove
from agnostic_cache_adapters.transformers.verdicts import record_of

SHIPPED = Path(str(adapter.__file__)).parent / "verdicts.json"
SECONDS = 120
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
ANY_WINDOW = ("mistral", "mixtral", "ministral", "starcoder2", "qwen3", "qwen2_moe", "qwen3_moe", "granite")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    **{kind: [{"sliding_window": None}] for kind in ANY_WINDOW},
    "phi3": [{"sliding_window": 16}, {"rope_parameters": LONGROPE}],
    "llama": [{"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}],
    **{kind: [{"index_n_heads": 32}] for kind in ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4")},  # fewer heads tie
}
"""What else checkpoints of a type have than its tiny model; of equal digests, the last one counts."""


def main() -> None:
    """Prove the types, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them where none is named")
    parser.add_argument("--family", action="append", choices=("causal", "image-text"), help="only this family")
    parser.add_argument("--into", type=Path, default=SHIPPED, help="the file")
    asked = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for family in asked.family or ("causal", "image-text"):
        for kind in asked.types or architectures.types(family):
            for record in _in_a_process(kind, family):
                told = record.pop("not proven", None)
                sys.stdout.write(f"{kind}: {told or json.dumps(record)}\n")
                if told is None:
                    found[record.pop("digest")] = record
    merge(asked.into, found, whole=not asked.types and not asked.family)


def merge(path: Path, found: dict[str, dict[str, Any]], *, whole: bool) -> None:
    """Put records into a table; a whole release takes the place of what is there of it."""
    table = json.loads(path.read_text("utf-8"))["verdicts"] if path.exists() else {}
    if whole:
        table = {digest: old for digest, old in table.items() if old["transformers"] != transformers.__version__}
    table |= found
    lines = sorted(table.items(), key=lambda item: (item[1]["transformers"], item[1]["type"], item[0]))
    text = ",\n".join(f"{json.dumps(digest)}: {json.dumps(record)}" for digest, record in lines)
    path.write_text(f'{{"verdicts": {{\n{text}\n}}}}\n', "utf-8")


def _in_a_process(kind: str, family: str) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_prove, args=(kind, family, there))
    process.start()
    there.close()
    found = []
    try:
        while True:
            found.append(here.recv())
    except EOFError:
        process.join()
    if process.exitcode:
        found.append({"not proven": f"the process ended with {process.exitcode}"})
    return found


def _prove(kind: str, family: str, told: Any) -> None:
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some classes print
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for variant in [{}, *(VARIANTS.get(kind, []) if family == "causal" else [])]:
        FIELDS[kind] = {**FIELDS.get(kind, {}), **variant}  # of this process alone
        try:
            model = architectures.tiny(kind, family)
            record = {"digest": digest_of(model), "type": kind, "transformers": transformers.__version__}
            told.send({**record, **record_of(prove(model))})
        except Exception as error:  # noqa: BLE001 - what cannot be built or run is named, and the rest goes on
            told.send({"not proven": f"{type(error).__name__}: {str(error)[:100]}"})


if __name__ == "__main__":
    main()
