"""What is written of a step's completions: a row for each, and some of them token by token."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.buffer import Group
from actors.learner import LearnerReport
from actors.measurement import describe_left_out, describe_sample
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import reject
from raylign.training.batches import LearnerBatch

GROUPS_IN_DETAIL = 2
TOKEN_ROWS = 16
WINDOW = 6

Spell = Callable[[Sequence[int]], Sequence[str]]


def list_rollouts(
    step: int,
    version: int,
    groups: Sequence[Group],
    batch: LearnerBatch,
    report: LearnerReport,
    prompts: Mapping[str, Prompt],
    spell: Spell | None = None,
) -> list[dict[str, Any]]:
    """A row for each completion of a step, by request in the order of `groups`; then for what the
    batch holds besides.

    version: of the policy that learned. The batch's record has `left_out`, as
    `actors.measurement.describe_left_out` makes it. `left_out` of a row says why a completion was
    not learned from. With `spell`, which gives the text of each token, some of those that were have
    `tokens` too: token ids, texts, log-probs, gaps and, where they differ, advantages from their
    first sampled token on.
    """
    detailed = set(_choose_detailed(batch.trajectories, report)) if spell is not None else set()
    placed: dict[str, list[dict[str, Any]]] = {group.request: [] for group in groups}
    for number, trajectory in enumerate(batch.trajectories):
        gap = report.gaps.get(number)
        row = _head(step, version, trajectory.group_id, prompts, describe_sample(trajectory))
        row |= {
            "left_out": None,
            "advantage": _finite(report.advantages[number]),
            "mismatch": None if gap is None else _mean_gap(gap),
        }
        if spell is not None and number in detailed:
            advantages = report.token_advantages.get(number)
            row["tokens"] = _spell_out(trajectory, spell, gap, advantages)
        placed.setdefault(trajectory.group_id, []).append(row)
    for found in batch.record.get("left_out", ()):
        row = _head(step, version, found["request"], prompts, found)
        placed.setdefault(found["request"], []).append(row)
    return [row for rows in placed.values() for row in rows]


def list_unlearned(
    step: int, version: int, groups: Sequence[Group], reason: str, prompts: Mapping[str, Prompt]
) -> list[dict[str, Any]]:
    """The same of completions that were made and are not learned from for one reason, unless they
    have one of their own."""
    left_out = [
        (group.request, rejection)
        for group in groups
        for rejection in (*(reject(t, reason) for t in group.trajectories), *group.rejected)
    ]
    return [
        _head(step, version, found["request"], prompts, found)
        for found in describe_left_out(left_out)
    ]


def undo_rows(file: Path, step: int, reason: str = "") -> None:
    """Take the rows of `step` and later, and lines cut short, from a file of rollouts, if there is
    one; with a `reason` they stay, and say that it made what was learned from them undone. Rows
    that say so already stay as they are. Raises `OSError`."""
    if not file.is_file():
        return
    draft = file.with_name(f".{file.name}")
    with file.open("rb") as written, draft.open("wb") as kept:
        for line in written:
            row = _read_row(line)
            if row is None:
                continue
            if row["step"] >= step and not row.get("undone"):
                if not reason:
                    continue
                if row.get("left_out"):
                    row["detail"] = "; ".join(
                        str(row[k]) for k in ("left_out", "detail") if k in row
                    )
                line = f"{json.dumps(row | {'left_out': reason, 'undone': True})}\n".encode()
            kept.write(line)
    os.replace(draft, file)


def _read_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _head(
    step: int,
    version: int,
    request: str,
    prompts: Mapping[str, Prompt],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    prompt = prompts.get(found["prompt_id"])
    return {
        "step": step,
        "version": version,
        "request": request,
        "prompt_id": found["prompt_id"],
        "prompt": prompt.text if prompt else None,
        "reference": prompt.reference if prompt else None,
        **found,
    }


def list_examples(
    step: int, groups: Sequence[Group], prompts: Mapping[str, Prompt]
) -> list[dict[str, Any]]:
    """The first groups of a step, best completion first."""
    rows = []
    for group in [g for g in groups if g.trajectories][:GROUPS_IN_DETAIL]:
        prompt = prompts.get(group.trajectories[0].prompt_id)
        rows.append(
            {
                "step": step,
                "prompt": prompt.text if prompt else group.trajectories[0].prompt_id,
                "reference": prompt.reference if prompt else "",
                "completions": [
                    {
                        "text": t.text,
                        "reward": t.reward,
                        "parts": t.reward_parts,
                        "version": t.version_span[0],
                    }
                    for t in sorted(group.trajectories, key=lambda t: -(t.reward or 0.0))
                ],
            }
        )
    return rows


def spell_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; a character that is spread over several
    tokens belongs to the last of them. End to end they are the text that `ids` decode to."""

    def decode(part: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(part, **options))

    ids, texts = [int(i) for i in ids], list[str]()
    begun = done = 0  # tokens [begun, done) are spelled, and are the context of the next
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[begun:done]), decode(ids[begun:end])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end - done < WINDOW and end < len(ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        begun, done = (done, end) if end - begun > WINDOW else (begun, end)
    return texts


def _choose_detailed(trajectories: Sequence[Trajectory], report: LearnerReport) -> list[int]:
    """Whole groups, so that completions of one prompt can be compared; first those of which the
    mismatch is known."""
    members: dict[str, list[int]] = {}
    for number, trajectory in enumerate(trajectories):
        members.setdefault(trajectory.group_id, []).append(number)
    known = {
        request: sum(number in report.gaps for number in numbers)
        for request, numbers in members.items()
    }
    chosen = sorted(members, key=lambda request: -known[request])[:GROUPS_IN_DETAIL]
    return [number for request in chosen for number in members[request]][:TOKEN_ROWS]


def _spell_out(
    trajectory: Trajectory, spell: Spell, gap: np.ndarray | None, advantages: np.ndarray | None
) -> dict[str, Any]:
    sampled = np.flatnonzero(trajectory.loss_mask)
    start = int(sampled[0]) if len(sampled) else len(trajectory.token_ids)
    ids = trajectory.token_ids[start:].tolist()
    mask = trajectory.loss_mask[start:].tolist()
    known = trajectory.logprobs[start:].tolist()
    found: dict[str, Any] = {
        "ids": ids,
        "texts": list(spell(ids)),
        "sampled": [int(one) for one in mask],
        "logprobs": [_round(x) if one else None for x, one in zip(known, mask, strict=True)],
    }
    for name, values in (("gaps", gap), ("advantages", advantages)):
        if values is not None:
            cut = values[start : len(trajectory.token_ids)].tolist()
            found[name] = [_round(x) if one else None for x, one in zip(cut, mask, strict=True)]
    return found


def _mean_gap(gap: np.ndarray) -> float | None:
    known = np.abs(gap[~np.isnan(gap)])
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _round(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
