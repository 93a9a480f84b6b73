"""Corpus and shards: `python -m jobs.prepare recipe.yaml [prepare.key=value ...]`.

Reads the sources, cleans, judges, removes duplicates and evaluation items, and writes the `corpus`
stage; then lays the documents out as packed token rows in the `shards` stage. Between the two it
trains the `tokenizer` stage, unless the recipe names a tokenizer.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs.entry import main, perform, section
from jobs.shards import SHARD_KEYS, build_shards
from jobs.tokenizer import build_tokenizer
from raylign.config import PrepareConfig, Recipe, UserError
from raylign.data.corpus.pipeline import build_corpus as write_corpus
from raylign.data.sources.slices import plan_slices
from raylign.run import Draft, Run, Stage, content_hash
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `corpus`, `tokenizer` and `shards` stages."""
    config = section(recipe, "prepare", PrepareConfig)
    build_corpus(recipe, run, board)
    if config.tokenizer is None:
        tokenizer = build_tokenizer(recipe, run, board)
        build_shards(recipe, run, board, tokenizer.path, tokenizer.manifest.content)
    else:
        if not config.tokenizer.is_dir():
            raise UserError(f"prepare.tokenizer={config.tokenizer}: no such directory")
        path = config.tokenizer.absolute()
        build_shards(recipe, run, board, path, content_hash(path))


def build_corpus(recipe: Recipe, run: Run, board: ProgressBoard) -> Stage:
    """The `corpus` stage."""
    config = section(recipe, "prepare", PrepareConfig)
    slices = plan_slices(config.sources, config.textbook)
    settings: dict[str, Any] = {
        "prepare": config.model_dump(mode="json", exclude=SHARD_KEYS),
        "seed": recipe.seed,
    }
    if any(source.kind in ("pydoc", "docstrings") for source in config.sources):
        settings["python"] = sys.version.split()[0]  # its documentation is part of the corpus
    parents = {str(s.path): content_hash(s.path) for s in config.sources if s.path is not None}

    def build(draft: Draft) -> None:
        seed = derive_seed(recipe.seed, "corpus")
        summary = write_corpus(slices, config, seed, draft.path, board)
        draft.summary.update(summary)
        board.say(
            f"  {summary['documents']:,} of {summary['read']:,} documents kept, "
            f"{summary['chars'] / 1e6:.1f} M characters"
        )

    return perform(run, "corpus", settings, parents, board, build)


if __name__ == "__main__":
    main("prepare", run)
