"""Faults of a judge behind an endpoint: what it cannot say is asked again or left out, and is never
a low mark."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter

from tests.faults.align_run import AlignRun
from tests.faults.lab import ALONE, Lab, Outcome, end_well, faults, first_event, since
from tests.inference.service import Asked, Service, Told, serve

TROUBLES = (
    Told(status=429, headers={"Retry-After": "0.2"}, body="{}"),
    Told(status=500, body="out of memory"),
    Told(dropped=True),
    Told(seconds=4.0),  # longer than judge.timeout_s
    Told(text='{"better": "fir'),
    Told(text="I would say the first one, but who am I to judge."),
)


def judged(service: Service, *settings: str) -> tuple[str, ...]:
    """Settings of a run whose completions are compared by `service`."""
    place = f"endpoint: '{service.url}', endpoint_model: m"
    judge = f"judge={{{place}, compare: true, timeout_s: 3, attempts: 2, concurrency: 8}}"
    small = ("steps=8", "prompts_per_step=4", "checkpoint_every=1")
    return (*ALONE, "reward={source: judge, weights: {}}", judge, *small, *settings)


def shown(asked: Asked) -> list[str]:
    """The two completions, in the order in which they are shown."""
    found = re.findall(r"\[\[begin (\w+) [\w ]*answer\]\]\n(.*?)\n\[\[end \1", asked.question, re.S)
    return [text for _, text in found]


def prefer_variety(asked: Asked) -> Told:
    """The completion with more different words; of some pairs the one that is shown first, whatever
    it is, and of some nothing that could be read."""
    first, second = shown(asked)
    mood = hashlib.sha256("".join(sorted([first, second])).encode()).digest()[0] % 8
    if mood == 0:
        return TROUBLES[-1]
    ahead = len(set(first.split())) - len(set(second.split()))
    better = "first" if mood == 1 or ahead > 0 else "second" if ahead < 0 else "tie"
    return Told(json.dumps({"reason": "r", "better": better}))


def misbehave(asked: Asked) -> Told:
    """Trouble for every third question when it is first asked."""
    number = int.from_bytes(hashlib.sha256(asked.question.encode()).digest()[:4], "big")
    troubled = number % 3 == 0 and asked.question not in misbehave.seen  # type: ignore[attr-defined]
    misbehave.seen[asked.question] += 1  # type: ignore[attr-defined]
    return TROUBLES[number // 3 % len(TROUBLES)] if troubled else prefer_variety(asked)


def add_up(run: AlignRun, name: str) -> float:
    return sum(float(row.get(f"judge/{name}", 0)) for row in run.metrics())


@faults(
    (
        "30",
        "a judge that answers 429, 500, late, malformed, biased by position, or hangs up",
        "asked again after a pause, both orders judged; contradictions are ties, silence left out",
    ),
    (
        "30b",
        "a judge that goes away for good in mid-run",
        "ends with a line that names it; once it is back, the same command goes on",
    ),
)
def trouble_judge(lab: Lab, found: list[Outcome]) -> int:
    misbehave.seen = Counter()  # type: ignore[attr-defined]
    with serve(misbehave) as service, lab.run(*judged(service)) as run:
        run.start()
        run.wait_for_step(2)
        counts = {name: add_up(run, name) for name in ("calls", "retries", "abstentions")}
        contradictions = add_up(run, "contradictions")
        assert all(counts.values()) and contradictions, (counts, contradictions)
        consistent = [row["judge/order_consistency"] for row in run.metrics()]
        assert 0 < min(consistent) < 1, consistent
        told = ", ".join(f"{count:.0f} {name}" for name, count in counts.items())
        note = f"{told}, {contradictions:.0f} contradictions"
        note += f"; order consistency {min(consistent):.2f} to {max(consistent):.2f}"
        found.append(Outcome(None, None, note))

        start = time.time()
        service.tell = lambda asked: Told(dropped=True)
        end = run.finish(240)
        ended = time.time() - start
        assert end.status == 2 and f"align.judge.endpoint={service.url}" in end.last, end.last
        service.tell = prefer_variety
        again = time.time()
        run.start()
        resumed = first_event(run, again, 300, what="resumed")
        end_well(run, again)
        orders = Counter(tuple(shown(asked)) for asked in service.asked)
        assert all(pair[::-1] in orders for pair in orders), "a pair was judged in one order only"
        found.append(Outcome(ended, since(again, resumed), end.last))
        return run.lost()
