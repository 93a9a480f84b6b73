"""A run directory as the jobs leave it, with plausible numbers, made in a second."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from raylign.data.textbook.arithmetic import MENTAL, draw_problem, phrase_question, show_working
from raylign.run import Run, write_json
from raylign.tracking import JsonTracker

ENGLISH = "Return a list of the words in the string, using sep as the delimiter string."
T0 = 1_700_000_000.0


@pytest.fixture(scope="session")
def fabricated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage up to `evaluate`, and a journey."""
    return fabricate_run(tmp_path_factory.mktemp("runs") / "quickstart")


def fabricate_run(root: Path) -> Path:
    """Write the stages below `root`; the same numbers every time."""
    rng = random.Random(7)
    run = Run(root)
    hashes: dict[str, str] = {}
    for name, parents, write in (
        ("corpus", (), _write_corpus),
        ("tokenizer", ("corpus",), _write_tokenizer),
        ("shards", ("corpus", "tokenizer"), _write_shards),
        ("pretrain", ("shards", "tokenizer"), _write_pretrain),
        ("sft", ("corpus", "pretrain"), _write_sft),
        ("align", ("corpus", "sft"), _write_align),
        ("evaluate", ("align", "corpus", "pretrain", "sft"), _write_evaluate),
    ):
        settings = {"seed": 0, "stage": name, "optimizer": {"lr": 3e-3, "betas": [0.9, 0.95]}}
        with run.write(name, settings, {p: hashes[p] for p in parents}) as draft:
            draft.summary.update(write(draft.path, rng) or {})
        hashes[name] = run.require(name, name).manifest.content
    times = [14.2, 5.1, 9.7, 151.0, 78.4, 214.6, 41.3]
    write_json(
        root / "journey.json",
        {
            "seconds": 529.8,
            "peak_memory_gb": 6.83,
            "stages": dict(zip(hashes, times, strict=True)),
            "seed": 0,
            "command": "python -m jobs.quickstart jobs/recipes/quickstart.yaml",
        },
    )
    return root


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_corpus(path: Path, rng: random.Random) -> dict[str, Any]:
    steps = [
        ("read", 21430, {"not_text": 12}),
        ("clean", 21402, {"empty": 28}),
        (
            "quality",
            19865,
            {"too_short": 902, "repeated_lines": 388, "few_letters": 211, "long_words": 64},
        ),
        ("exact_duplicates", 18084, {"exact_duplicate": 1781}),
        ("near_duplicates", 16212, {"near_duplicate": 1872}),
        ("english_held_out", 16050, {"english_held_out": 162}),
        ("decontaminate", 15987, {"contains_held_out": 63}),
    ]
    before, rows = 21442, []
    for name, out, dropped in steps:
        rows.append({"name": name, "in": before, "out": out, "dropped": dropped})
        before = out
    needle = "What is 431 - 58? <work>ones: 11-8=3, borrow 1"
    examples = {
        "too_short": [("docstrings", "Alias for close()."), ("docstrings", "See http://x.org/.")],
        "repeated_lines": [("pydoc", "| x | x | x |\n" * 12)],
        "few_letters": [("pydoc", "=== --- === --- 0x00 0x01 0x02 0x03 |||| ::::")],
        "near_duplicate": [
            ("docstrings", ENGLISH),
            ("docstrings", ENGLISH.replace("words", "parts")),
        ],
        "contains_held_out": [("textbook", needle)],
    }
    write_json(
        path / "funnel.json",
        {
            "steps": rows,
            "sources": {
                "pydoc": {"documents": 4120, "chars": 6_812_004},
                "docstrings": {"documents": 6021, "chars": 3_120_993},
                "textbook": {"documents": 5846, "chars": 4_433_120},
            },
            "examples": {
                reason: [{"source": source, "text": text} for source, text in shown]
                for reason, shown in examples.items()
            },
            "decontamination": {
                "items": {"held_out": 762, "gsm8k": 1319},
                "english_held_out": 162,
                "documents_removed": 63,
                "overlap_after": 0,
            },
            "removed": {"held_out_lines": 1422, "documents_with_held_out_lines": 1180},
        },
    )
    return {"documents": 15987}


