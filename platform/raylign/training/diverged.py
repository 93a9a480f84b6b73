"""What is kept of a policy update whose gradient was no number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from raylign.training.batches import BatchFiles, LearnerBatch


def keep_batch(directory: Path, batch: LearnerBatch, rows: Sequence[int], reason: str) -> Path:
    """Write the whole batch, with which the update can be made again, and `rows.jsonl`: the reason,
    then a line for each of the `rows` that the optimizer step was made of. The directory."""
    place = directory / f"step-{batch.step:08d}"
    BatchFiles(place).write(batch)
    with (place / "rows.jsonl").open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"reason": reason, "step": batch.step}) + "\n")
        for row in rows:
            one = batch.trajectories[row]
            line = {
                "row": row,
                "prompt_id": one.prompt_id,
                "group_id": one.group_id,
                "reward": one.reward,
                "versions": list(one.version_span),
                "lowest_logprob": float(one.logprobs.min(initial=0.0)),
                "text": one.text,
            }
            stream.write(json.dumps(line) + "\n")
    return place
