"""The tasks of a run: its held-out arithmetic, and English kept out of training.

They are written as ordinary lm-eval task files, so `lm-eval --include_path` runs them as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylign.config import UserError
from raylign.rewards.verifiers import verify_arithmetic

EPISODES = "episodes"
LOCAL_TASKS = ("arithmetic", "english", EPISODES)

_ARITHMETIC = """\
task: arithmetic
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{reference}}}}"
process_results: !function raylign.evaluation.tasks.grade_arithmetic
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {max_tokens}}}
num_fewshot: 0
metric_list:
{metrics}
metadata: {{version: 1.0}}
"""

_ENGLISH = """\
task: english
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
num_fewshot: 0
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


def write_tasks(names: Sequence[str], corpus: Path, directory: Path, max_tokens: int) -> None:
    """Write task files into `directory` for those of `names` that are made from `corpus`.

    Raises `UserError` when the corpus holds no such data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cache = json.dumps(str(directory / "cache"))
    if "arithmetic" in names:
        data = require_data(corpus / "held_out.jsonl", "arithmetic")
        # Not splitlines(): a JSON string may hold U+2028 and its like, which that takes for ends.
        rows = [json.loads(line) for line in data.read_text("utf-8").split("\n") if line]
        digits = sorted({count_digits(row["key"]) for row in rows})
        metrics = ["exact", "format", *(digit_metric(d) for d in digits)]
        lines = [f"  - {{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in metrics]
        text = _ARITHMETIC.format(
            data=json.dumps(str(data)), cache=cache, max_tokens=max_tokens, metrics="\n".join(lines)
        )
        (directory / "arithmetic.yaml").write_text(text, encoding="utf-8")
    if "english" in names:
        data = require_data(corpus / "english_held_out.jsonl", "english")
        text = _ENGLISH.format(data=json.dumps(str(data)), cache=cache)
        (directory / "english.yaml").write_text(text, encoding="utf-8")


def grade_arithmetic(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`exact` and `format` (0 or 1) of one answer, and `exact` again under its operand length."""
    parts = verify_arithmetic(results[0], str(doc["reference"]))
    exact = float(parts["correct"])
    return {
        "exact": exact,
        "format": float(parts["format"]),
        digit_metric(count_digits(str(doc["key"]))): exact,
    }


def count_digits(key: str) -> int:
    """Digits of the larger operand of a problem's canonical form, such as `431 - 58`."""
    return max((len(number) for number in re.findall(r"\d+", key)), default=0)


def digit_metric(digits: int) -> str:
    """Name of the accuracy on problems of that operand length."""
    return f"exact_{digits}_digit"


def require_data(file: Path, task: str) -> Path:
    """`file`, which a task is made from; raises `UserError` when there is nothing in it."""
    if not file.is_file() or not file.stat().st_size:
        raise UserError(
            f"evaluate.tasks: {task!r} needs {file}, which is missing or empty; "
            "run `python -m jobs.prepare` on this recipe, or leave the task out"
        )
    return file