def _write_tokenizer(path: Path, rng: random.Random) -> dict[str, Any]:
    vocab = {f"token{i}": i for i in range(1016)}
    added = [{"content": f"<tag{i}>"} for i in range(8)]
    write_json(path / "tokenizer.json", {"model": {"vocab": vocab}, "added_tokens": added})
    measured = (
        ("bpe", 3.21, 0.0, 1.0),
        ("characters", 1.0, 0.0002, 0.98),
        ("words", 3.4, 0.24, 0.02),
    )
    keys = ("name", "bytes_per_token", "unknown_rate", "round_trip")
    rows = [dict(zip(keys, row, strict=True)) | {"vocab_size": 1024} for row in measured]
    write_json(path / "comparison.json", rows)
    return {"vocab_size": 1024}


def _write_shards(path: Path, rng: random.Random) -> None:
    write_json(
        path / "index.json",
        {
            "sequence_length": 256,
            "vocab_size": 1024,
            "tokenizer": "0" * 64,
            "splits": {
                "train": {"rows": 17134, "tokens": 4_386_304, "shards": []},
                "validation": {"rows": 350, "tokens": 89_600, "shards": []},
            },
        },
    )


def _write_learning(
    path: Path,
    rng: random.Random,
    steps: int,
    losses: tuple[float, float],
    every: int,
    prompts: dict[str, list[str]],
) -> None:
    start, end = losses
    tracker = JsonTracker(path)
    for step in range(1, steps + 1):
        trend = end + (start - end) * math.exp(-5.5 * step / steps)
        row = {
            "loss": trend + rng.gauss(0, 0.035),
            "lr": 3e-3 * min(1, step / 20),
            "grad_norm": 0.6 + rng.random() * 0.4,
            "tokens_per_second": 15200 + rng.gauss(0, 600),
        }
        if step % every == 0:
            row["validation_loss"] = trend + 0.04
        tracker.log(step, row)
    tracker.close()
    _lines(
        path / "samples.jsonl",
        [
            {"step": step, "prompt": prompt, "text": texts[i]}
            for prompt, texts in prompts.items()
            for i, step in enumerate(range(every, steps + 1, every))
        ],
    )


def _write_pretrain(path: Path, rng: random.Random) -> None:
    _write_learning(
        path,
        rng,
        300,
        (6.9, 1.42),
        100,
        {
            "The ": [
                "tes the the return of the s the the argu",
                "function returns the value of the string, and the",
                "default encoding is used if the file object does not have a name attribute.",
            ],
            "What is 12 + 7? ": [
                "<work>ones: 1+1=1</work>",
                "<work>ones: 2+7=9; tens: 1+0=1</work><answer>9",
                "<work>ones: 2+7=9; tens: 1+0=1</work><answer>19</answer>",
            ],
        },
    )


def _write_sft(path: Path, rng: random.Random) -> None:
    _write_learning(
        path,
        rng,
        200,
        (1.1, 0.29),
        100,
        {
            "What is 12 + 7?": [
                "<work>I can see it.</work><answer>18</answer>",
                "<work>ones: 2+7=9; tens: 1+0=1</work><answer>19</answer>",
            ],
            "Subtract 58 from 431.": [
                "<work>I can see it.</work><answer>383</answer>",
                "<work>I can see it.</work><answer>373</answer>",
            ],
        },
    )


def _write_align(path: Path, rng: random.Random) -> None:
    tracker, steps = JsonTracker(path), 40
    for step in range(steps):
        right = 0.62 + 0.33 * (1 - math.exp(-step / 11)) + rng.gauss(0, 0.012)
        form = min(1.0, 0.96 + 0.04 * step / 20)
        tracker.log(
            step,
            {
                "reward/total": right + 0.1 * form,
                "reward/correct": right,
                "reward/format": form,
                "kl": 0.004 * step**0.8 + rng.random() * 0.003,
                "length": 36 + 19 * (1 - math.exp(-step / 9)),
                "entropy": 0.31 * math.exp(-step / 26) + 0.02,
                "mismatch/mean_abs": 6e-7 * (1 + rng.random()),
                "mismatch/max_abs": 9e-6 * (1 + rng.random()),
                "staleness/mean": 0.93 + rng.gauss(0, 0.02),
                "staleness/max": 1.0,
                "importance/mean": 1 + rng.gauss(0, 0.004),
                "importance/truncated": abs(rng.gauss(0.001, 0.001)),
                "clip_fraction": abs(rng.gauss(0.01, 0.004)),
                "loss": rng.gauss(0, 0.006),
                "grad_norm": 0.4 + rng.random() * 0.3,
                "tokens_per_second": 2900 + rng.gauss(0, 90),
                "sync_seconds": 0.06 + rng.random() * 0.02,
                "wait/trainer": abs(rng.gauss(0.4, 0.2)),
                "wait/generator": abs(rng.gauss(0.2, 0.1)),
                "dropped/stale": float(rng.random() < 0.1),
            },
        )
    _write_events(tracker, steps, rng)
    tracker.close()
    _lines(
        path / "examples.jsonl",
        [_make_example(rng, step, step / steps) for step in range(0, steps, 5)],
    )


