"""What is written of a step's completions: a row for each, and some of them token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.buffer import Group
from actors.learner import LearnerReport
from raylign.records import Prompt, Trajectory
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
    """A row for each completion of a step, in the order of `groups`; then for what the batch holds
    besides.

    version: of the policy that learned. The batch's record has `drops`: request, reason and number.
    `left_out` says why a completion was not learned from; of one that was rejected no more is
    known. With `spell`, which gives the text of each token, some
    completions have `tokens` too: token ids, texts, log-probs and gaps from their first sampled
    token on.
    """
    numbers = _number_rows(batch)
    reasons: dict[str, dict[str, None]] = {}
    for dropped, reason, _ in batch.record.get("drops", ()):
        reasons.setdefault(dropped, {})[reason] = None
    rows: list[dict[str, Any]] = []
    placed: list[tuple[str, Trajectory, int | None]] = []
    for group in groups:
        for trajectory in group.trajectories:
            found = numbers.get(_identify(trajectory))
            place = found.pop(0) if found else None
            if place is not None:
                trajectory = batch.trajectories[place]  # its reward may have been scaled since
            placed.append((group.request or trajectory.group_id, trajectory, place))
    left = sorted(place for found in numbers.values() for place in found)
    placed += [(batch.trajectories[i].group_id, batch.trajectories[i], i) for i in left]
    detailed = set(_choose_detailed(placed, report)) if spell is not None else set()
    for index, (request, trajectory, number) in enumerate(placed):
        row: dict[str, Any] = {"step": step, "version": version, "request": request}
        row |= _describe(trajectory, prompts)
        gap = None if number is None else report.gaps.get(number)
        if number is None:
            row["left_out"] = ", ".join(reasons.get(request, ())) or "not learned from"
            row |= {"advantage": None, "mismatch": None}
        else:
            row["left_out"] = None
            row["advantage"] = _finite(report.advantages[number])
            row["mismatch"] = None if gap is None else _mean_gap(gap)
        if spell is not None and index in detailed:
            row["tokens"] = _spell_out(trajectory, spell, gap)
        rows.append(row)
    return rows + _list_rejected(step, version, groups, prompts)


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


def _identify(trajectory: Trajectory) -> tuple[str, bytes, bytes]:
    # Not by identity: a batch may come back from the disk.
    ids = np.ascontiguousarray(trajectory.token_ids, np.int32)
    scores = np.ascontiguousarray(trajectory.logprobs, np.float32)
    return trajectory.group_id, ids.tobytes(), scores.tobytes()


def _number_rows(batch: LearnerBatch) -> dict[tuple[str, bytes, bytes], list[int]]:
    numbers: dict[tuple[str, bytes, bytes], list[int]] = {}
    for number, trajectory in enumerate(batch.trajectories):
        numbers.setdefault(_identify(trajectory), []).append(number)
    return numbers


def _choose_detailed(
    placed: Sequence[tuple[str, Trajectory, int | None]], report: LearnerReport
) -> list[int]:
    """Whole groups, so that completions of one prompt can be compared; first those of which the
    mismatch is known."""
    members: dict[str, list[int]] = {}
    for index, (request, _, _) in enumerate(placed):
        members.setdefault(request, []).append(index)
    known = {
        request: sum(placed[index][2] in report.gaps for index in indices)
        for request, indices in members.items()
    }
    chosen = sorted(members, key=lambda request: -known[request])[:GROUPS_IN_DETAIL]
    return [index for request in chosen for index in members[request]][:TOKEN_ROWS]


def _describe(trajectory: Trajectory, prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    return {
        **_describe_prompt(trajectory.prompt_id, prompts),
        "completion": trajectory.text,
        "finish_reason": trajectory.finish_reason,
        "reward": _finite(trajectory.reward),
        "parts": {name: _finite(value) for name, value in trajectory.reward_parts.items()},
        "versions": list(trajectory.version_span),
        "worker": trajectory.worker,
        "turns": trajectory.turns,
        "sampled_tokens": trajectory.sampled_tokens,
    }


def _describe_prompt(prompt_id: str, prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    prompt = prompts.get(prompt_id)
    return {
        "prompt_id": prompt_id,
        "prompt": prompt.text if prompt else None,
        "reference": prompt.reference if prompt else None,
    }


def _list_rejected(
    step: int, version: int, groups: Sequence[Group], prompts: Mapping[str, Prompt]
) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        prompt_id = group.trajectories[0].prompt_id if group.trajectories else ""
        for reason in group.rejected:
            row = {"step": step, "version": version, "request": group.request}
            row |= _describe_prompt(prompt_id, prompts)
            rows.append(row | {"completion": None, "reward": None, "left_out": reason})
    return rows


def _spell_out(trajectory: Trajectory, spell: Spell, gap: np.ndarray | None) -> dict[str, Any]:
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
    if gap is not None:
        cut = gap[start : len(trajectory.token_ids)].tolist()
        found["gaps"] = [_round(x) if one else None for x, one in zip(cut, mask, strict=True)]
    return found


def _mean_gap(gap: np.ndarray) -> float | None:
    known = np.abs(gap[~np.isnan(gap)])
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _round(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
