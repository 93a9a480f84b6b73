"""Tokenizer: `python -m jobs.tokenizer recipe.yaml [tokenizer.key=value ...]`.

Trains a byte-level BPE on a sample of the corpus, gives it a chat template, and compares it with
plain baselines on documents it has not seen. Writes the `tokenizer` stage.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jobs.entry import locate, main, perform
from raylign.config import Recipe, TokenizerConfig, UserError
from raylign.data.documents import list_document_files, sample_texts
from raylign.run import Draft, Run, Stage, content_hash, write_json
from raylign.runtime import derive_seed
from raylign.tokenization.compare import compare
from raylign.tokenization.train import train_bpe
from raylign.tracking import ProgressBoard

# Of the documents drawn, those kept for the comparison.
COMPARED_SHARE = 0.02
COMPARED_AT_MOST = 200


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `tokenizer` stage."""
    build_tokenizer(recipe, run, board)


def build_tokenizer(recipe: Recipe, run: Run, board: ProgressBoard) -> Stage:
    """Train, compare and save; the recipe needs no `tokenizer` section for the defaults."""
    config = recipe.tokenizer or TokenizerConfig()
    corpus, content = locate(run, config.corpus, "corpus", "prepare", "tokenizer.corpus")
    parents = {"corpus": content}
    if config.chat_template is not None:
        if not config.chat_template.is_file():
            raise UserError(f"tokenizer.chat_template={config.chat_template}: no such file")
        parents["chat_template"] = content_hash(config.chat_template)

    def build(draft: Draft) -> None:
        draft.summary.update(train(config, corpus, recipe.seed, draft.path, board))

    settings = {"tokenizer": config.model_dump(mode="json"), "seed": recipe.seed}
    return perform(run, "tokenizer", settings, parents, board, build)


def train(
    config: TokenizerConfig, corpus: Path, seed: int, directory: Path, board: ProgressBoard
) -> dict[str, float]:
    """Write tokenizer and `comparison.json`; returns the numbers worth showing."""
    files = list_document_files(corpus, "tokenizer.corpus")
    with board.bar("tokenizer", config.vocab_size, "token") as bar:
        texts = sample_texts(files, config.sample_documents, derive_seed(seed, "tokenizer"))
        held = min(COMPARED_AT_MOST, int(COMPARED_SHARE * len(texts)))
        sample, training = texts[:held] or texts, texts[held:]
        tokenizer = train_bpe(training, config.vocab_size, config.tags, config.chat_template)
        bar.update(len(tokenizer))
    tokenizer.save_pretrained(directory)
    rows = compare(tokenizer, training, sample)
    write_json(directory / "comparison.json", [dataclasses.asdict(row) for row in rows])
    for row in rows:
        board.say(
            f"  {row.name:<10} {row.vocab_size:>6,} entries, {row.bytes_per_token:.2f} bytes a "
            f"token, {row.unknown_rate:.2%} unknown, {row.round_trip:.0%} restored"
        )
    return {"vocab_size": len(tokenizer)} | {
        f"bytes_per_token/{row.name}": row.bytes_per_token for row in rows
    }


if __name__ == "__main__":
    main("tokenizer", run)