def _write_events(tracker: JsonTracker, steps: int, rng: random.Random) -> None:
    """Each worker serves four groups a step; the learner is one step behind."""
    now = T0
    for step in range(steps):
        spent = 3.6 + rng.random()
        for worker in ("rollout-0", "rollout-1"):
            tracker.event(actor=worker, what="sync", start=now, end=now + 0.12, version=step)
            for _ in range(4):
                start, end = now + 0.12 + rng.random() / 4, now + spent * (0.6 + 0.4 * rng.random())
                tracker.event(actor=worker, what="generate", start=start, end=end, step=step)
                tracker.event(actor="reward-0", what="score", start=end, end=end + 0.03, step=step)
        if step > 0:
            for what, start, end in (("wait", 0.0, 0.5), ("learn", 0.5, 4.1), ("sync", 4.1, 4.3)):
                times = {"start": now + start, "end": now + end}
                tracker.event(actor="learner", what=what, step=step - 1, **times)
        now += max(spent + 0.4, 4.4)


def _make_example(rng: random.Random, step: int, skill: float) -> dict[str, Any]:
    problem = draw_problem(rng, 3)
    completions = []
    for _ in range(8):
        worked, right = rng.random() < 0.25 + 0.7 * skill, rng.random() < 0.45 + 0.5 * skill
        answer = problem.answer if right else problem.answer + rng.choice([-10, -1, 1, 10])
        text = (
            f"<work>{show_working(problem) if worked else MENTAL}</work><answer>{answer}</answer>"
        )
        completions.append(
            {
                "text": text,
                "reward": right + 0.1,
                "version": step - 1,
                "parts": {"correct": float(right), "format": 1.0},
            }
        )
    return {
        "step": step,
        "prompt": phrase_question(problem, rng),
        "reference": str(problem.answer),
        "completions": completions,
    }


def _write_evaluate(path: Path, rng: random.Random) -> None:
    models = {"base": (0.042, 0.11, 1.31), "sft": (0.638, 0.978, 1.38), "rl": (0.953, 0.998, 1.39)}

    def share(value: float, n: int = 600) -> dict[str, float]:
        return {"value": value, "stderr": math.sqrt(value * (1 - value) / n), "n": n}

    by_digits = {
        "exact_1_digit": (0.20, 0.99, 1.0, 58),
        "exact_2_digit": (0.05, 0.81, 0.98, 242),
        "exact_3_digit": (0.01, 0.44, 0.92, 300),
    }
    arithmetic = {
        "exact": {m: share(v[0]) for m, v in models.items()},
        "format": {m: share(v[1]) for m, v in models.items()},
    }
    for name, (*values, n) in by_digits.items():
        arithmetic[name] = {m: share(v, n) for m, v in zip(models, values, strict=True)}
    english = {
        "bits_per_byte": {m: {"value": v[2], "stderr": 0.021, "n": 200} for m, v in models.items()}
    }
    answers: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    for _ in range(40):
        problem = draw_problem(rng, 3)
        question = phrase_question(problem, rng)
        for model, (accuracy, *_) in models.items():
            right = rng.random() < accuracy
            worked = show_working(problem) if model == "rl" else MENTAL
            value = problem.answer if right else problem.answer + rng.choice([-10, 1, 10])
            answers[model].append(
                {
                    "question": question,
                    "reference": str(problem.answer),
                    "correct": right,
                    "answer": f"<work>{worked}</work><answer>{value}</answer>",
                }
            )
    write_json(
        path / "results.json",
        {
            "models": list(models),
            "tasks": {"arithmetic": {"metric": arithmetic}, "english": {"metric": english}},
            "answers": answers,
            "differences": [
                {
                    "task": "arithmetic",
                    "metric": "exact",
                    "from": "sft",
                    "to": "rl",
                    "value": 0.315,
                    "stderr": 0.0195,
                    "n": 600,
                    "gained": 196,
                    "lost": 7,
                }
            ],
        },
    )
