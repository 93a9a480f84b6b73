"""A quality classifier: `python -m jobs.classifier recipe.yaml [classifier.key=value ...]`.

Documents labelled by the user, or by a judge model served by rollout workers, teach a cheap
classifier that scores whole corpora. Writes the `classifier` stage: weights, card, annotations.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.teacher import Request, TeacherPool
from jobs.entry import locate, main, model_directory, perform, section
from jobs.synthesise import Questioner
from raylign.config import ClassifierConfig, Recipe, UserError
from raylign.config.synthesis import JudgeConfig
from raylign.data.documents import list_document_files, read_batches, shuffle_key
from raylign.data.quality.classifier import MIN_LABELS, Classifier, fit
from raylign.data.quality.judging import RUBRIC, excerpt, parse_score, render_question
from raylign.data.synthesis.answers import Answer, AnswerCache
from raylign.data.synthesis.filters import PROMPT_TOO_LONG, read_answer
from raylign.inference.generator import Sampling
from raylign.run import Draft, Run, write_json
from raylign.runtime import derive_seed
from raylign.tracking import Bar, ProgressBoard

# What scores do not depend on: changing it leaves a finished classifier valid.
RESOURCE_KEYS = {"judge": {"rollout", "cache"}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A document that is shown to the judge."""

    doc_id: str
    passage: str
    question: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """What the judge said of a document; `score` is None when it could not be read."""

    asked: Asked
    answer: Answer
    score: int | None
    attempts: int


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `classifier` stage."""
    config = section(recipe, "classifier", ClassifierConfig)
    judge = config.judge
    if (config.labels is None) == (judge is None):
        raise UserError(
            "classifier: give either classifier.labels (documents with scores) or classifier.judge "
            "(a model that scores them)"
        )
    seed = derive_seed(recipe.seed, "classifier")
    parents: dict[str, str] = {}
    documents = Path()
    if config.labels is not None:
        parents["labels"] = locate(run, config.labels, "", "", "classifier.labels")[1]
    else:
        assert judge is not None
        check(judge)
        stage = "documents" if run.find("documents") is not None else "corpus"
        documents, parents["documents"] = locate(
            run, judge.documents, stage, "prepare", "classifier.judge.documents"
        )
        parents["judge"] = locate(run, judge.model, "", "", "classifier.judge.model")[1]
        if judge.rubric is not None:
            parents["rubric"] = locate(run, judge.rubric, "", "", "classifier.judge.rubric")[1]
    if config.fit.embedding_model is not None:
        parents["encoder"] = locate(
            run, config.fit.embedding_model, "", "", "classifier.fit.embedding_model"
        )[1]

    def build(draft: Draft) -> None:
        if config.labels is not None:
            texts, labels = read_labels(config.labels, config.text_column, config.score_column)
        else:
            assert judge is not None
            cache = judge.cache or run.root / ".classifier.cache"
            annotator = _Annotator(judge, parents["judge"], cache, seed)
            texts, labels = annotator.label(documents, draft, board)
        classifier = fit(texts, labels, config.fit, seed)
        classifier.save(draft.path)
        write_json(draft.path / "metrics.json", classifier.metrics)
        _report(classifier, draft, board)

    settings = {
        "classifier": config.model_dump(mode="json", exclude=RESOURCE_KEYS),
        "seed": recipe.seed,
    }
    perform(run, "classifier", settings, parents, board, build)


def check(judge: JudgeConfig) -> None:
    """What can be known to be wrong before anything is started; raises `UserError`."""
    if judge.attempts > 1 and judge.sampling.temperature == 0:
        raise UserError(
            f"classifier.judge.attempts={judge.attempts}: with sampling.temperature=0 every "
            "attempt gives the same answer; set attempts=1 or a temperature"
        )


def read_labels(path: Path, text_column: str, score_column: str) -> tuple[pa.Array, list[float]]:
    """Texts and scores of a JSON-lines or Parquet file, or of all in a directory, in order.

    Raises `UserError` naming file and line (or row) for anything that is not a text with a score.
    """
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".parquet"))
    if not files:
        raise UserError(f"classifier.labels={path}: holds no .jsonl or .parquet files")
    texts: list[str] = []
    scores: list[float] = []
    for file in files:
        rows = _read_parquet(file) if file.suffix == ".parquet" else _read_json(file)
        for place, row in rows:
            text = row.get(text_column) if isinstance(row, dict) else None
            score = row.get(score_column) if isinstance(row, dict) else None
            if not isinstance(text, str) or isinstance(score, bool):
                text = None
            if text is None or not isinstance(score, int | float):
                raise UserError(
                    f"classifier.labels: {file}:{place}: needs {text_column!r} (a text) and "
                    f"{score_column!r} (a number); set classifier.text_column and score_column"
                )
            texts.append(text)
            scores.append(float(score))
    return pa.array(texts, pa.large_string()), scores


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"classifier.labels: {file}:{number}: not valid JSON ({error})"
                ) from None


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"classifier.labels: {file} is not readable Parquet ({reason})") from None
    yield from enumerate(rows)


class _Annotator:
    """Lets the judge score a sample of documents."""

    def __init__(self, config: JudgeConfig, content: str, cache: Path, seed: int) -> None:
        self._config, self._content, self._cache, self._seed = config, content, cache, seed
        self._model = model_directory(config.model)
        dtype = config.rollout.dtype
        self._questioner = Questioner(
            self._model, content, config.sampling, dtype, config.max_length, None
        )

    def label(
        self, documents: Path, draft: Draft, board: ProgressBoard
    ) -> tuple[list[str], list[float]]:
        """The passages that were scored and their scores; all annotations go into a file."""
        with (
            AnswerCache(self._cache) as cache,
            board.bar("judge", self._config.sample, unit="document") as bar,
        ):
            asked = self._sample(documents)
            annotations = asyncio.run(self._annotate(asked, cache, bar))
        write_annotations(draft.path / "annotations.jsonl", annotations, self._content)
        scored = [a for a in annotations if a.score is not None]
        unread = len(annotations) - len(scored)
        too_long = sum(a.answer.finish_reason == PROMPT_TOO_LONG for a in annotations)
        draft.summary.update(judged=len(annotations), unparsable=unread - too_long)
        draft.summary["prompt_too_long"] = too_long
        board.say(
            f"{len(scored):,} of {len(annotations):,} documents have a score; left out: "
            f"{unread - too_long:,} without a readable one, {too_long:,} too long to ask"
        )
        if len(scored) < MIN_LABELS:
            shown = next((a.answer.text for a in annotations if a.answer.text), "")[-120:]
            raise UserError(
                f"classifier: {len(scored)} of {len(annotations)} judged documents have a readable "
                f"score ({unread - too_long} unparsable, {too_long} too long to ask), and "
                f"{MIN_LABELS} are needed; one answer ends {shown!r}. Take a model that follows "
                "instructions, or raise classifier.judge.sample or sampling.max_tokens"
            )
        return [a.asked.passage for a in scored], [float(a.score or 0) for a in scored]

    def _sample(self, documents: Path) -> list[Asked]:
        """Documents chosen and ordered by hash of their id."""
        config = self._config
        rubric = RUBRIC if config.rubric is None else config.rubric.read_text(encoding="utf-8")
        chosen: list[tuple[int, str, str]] = []
        for file in list_document_files(documents, "classifier.judge.documents"):
            for table in read_batches(file, ["doc_id", "text"]):
                ids, texts = table["doc_id"].to_pylist(), table["text"].to_pylist()
                for doc_id, text in zip(ids, texts, strict=True):
                    if text and text.strip():
                        passage = excerpt(text, config.excerpt_chars)
                        chosen.append((shuffle_key(doc_id, self._seed), doc_id, passage))
                chosen = sorted(chosen)[: config.sample]
        return [
            Asked(doc_id, passage, render_question(passage, rubric, config.excerpt_chars))
            for _, doc_id, passage in chosen
        ]

    async def _annotate(
        self, asked: Sequence[Asked], cache: AnswerCache, bar: Bar
    ) -> list[Annotation]:
        """Rounds of questions: who gave no readable score is asked again, with another seed."""
        config = self._config
        pool = TeacherPool(
            config.rollout,
            self._model,
            self._questioner.max_length,
            self._seed,
            "classifier.judge.rollout",
        )
        done: dict[int, Annotation] = {}
        left, scored = list(range(len(asked))), 0
        try:
            for attempt in range(config.attempts):
                requests = (self._request(index, asked[index], attempt, cache) for index in left)
                sampling = Sampling(**config.sampling.model_dump())
                answers = pool.answer(requests, sampling, cache.put)
                async with aclosing(answers):
                    async for request, answer in answers:
                        score = parse_score(read_answer(answer, "prose"))
                        index = request.payload
                        done[index] = Annotation(asked[index], answer, score, attempt + 1)
                        scored += score is not None
                        bar.update(len(done), f"{scored} scored", total=len(asked))
                left = [i for i in left if self._is_worth_asking(done[i])]
        finally:
            pool.stop()
        return [done[index] for index in range(len(asked))]

    def _is_worth_asking(self, annotation: Annotation) -> bool:
        return annotation.score is None and annotation.answer.finish_reason != PROMPT_TOO_LONG

    def _request(self, index: int, asked: Asked, attempt: int, cache: AnswerCache) -> Request[int]:
        tokens = self._questioner.encode(asked.question)
        seed = derive_seed(self._seed, asked.doc_id, attempt)
        return self._questioner.request(tokens, attempt, seed, cache, index)


def write_annotations(file: Path, annotations: Sequence[Annotation], model: str) -> None:
    """One JSON line a document: what was asked and answered, and the score or null."""
    with file.open("w", encoding="utf-8") as lines:
        for annotation in annotations:
            row = {
                "doc_id": annotation.asked.doc_id,
                "text": annotation.asked.passage,
                "prompt": annotation.asked.question,
                "answer": annotation.answer.text,
                "finish_reason": annotation.answer.finish_reason,
                "score": annotation.score,
                "attempts": annotation.attempts,
                "model_hash": model,
            }
            lines.write(json.dumps(row) + "\n")


def _report(classifier: Classifier, draft: Draft, board: ProgressBoard) -> None:
    metrics = classifier.metrics
    chosen = ("pearson", "mean_absolute_error", "accuracy", "precision", "recall", "f1")
    draft.summary.update({name: metrics[name] for name in chosen})
    shown = ", ".join(
        f"{name.replace('_', ' ')} {metrics[name]:.3f}"
        for name in chosen
        if metrics[name] is not None
    )
    board.say(
        f"on {metrics['labels']['held_out']:,} held-out labels: {shown} "
        f"(good from {metrics['threshold']:g})"
    )


if __name__ == "__main__":
    main("classifier", run)
