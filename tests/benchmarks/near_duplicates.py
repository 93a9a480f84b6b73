"""Removal of near-duplicates beside other tools: `python tests/benchmarks/near_duplicates.py -h`.

All tools read the same planted corpus (`planted.py`) from Parquet and write what they keep as
Parquet, with word 5-grams, 14 bands of 8 rows and two workers. Printed are CPU seconds and peak
memory of the whole process tree (`process_tree.py`), start-up included, and how good the result is
against exact similarities (`duplicate_quality.py`). CPU seconds move with what else the machine
does, hence the share that others used; compare ratios of one run only, and none below some ten
thousand documents, where starting up is all there is.

The other tools run in environments of their own, given by their interpreters: one with
`datatrove[processing,io]==0.10.0` and `spacy`, one with `py-data-juicer==1.6.1`, `ray[data]` and
`aiohttp`. Most of datatrove's time goes into spaCy's words: `--datatrove-regex` shows what is left
with a regular expression instead. This project folds ASCII case only, and no accents.

With `--work`, measurements that are finished there are printed and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(HERE)]

import numpy as np
import pyarrow.parquet as pq
from duplicate_quality import (
    BANDS,
    Pairs,
    Shingles,
    compare,
    find_pairs,
    nearest_kept,
    read_outcome,
    read_shingles,
    share_found,
)
from planted import PART, write_corpus
from process_tree import Usage, measure

OURS = "raylign"
EXHAUSTIVE = 200_000
"""Documents among which all pairs are looked for; beyond, planted ones only."""


def main() -> None:
    """Run what was asked for and print it."""
    options = parse()
    work = Path(options.work or tempfile.mkdtemp(prefix="near-duplicates-"))
    try:
        if options.documents:
            compare_tools(work, options.documents, list_commands(options))
        if options.sizes:
            show_growth(work, [int(size) for size in options.sizes.split(",")])
    finally:
        if options.work is None:
            shutil.rmtree(work)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--documents", type=int, default=100_000, help="0: no comparison")
    parser.add_argument("--datatrove-python", help="interpreter that has datatrove")
    parser.add_argument("--datatrove-regex", action="store_true", help="once more without spaCy")
    parser.add_argument("--datajuicer-python", help="interpreter that has data-juicer")
    parser.add_argument("--sizes", help="growth of ours, e.g. 10000,100000,1000000")
    parser.add_argument("--work", help="directory that keeps corpora and measurements")
    return parser.parse_args()


def list_commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Tool to command line; CORPUS and OUTPUT are inserted after the script."""
    commands = {OURS: own_command()}
    if options.datatrove_python:
        script = str(HERE / "peers" / "datatrove_minhash.py")
        commands["datatrove"] = [options.datatrove_python, script, "spacy"]
        if options.datatrove_regex:
            commands["datatrove-regex"] = [options.datatrove_python, script, "regex"]
    if options.datajuicer_python:
        script = str(HERE / "peers" / "datajuicer_minhash.py")
        commands["data-juicer"] = [options.datajuicer_python, script]
    return commands


def own_command() -> list[str]:
    """This project's side."""
    return [sys.executable, str(HERE / "near_duplicates_ours.py")]


def run_tool(root: Path, tool: str, command: list[str]) -> Usage:
    """Measure a tool on `root/corpus`, unless that was done before."""
    record = root / f"{tool}.json"
    if not record.exists():
        output = root / tool
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        arguments = [*command[:2], str(root / "corpus"), str(output), *command[2:]]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        usage = measure(arguments, environment, errors=root / f"{tool}.log")
        if usage.returncode:
            sys.exit(f"{tool} failed with {usage.returncode}; see {root / f'{tool}.log'}")
        record.write_text(json.dumps(asdict(usage)))
    return Usage(**json.loads(record.read_text()))


def compare_tools(work: Path, documents: int, commands: dict[str, list[str]]) -> None:
    """Cost and quality of every tool on one corpus."""
    root = work / str(documents)
    size = write_corpus(root / "corpus", documents)
    show(f"{documents:,} documents, {size / 1e6:,.1f} MB of text\n")
    usages = {tool: run_tool(root, tool, command) for tool, command in commands.items()}
    outcomes = {tool: read_outcome(root / tool, tool, documents, PART) for tool in usages}
    show(f"{'':16}{'CPU s':>9}{'ratio':>8}{'peak GB':>9}{'kept':>10}{'wall s':>8}  others used")
    for tool, usage in usages.items():
        ratio = usage.cpu_seconds / usages[OURS].cpu_seconds
        show(
            f"{tool:16}{usage.cpu_seconds:9.1f}{ratio:8.1f}{usage.peak_bytes / 1e9:9.2f}"
            f"{outcomes[tool].kept.sum():10,}{usage.wall_seconds:8.1f}{usage.others:8.0%}"
        )
    show("")
    for tool, usage in usages.items():
        stages = json.loads(usage.output.strip().splitlines()[-1])
        words = stages.get("CPU of words")
        share = f" (words {words / usage.cpu_seconds:.0%} of all CPU)" if words else ""
        listed = ", ".join(f"{name} {seconds:g}" for name, seconds in stages.items())
        show(f"{tool:16}seconds: {listed}{share}")
    shingles = read_shingles(sorted((root / "corpus").glob("part-*.parquet")))
    show_planted(root, outcomes, shingles)
    show_keepers(outcomes, shingles)
    if documents <= EXHAUSTIVE:
        show_exhaustive(outcomes, find_pairs(shingles))


