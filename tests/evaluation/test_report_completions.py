"""The sample viewer and the books: what is chosen, that it is inert, and that it adds up."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raylign.evaluation.report import build_report
from raylign.evaluation.report.findings import read_findings
from raylign.evaluation.report.incidents import count_completions
from raylign.evaluation.report.sampling import (
    TEXT_CHARS,
    TOKENS,
    _spread,
    read_samples,
    write_json_text,
)
from raylign.evaluation.report.viewer import hash_script
from raylign.run import Run
from raylign.tracking import append_rows

HOSTILE = (
    "</script><script>document.title='owned'</script><!--<script>"
    "<img src=x onerror=\"document.title='owned'\"> http://evil.org \u2028 </style>&lt;"
)


def make_row(step: int, number: int, text: str = "an answer", **more: Any) -> dict[str, Any]:
    reward = (step * 7 + number * 3) % 11 / 10
    return {
        "step": step,
        "version": step,
        "request": f"{step}/{number // 4}",
        "prompt_id": f"p{(step + number // 4) % 5}",
        "prompt": f"question {(step + number // 4) % 5}?",
        "reference": "4",
        "completion": text,
        "finish_reason": "stop",
        "reward": reward,
        "parts": {"correct": reward},
        "versions": [max(0, step - 1), step],
        "worker": "rollout-0",
        "turns": 1,
        "sampled_tokens": 3,
        "left_out": None,
        "advantage": 0.5,
        "mismatch": None,
    } | more


def make_run(root: Path, rows: list[dict[str, Any]], **files: list[dict[str, Any]]) -> Path:
    with Run(root).write("align", {}, {}) as draft:
        append_rows(draft.path / "rollouts.jsonl", rows)
        for name, lines in files.items():
            append_rows(draft.path / f"{name}.jsonl", lines)
    return root


class Elements(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def build(root: Path, output: Path) -> tuple[dict[str, Any], str, Elements]:
    numbers = build_report(root, output)
    page = (output / "report.html").read_text()
    return numbers, page, Elements(page)


def make_hostile(tmp_path: Path) -> Path:
    tokens = {
        "ids": [1, 2],
        "texts": [HOSTILE, HOSTILE],
        "sampled": [1, 1],
        "logprobs": [-0.5, -7.0],
        "gaps": [1e-7, None],
    }
    rows = [
        make_row(0, 0, HOSTILE, prompt=HOSTILE, reference=HOSTILE, parts={HOSTILE: 1.0}),
        make_row(0, 1, HOSTILE, left_out=HOSTILE, worker=HOSTILE, finish_reason=HOSTILE),
        make_row(1, 0, HOSTILE, prompt_id=HOSTILE, request=HOSTILE, tokens=tokens),
    ]
    return make_run(tmp_path / "run", rows)


def test_a_completion_is_inert_wherever_it_stands(tmp_path: Path) -> None:
    _, page, elements = build(make_hostile(tmp_path), tmp_path / "out")
    data, script = elements.scripts
    assert page.count("<script") == page.count("</script") == 2
    assert not set("<>&") & set(data) and "\u2028" not in data and "<!--" not in script
    # What the page shows is what was sampled, to the letter.
    shown = json.loads(data)
    assert [row["c"] for row in shown["rows"]] == [HOSTILE] * 3
    assert shown["prompts"][0] == ["p0", HOSTILE, HOSTILE]
    assert shown["rows"][2]["t"]["x"] == [HOSTILE, HOSTILE]
    # Nothing else came of it, and nothing is loaded.
    tags = [tag for tag, _ in elements.found]
    assert not {"img", "iframe", "link", "object", "embed"} & set(tags)
    names = {name for _, attributes in elements.found for name in attributes}
    assert not [name for name in names if name == "src" or name.startswith("on")]
    assert not re.search(r"https?://", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", script)


def test_the_page_lets_its_own_script_run_and_no_other(tmp_path: Path) -> None:
    _, page, elements = build(make_hostile(tmp_path), tmp_path / "out")
    [policy] = [
        attributes["content"] or ""
        for tag, attributes in elements.found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = hashlib.sha256(elements.scripts[1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert hash_script() in policy and policy.startswith("default-src 'none'; ")
    # The policy stands before anything that it could come too late for.
    assert page.index("Content-Security-Policy") < page.index("<style")
    plain, _, without = build(make_run(tmp_path / "none", []), tmp_path / "plain")
    assert "completions" not in plain["sections"] and not without.scripts
    assert "script-src 'none'" in (tmp_path / "plain" / "report.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_it_and_is_not_fooled(tmp_path: Path) -> None:
    build(make_hostile(tmp_path), tmp_path / "out")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=2000", f"file://{tmp_path / 'out' / 'report.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    elements = Elements(done.stdout)
    assert "<title>owned" not in done.stdout
    assert "img" not in [tag for tag, _ in elements.found] and len(elements.scripts) == 2
    assert "3 of the 3 completions here fit" in done.stdout
    kinds = [attributes.get("class") for tag, attributes in elements.found if tag == "span"]
    assert kinds.count("surprise") >= 2  # the tokens that are coloured


def test_a_page_holds_what_it_can_and_says_so(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh<&", k=8)) for _ in range(500)]
    rows = [
        make_row(step, number, " ".join(rng.choices(words, k=160)))
        for step in range(100)
        for number in range(60)
    ]
    root = make_run(tmp_path / "run", rows)
    assert (root / "align" / "rollouts.jsonl").stat().st_size > 8_000_000
    numbers, page, elements = build(root, tmp_path / "out")
    shown = json.loads(elements.scripts[0])
    assert numbers["completions"] == {"shown": len(shown["rows"]), "kept": 6000}
    assert 2_500_000 < len(page) < 5_000_000
    assert shown["total"] == 6000 and 500 < len(shown["rows"]) < 6000
    assert f"Here are {len(shown['rows']):,} of 6,000 completions, from 100 of 100 steps" in page
    assert {row["s"] for row in shown["rows"]} == set(range(100))


def test_the_choice_has_all_kinds_and_is_always_the_same(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    tokens = {"ids": [1], "texts": ["a"], "sampled": [1], "logprobs": [-0.1]}
    rows = []
    for step in range(50):
        rows += [make_row(step, n, f"text {step} {n} " * 20) for n in range(16)]
        rows[-1] |= {"tokens": tokens} if step % 10 == 0 else {}
    rows[333] |= {"left_out": "stale"}
    rows[334] |= {"completion": None, "reward": None, "left_out": "reward raised OSError"}
    append_rows(file, rows)
    with file.open("a") as torn:
        torn.write('[1, 2]\n{"no": "step"}\n{"step": 3, "cut')
    samples = read_samples(file, budget=120_000)
    assert samples == read_samples(file, budget=120_000)
    assert (samples.total, samples.steps) == (800, 50)
    assert len(write_json_text(samples.rows)) < 120_000 + 1000
    assert {row["left_out"] for row in samples.rows} == {None, "stale", "reward raised OSError"}
    assert sum("tokens" in row for row in samples.rows) == 5
    for step in (0, 24, 49):
        here = [row["reward"] for row in rows if row["step"] == step and row["reward"] is not None]
        found = {row["reward"] for row in samples.rows if row["step"] == step}
        assert {min(here), max(here)} <= found
    everything = read_samples(file, budget=10**8)
    assert list(everything.rows) == rows  # in the order of the file
    assert read_samples(tmp_path / "none.jsonl").rows == ()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 97])
def test_spreading_names_everything_once_and_goes_far_first(count: int) -> None:
    items = list(range(count))
    order = list(_spread(items))
    assert sorted(order) == items
    if count > 3:
        assert order[:2] == [0, count - 1] and abs(order[2] - count // 2) <= 1


def test_what_is_very_long_is_shortened_and_says_so(tmp_path: Path) -> None:
    many = TOKENS + 5
    tokens = {name: [1] * many for name in ("ids", "sampled", "logprobs")} | {"texts": ["a"] * many}
    append_rows(tmp_path / "r.jsonl", [make_row(0, 0, "x" * (TEXT_CHARS + 1234), tokens=tokens)])
    [row] = read_samples(tmp_path / "r.jsonl").rows
    assert row["completion"].endswith("x\n[1,234 more characters in rollouts.jsonl]")
    assert len(row["tokens"]["texts"]) == TOKENS and row["tokens"]["more"] == 5


def test_the_markdown_twin_has_the_best_and_the_worst(tmp_path: Path) -> None:
    rows = [make_row(0, n, f"first {n} ```") for n in range(3)] + [make_row(1, 0, "last")]
    build(make_run(tmp_path / "run", rows), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "All 4 completions of 2 steps are here." in text
    assert "Step 0, reward 0.6: question 0?\n\n````text\nfirst 2 ```\n````" in text
    assert "Step 0, reward 0: question 0?" in text and "last" in text


def step_rows(**last: float) -> list[dict[str, Any]]:
    rows = [{"step": s, "samples": 10, "dropped/stale": 2.0 * s} for s in range(3)]
    return [*rows[:-1], rows[-1] | last]


def test_the_books_add_up(tmp_path: Path) -> None:
    def count(name: str, metrics: list[dict[str, Any]]) -> dict[str, float]:
        return count_completions(read_findings(make_run(tmp_path / name, [], metrics=metrics), {}))

    assert count("none", []) == {}
    plain = count("plain", step_rows())
    assert plain == {"dispatched": 36, "learned from": 30, "dropped: stale": 6}
    ledger = {"ledger/dispatched": 50, "ledger/trained": 30, "ledger/in_flight": 8}
    books = count("ledger", step_rows(**ledger, **{"ledger/dropped": 12}))
    assert books["dropped: between steps"] == 6 and books["in flight at the last step"] == 8
    named = {"ledger/dropped": 12, "ledger/dropped/stale": 2, "ledger/dropped/rolled back": 10}
    by_reason = count("named", step_rows(**ledger, **named))
    assert by_reason["dropped: rolled back"] == 10 and "dropped: between steps" not in by_reason
    for found in (plain, books, by_reason):
        assert found["dispatched"] == sum(found.values()) - found["dispatched"]


def test_losses_and_recoveries_are_seen(tmp_path: Path) -> None:
    events = [
        {"time": -50.0, "actor": "rollout-0", "what": "started"},
        {"time": 10.0, "actor": "rollout-0", "what": "generate", "start": 0.0, "end": 9.0},
        {"time": 4.0, "actor": "learner", "what": "learn", "start": 3.0, "end": 4.0, "step": 0},
        {"time": 5.0, "actor": "learner", "what": "save", "start": 4.0, "end": 5.0, "step": 0},
        {"time": 6.0, "actor": "rollout-0", "what": "lost", "text": "killed by signal 9"},
        {"time": 7.5, "actor": "rollout-0", "what": "serves"},
        {"time": 8.0, "what": "scale", "rollouts": 3},
    ]
    metrics = [
        {"step": s, "reward/total": 1.0, "reward/brevity": 0.5, "workers/rollouts": 2 + s}
        for s in range(3)
    ]
    root = make_run(tmp_path / "run", [], events=events, metrics=metrics)
    numbers, page, _ = build(root, tmp_path / "out")
    assert numbers["sections"][:3] == ["journey", "alignment", "timeline"]
    assert "books" in numbers["sections"]
    assert page.count('class="mark trouble"') == 1 and page.count('class="mark"') == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 56 s |  | rollout-0 | lost | killed by signal 9 |" in text
    assert "| 58 s |  | run | scale | rollouts 3 |" in text
    assert "9.0 s" in text  # the loop without the start of the workers
    assert "**Workers.**" in text and "| brevity |" in text
    assert numbers["utilisation"]["learner"] == {"save": 1 / 9, "learn": 1 / 9}


def test_answers_without_a_right_or_wrong_are_measured_by_their_group(tmp_path: Path) -> None:
    texts = (("long", 0.9, {"learned": 0.9}), ("short", 0.1, {"learned": 0.1}))
    answers = [{"text": t, "reward": r, "parts": p, "version": 0} for t, r, p in texts]
    row = {"step": 3, "prompt": "q", "reference": "", "completions": answers}
    _, page, _ = build(make_run(tmp_path / "run", [], examples=[row]), tmp_path / "out")
    assert "Step 3: rewards from 0.1 to 0.9" in page and "correct" not in page
    assert "right answer" not in page
    assert page.count("attempt good") == page.count("attempt bad") == 1


def test_judges_and_critics_have_their_curves(tmp_path: Path) -> None:
    metrics = [
        {"step": s, "judge/order_consistency": 0.9, "value/explained_variance": 0.1 * s}
        for s in range(3)
    ]
    build(make_run(tmp_path / "run", [], metrics=metrics), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| same verdict in both orders |" in text and "| explained variance |" in text


def test_parts_of_the_reward_that_policies_gain_without_are_seen(tmp_path: Path) -> None:
    metrics = [{"step": s, "reward/total": 0.3 * s, "agreement/truth": -0.2 * s} for s in range(3)]
    build(make_run(tmp_path / "run", [], metrics=metrics), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Agreement of the reward's parts" in text and "| truth |" in text


def test_a_table_of_incidents_keeps_to_what_is_rare(tmp_path: Path) -> None:
    events = [{"time": float(i), "actor": f"r{i}", "what": "serves"} for i in range(500)]
    events.append({"time": 600.0, "actor": "r7", "what": "lost", "text": "no answer"})
    root = make_run(tmp_path / "run", [], events=events)
    build(root, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| r7 | lost | no answer |" in text and "1 of 501; all are in events.jsonl." in text
    assert "40 of 501 actors" not in text  # r0 to r499: 500 actors
    assert "40 of 500 actors are shown." in text
