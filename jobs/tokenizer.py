"""Tokenizer: `python -m jobs.tokenizer recipe.yaml [tokenizer.key=value ...]`.

Trains a tokenizer on a sample of the corpus, or takes one that exists, gives it a chat template,
and compares it with others on documents it has not seen. Writes the `tokenizer` stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from jobs.entry import locate, main, perform
from raylign.config import Recipe, TokenizerConfig, UserError
from raylign.config.tokenizer import VocabularyConfig
from raylign.data.corpus.parts import stream_map
from raylign.data.documents import list_document_files
from raylign.run import Draft, Run, Stage, content_hash, write_json
from raylign.runtime import derive_seed
from raylign.tokenization.compare import (
    Comparison,
    Subject,
    compare,
    cost_embedding,
    take_subject,
    time_encoding,
    trace_curve,
    train_baselines,
)
from raylign.tokenization.loading import equip, find_local, load
from raylign.tokenization.page import Findings, render
from raylign.tokenization.pieces import cut
from raylign.tokenization.sample import Excerpt, draw_sample
from raylign.tokenization.train import train as train_vocabulary
from raylign.tracking import Bar, ProgressBoard

# Of the documents drawn, those kept for the comparison.
COMPARED_SHARE = 0.02
COMPARED_AT_MOST = 200
PARAGRAPH_CHARACTERS = 600


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `tokenizer` stage."""
    build_tokenizer(recipe, run, board)


def build_tokenizer(recipe: Recipe, run: Run, board: ProgressBoard) -> Stage:
    """Train or load, compare and save; the recipe needs no `tokenizer` section for the defaults."""
    config = recipe.tokenizer or TokenizerConfig()
    corpus, content = locate(run, config.corpus, "corpus", "prepare", "tokenizer.corpus")
    parents = {"corpus": content}
    if config.chat_template is not None:
        if not config.chat_template.is_file():
            raise UserError(f"tokenizer.chat_template={config.chat_template}: no such file")
        parents["chat_template"] = content_hash(config.chat_template)
    for vocabulary in (config, *config.compare):
        path = find_local(vocabulary)
        if path is not None:
            parents[str(path)] = content_hash(path)

    def build(draft: Draft) -> None:
        draft.summary.update(train(config, corpus, recipe.seed, draft.path, board))

    settings = {"tokenizer": config.model_dump(mode="json"), "seed": recipe.seed}
    return perform(run, "tokenizer", settings, parents, board, build)


def train(
    config: TokenizerConfig, corpus: Path, seed: int, directory: Path, board: ProgressBoard
) -> dict[str, float]:
    """Write the tokenizer, `comparison.json` and `comparison.html`; returns numbers worth showing.

    Raises `UserError` when the corpus holds no text or a tokenizer cannot be had.
    """
    files = list_document_files(corpus, "tokenizer.corpus")
    drawn = draw_sample(
        files,
        config.sample_documents,
        derive_seed(seed, "tokenizer"),
        config.sample_bytes,
        spread=stream_map,
    )
    held = min(COMPARED_AT_MOST, int(COMPARED_SHARE * len(drawn)))
    sample, training = drawn[:held] or drawn, [excerpt.text for excerpt in drawn[held:]]
    if not any(excerpt.text for excerpt in sample) or not any(training):
        raise UserError(f"tokenizer.corpus={corpus}: its documents hold no text; give others")
    steps = 1 + len(config.compare) + len(config.compare_sizes)
    with board.bar("tokenizer", steps, "step") as bar:
        tokenizer = obtain(config, config, training, "tokenizer.")
        bar.update(1, f"{len(tokenizer):,} entries")
        tokenizer.save_pretrained(directory)
        subjects = gather_subjects(config, tokenizer, training, bar)
        comparisons = compare(subjects, sample)
        curves = trace_curves(config, subjects, training, sample)
        bar.update(steps)
    write_comparison(config, subjects, comparisons, curves, sample, held > 0, directory)
    speeds = [time_encoding(subject, sample) for subject in subjects]
    show(comparisons, speeds, board)
    return {"vocab_size": len(tokenizer)} | {
        f"bytes_per_token/{row.name}": row.scores.bytes_per_token for row in comparisons
    }


def obtain(
    vocabulary: VocabularyConfig, config: TokenizerConfig, training: Sequence[str], key: str
) -> PreTrainedTokenizerFast:
    """A tokenizer as `vocabulary` says, trained or loaded; `key` is the section it stands in.

    The run's own gets what a stage needs; one that it is compared with is left as it is.
    """
    if vocabulary.load is None:
        size = vocabulary.vocab_size
        if size is None and vocabulary.kind != "char":
            size = config.vocab_size
        return train_vocabulary(
            training, vocabulary, size, config.tags, config.chat_template, f"{key}vocab_size"
        )
    tokenizer = load(vocabulary, training)
    if vocabulary is config:
        equip(tokenizer, config.tags, config.chat_template)
    return tokenizer


