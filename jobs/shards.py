"""Shards from a finished corpus: `python -m jobs.shards recipe.yaml [prepare.key=value ...]`.

Weighs the domains, tokenises, and packs: the last stage of `jobs.prepare` alone, for another
mixture or row length without doing the corpus again. Reads the run's `corpus` stage and its
`tokenizer` stage, or the tokenizer that the recipe names.
"""

from __future__ import annotations

from pathlib import Path

from jobs.entry import locate, main, perform, section
from raylign.config import PrepareConfig, Recipe
from raylign.data.documents import list_document_files
from raylign.data.packing import list_hashes
from raylign.data.shards.pack import pack_corpus
from raylign.data.shards.tokenise import Vocabulary
from raylign.models.loading import load_tokenizer, pad_id
from raylign.run import Draft, Run, Stage
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard

# What the shards depend on besides corpus and tokenizer, and the corpus does not.
SHARD_KEYS = {
    "tokenizer",
    "sequence_length",
    "shard_rows",
    "validation_share",
    "mixture",
    "packing",
}


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `shards` stage, of a corpus and a tokenizer that are there."""
    config = section(recipe, "prepare", PrepareConfig)
    path, content = locate(run, config.tokenizer, "tokenizer", "tokenizer", "prepare.tokenizer")
    build_shards(recipe, run, board, path, content)


def build_shards(
    recipe: Recipe, run: Run, board: ProgressBoard, tokenizer: Path, content: str
) -> Stage:
    """The `shards` stage, with the tokenizer in a directory and its content hash."""
    config = section(recipe, "prepare", PrepareConfig)
    corpus = run.require("corpus", "prepare")
    parents = {"corpus": corpus.manifest.content, "tokenizer": content}

    def build(draft: Draft) -> None:
        loaded = load_tokenizer(tokenizer)
        vocabulary = Vocabulary(
            directory=tokenizer,
            content=content,
            size=len(loaded),
            eos=loaded.eos_token_id,
            pad=pad_id(loaded),
        )
        summary = pack_corpus(
            list_document_files(corpus.path, "prepare"),
            vocabulary,
            config.sequence_length,
            config.shard_rows,
            config.validation_share,
            derive_seed(recipe.seed, "shards"),
            draft.path,
            board,
            config.packing,
            config.mixture,
        )
        draft.summary.update(summary)
        draft.hashes.update(list_hashes(draft.path))

    settings = {
        "prepare": config.model_dump(mode="json", include=SHARD_KEYS - {"tokenizer"}),
        "seed": recipe.seed,
    }
    return perform(run, "shards", settings, parents, board, build, resume=True)


if __name__ == "__main__":
    main("shards", run)
