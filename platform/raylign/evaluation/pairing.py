"""Models side by side: their metrics, paired differences, and answers to the same questions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.evaluation.tasks import EPISODES
from raylign.evaluation.uncertainty import measure_mean, measure_ratio

ANSWERS_KEPT = 40

Results = Mapping[str, Any]
Documents = Sequence[Mapping[str, Any]]


def compare_models(found: Mapping[str, Results]) -> dict[str, Any]:
    """What `evaluate_model` found for each model, as one record.

    {"models", "tasks": {task: {"metric": {metric: {model: {"value", "stderr", "n"}}}}},
    "higher_is_better": {task: {metric: bool}}, "differences": [{"task", "metric", "from", "to",
    "value", "stderr", "n", and for plain metrics "gained", "lost"}], "answers": {model: [...]}};
    differences are between each model and the one after it.
    """
    models = list(found)
    tasks = list(dict.fromkeys(task for result in found.values() for task in result["metrics"]))
    differences = [
        {"task": task, "metric": metric, "from": before, "to": after} | change
        for task in tasks
        for before, after in itertools.pairwise(models)
        for metric, change in pair_differences(
            found[before]["documents"].get(task, []), found[after]["documents"].get(task, [])
        ).items()
    ]
    better: dict[str, Any] = {}
    for result in found.values():
        better |= result["higher_is_better"]
    return {
        "models": models,
        "tasks": {task: {"metric": _gather(found, task)} for task in tasks},
        "higher_is_better": better,
        "differences": differences,
        "answers": pick_answers({m: _list_problems(found[m]["documents"]) for m in models}),
    }


def _list_problems(documents: Mapping[str, Documents]) -> Documents:
    """Those of the held-out arithmetic, answered at once or turn by turn."""
    return documents.get("arithmetic") or documents.get(EPISODES, [])


def _gather(found: Mapping[str, Results], task: str) -> dict[str, dict[str, Any]]:
    gathered: dict[str, dict[str, Any]] = {}
    for model, result in found.items():
        for metric, score in result["metrics"].get(task, {}).items():
            gathered.setdefault(metric, {})[model] = score
    return gathered


def pair_differences(before: Documents, after: Documents) -> dict[str, dict[str, Any]]:
    """Change of each metric from one model to another over the same documents.

    Paired: the standard error is that of the documents' own changes, which leaves out what makes
    some documents harder than others for both models. `gained` and `lost` count the documents
    whose score rose and fell.
    """
    changes: dict[str, list[float]] = {}
    ratios: dict[str, list[tuple[float, float]]] = {}
    for old, new in zip(before, after, strict=True):
        for metric in old["scores"].keys() & new["scores"].keys():
            changes.setdefault(metric, []).append(new["scores"][metric] - old["scores"][metric])
        for metric in old["likelihoods"].keys() & new["likelihoods"].keys():
            (was, weight), (now, _) = old["likelihoods"][metric], new["likelihoods"][metric]
            if metric == "bits_per_byte":
                ratios.setdefault(metric, []).append(((was - now) / math.log(2), weight))
    found: dict[str, dict[str, Any]] = {}
    for metric, values in sorted(changes.items()):
        value, stderr = measure_mean(values)
        gained, lost = sum(v > 0 for v in values), sum(v < 0 for v in values)
        found[metric] = {"value": value, "stderr": stderr, "n": len(values)}
        found[metric] |= {"gained": gained, "lost": lost}
    for metric, rows in sorted(ratios.items()):
        value, stderr = measure_ratio(rows)
        found[metric] = {"value": value, "stderr": stderr, "n": len(rows)}
    return found


def pick_answers(
    documents: Mapping[str, Documents], count: int = ANSWERS_KEPT
) -> dict[str, list[dict[str, Any]]]:
    """Answers of every model to the same `count` questions, preferring those on which the models
    disagree."""
    if not documents or not all(documents.values()):
        return {}
    right = {
        model: [bool(row["scores"].get("exact")) for row in rows]
        for model, rows in documents.items()
    }
    asked = range(min(map(len, documents.values())))
    agreed = [len({right[model][i] for model in documents}) == 1 for i in asked]
    chosen = sorted(sorted(asked, key=lambda i: (agreed[i], i))[:count])
    return {
        model: [
            {
                "question": rows[i]["doc"]["prompt"],
                "answer": rows[i]["answer"],
                "reference": rows[i]["doc"]["reference"],
                "correct": right[model][i],
            }
            for i in chosen
        ]
        for model, rows in documents.items()
    }