def gather_subjects(
    config: TokenizerConfig, own: PreTrainedTokenizerFast, training: Sequence[str], bar: Bar
) -> list[Subject]:
    """The run's own tokenizer and those it is compared with: the user's, else plain baselines."""
    made: list[tuple[VocabularyConfig, PreTrainedTokenizerFast]] = [(config, own)]
    for number, vocabulary in enumerate(config.compare):
        other = obtain(vocabulary, config, training, f"tokenizer.compare[{number}].")
        made.append((vocabulary, other))
        bar.update(2 + number)
    names = [name_vocabulary(vocabulary) for vocabulary, _ in made]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    subjects: list[Subject] = []
    for name, (_, tokenizer) in zip(names, made, strict=True):
        name = f"{name} {len(tokenizer):,}" if name in repeated else name
        # Two that differ in neither kind nor size differ in something else.
        taken = sum(subject.name.partition(" #")[0] == name for subject in subjects)
        subjects.append(take_subject(f"{name} #{taken + 1}" if taken else name, tokenizer))
    return subjects if config.compare else subjects + train_baselines(training, len(own))


def name_vocabulary(vocabulary: VocabularyConfig) -> str:
    """Its kind, or the last part of what was loaded."""
    if vocabulary.load is None:
        return vocabulary.kind
    return Path(vocabulary.load.removeprefix("tiktoken:")).stem or vocabulary.load


def trace_curves(
    config: TokenizerConfig,
    subjects: Sequence[Subject],
    training: Sequence[str],
    sample: Sequence[Excerpt],
) -> dict[str, list[tuple[int, float]]]:
    """By name: vocabulary size against bytes per token, for each trained bpe, unigram and word."""
    curves = {}
    every: list[VocabularyConfig] = [config, *config.compare]
    for vocabulary, subject in zip(every, subjects, strict=False):
        if vocabulary.load is not None or vocabulary.kind == "char" or not config.compare_sizes:
            continue

        def retrain(size: int, vocabulary: VocabularyConfig = vocabulary) -> Any:
            key = "tokenizer.compare_sizes"
            try:
                return train_vocabulary(training, vocabulary, size, config.tags, None, key)
            except UserError as error:
                raise UserError(f"{error} ({vocabulary.kind})") from None

        curves[subject.name] = trace_curve(retrain, config.compare_sizes, sample)
    return curves


def write_comparison(
    config: TokenizerConfig,
    subjects: Sequence[Subject],
    comparisons: Sequence[Comparison],
    curves: dict[str, list[tuple[int, float]]],
    sample: Sequence[Excerpt],
    held_out: bool,
    directory: Path,
) -> None:
    """`comparison.json`, a row a tokenizer, and `comparison.html`."""
    paragraph = config.paragraph or choose_paragraph(sample)
    pieces = {subject.name: cut(subject, paragraph) for subject in subjects}
    rows = []
    for comparison in comparisons:
        parameters, share = cost_embedding(comparison.vocab_size, config.hidden_size, config.layers)
        rows.append(
            comparison.describe()
            | {"held_out": held_out}
            | {"embedding": {"parameters": parameters, "share": round(share, 4)}}
            | {"curve": curves.get(comparison.name, [])}
            | {"paragraph": [asdict(piece) for piece in pieces[comparison.name]]}
        )
    write_json(directory / "comparison.json", rows)
    findings = Findings(
        comparisons,
        curves,
        paragraph,
        pieces,
        config.hidden_size,
        config.layers,
        held_out,
    )
    (directory / "comparison.html").write_text(render(findings), encoding="utf-8")


def choose_paragraph(sample: Sequence[Excerpt]) -> str:
    """The beginning of the first document that fills a paragraph, else of the longest."""
    full = [e.text for e in sample if len(e.text) >= PARAGRAPH_CHARACTERS]
    text = full[0] if full else max((e.text for e in sample), key=len)
    start = text[:PARAGRAPH_CHARACTERS]
    return start if start == text else start.rpartition(" ")[0] or start


def show(comparisons: Sequence[Comparison], speeds: Sequence[float], board: ProgressBoard) -> None:
    """The table on the console; speeds are this machine's."""
    width = max(len(row.name) for row in comparisons)
    for row, speed in zip(comparisons, speeds, strict=True):
        scores = row.scores
        board.say(
            f"  {row.name:<{width}} {row.vocab_size:>7,} entries, {scores.bytes_per_token:.2f} "
            f"bytes a token, {scores.fertility:.2f} tokens a word, {scores.unknown_rate:.2%} "
            f"unknown, {scores.round_trip:.0%} restored, {speed:.1f} MB/s"
        )


if __name__ == "__main__":
    main("tokenizer", run)