def show_planted(root: Path, outcomes: dict, shingles: Shingles) -> None:
    """How many planted pairs were separated, by exact similarity."""
    truth = pq.read_table(root / "corpus" / "truth.parquet", columns=["document", "base"])
    documents = np.stack([truth["document"].to_numpy(), truth["base"].to_numpy()], axis=1)
    pairs = Pairs(documents, compare(shingles, documents))
    show("\nplanted pairs of which not both are kept, by exact Jaccard similarity of 5-grams")
    show_bands(pairs, outcomes)


def show_bands(pairs: Pairs, outcomes: dict) -> None:
    """One line a tool: shares by band, and all at 0.8 or more."""
    names = [f"{low:.1f}-{min(high, 1):.1f}" for low, high in BANDS]
    show(f"{'':16}{'>= 0.8':>9}" + "".join(f"{name:>9}" for name in names))
    counts = [count for count, _ in share_found(pairs, next(iter(outcomes.values())).kept)]
    show(f"{'pairs':16}{sum(counts[:2]):9,}" + "".join(f"{count:9,}" for count in counts))
    for tool, outcome in outcomes.items():
        found = share_found(pairs, outcome.kept)
        high = sum(count * share for count, share in found[:2] if count) / sum(counts[:2])
        show(f"{tool:16}{high:9.4f}" + "".join(f"{share:9.4f}" for _, share in found))


def show_keepers(outcomes: dict, shingles: Shingles) -> None:
    """How much a removed document has in common with the one that it went for."""
    show("\nremoved documents by exact similarity to the one that stands for them")
    show(f"{'':16}{'removed':>9}{'>= 0.8':>9}{'0.7-0.8':>9}{'0.5-0.7':>9}{'< 0.5':>9}")
    for tool, outcome in outcomes.items():
        gone = np.flatnonzero(outcome.keeper >= 0)
        if not len(gone):
            show(f"{tool:16}{(~outcome.kept).sum():9,}   does not tell")
            continue
        similarity = compare(shingles, np.stack([gone, outcome.keeper[gone]], axis=1))
        show(f"{tool:16}{len(gone):9,}" + list_shares(similarity))


def show_exhaustive(outcomes: dict, pairs: Pairs) -> None:
    """Against all pairs that there are."""
    show("\nall pairs that there are, found exhaustively: share separated (recall)")
    show_bands(pairs, outcomes)
    show("\nremoved documents by exact similarity to the nearest kept one (>= 0.8: precision)")
    show(f"{'':16}{'removed':>9}{'>= 0.8':>9}{'0.7-0.8':>9}{'0.5-0.7':>9}{'< 0.5':>9}")
    for tool, outcome in outcomes.items():
        nearest = nearest_kept(pairs, outcome.kept)[~outcome.kept]
        show(f"{tool:16}{len(nearest):9,}" + list_shares(nearest))


def list_shares(similarity: np.ndarray) -> str:
    """Shares at 0.8 or more, 0.7-0.8, 0.5-0.7, and below."""
    bounds = (1.01, 0.8, 0.7, 0.5, -1.0)
    shares = [((similarity >= low) & (similarity < high)).mean() for high, low in pairwise(bounds)]
    return "".join(f"{share:9.4f}" for share in shares)


def show_growth(work: Path, sizes: list[int]) -> None:
    """What this project needs for corpora of several sizes."""
    kinds = ("keys", "rows", "sketches", "facts")
    show(
        f"\n{'documents':>10}{'CPU s':>8}{'ms a doc':>10}{'peak GB':>9}{'wall s':>8}{'others':>8}"
        f"{'candidates':>12}{'verified':>10}   index bytes a document"
    )
    for size in sizes:
        root = work / str(size)
        write_corpus(root / "corpus", size)
        usage = run_tool(root, OURS, own_command())
        output = root / OURS
        funnel = json.loads((output / "corpus" / "funnel.json").read_text())
        parts = [
            sum(file.stat().st_size for file in (output / "signatures").glob(f"*.{kind}.npy"))
            for kind in kinds
        ]
        listed = ", ".join(
            f"{kind} {part / size:.1f}" for kind, part in zip(kinds, parts, strict=True)
        )
        found = find_counts(funnel)
        show(
            f"{size:10,}{usage.cpu_seconds:8.1f}{usage.cpu_seconds / size * 1e3:10.4f}"
            f"{usage.peak_bytes / 1e9:9.2f}{usage.wall_seconds:8.1f}{usage.others:8.0%}"
            f"{found[0] / size:12.3f}{found[1] / size:10.3f}   {sum(parts) / size:.1f}: {listed}"
        )


def find_counts(funnel: dict) -> tuple[int, int]:
    """Candidate pairs and verified ones."""
    duplicates = funnel["duplicates"]
    return duplicates["candidates"], duplicates["verified"]


def show(line: str) -> None:
    """Print."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
