"""The sample viewer: completions as data inside the page, and the one script that shows them.

Nothing of a completion ever is markup: the data is JSON in which no element can begin or end, and
the script sets text, never HTML. The page's policy lets that script run and no other.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from raylign.evaluation.report.document import Section, Viewer
from raylign.evaluation.report.figures import show_number
from raylign.evaluation.report.findings import Findings
from raylign.evaluation.report.markup import element, plain
from raylign.evaluation.report.sampling import Samples, write_json_text

DATA_ID = "completions-data"
# Short names: they stand in the page once for each completion.
_FIELDS = {
    "s": "step",
    "v": "versions",
    "q": "request",
    "c": "completion",
    "f": "finish_reason",
    "r": "reward",
    "k": "parts",
    "o": "left_out",
    "d": "detail",
    "a": "advantage",
    "m": "mismatch",
    "b": "worker",
    "u": "turns",
    "n": "sampled_tokens",
}
_TOKEN_FIELDS = {
    "i": "ids",
    "x": "texts",
    "z": "sampled",
    "l": "logprobs",
    "a": "advantages",
    "g": "gaps",
    "more": "more",
}
_SCRIPT = re.compile(r"<script>(.*)</script>", re.DOTALL)


def build_viewer(findings: Findings) -> Section | None:
    """A section to look through completions; None where the run kept none."""
    samples = findings.completions
    if not samples.rows:
        return None
    detailed = sum(1 for row in samples.rows if row.get("tokens"))
    return Section(
        key="completions",
        title="Completions to look through",
        lead="Each answer that was sampled, what it was rewarded with, and what became of it.",
        blocks=(
            Viewer(
                data=encode_samples(samples),
                examples=_choose_examples(samples.rows),
                meaning=f"{_count(samples)} {detailed:,} of them are known token by token, and can "
                "be coloured. Every completion that was made is in rollouts.jsonl of the align "
                "stage.",
            ),
        ),
    )


def encode_samples(samples: Samples) -> dict[str, Any]:
    """The data of the page: each prompt once, and completions that name them by number."""
    prompts: dict[tuple[str, str, str], int] = {}
    rows = []
    for row in samples.rows:
        key = tuple(str(row.get(k) or "") for k in ("prompt_id", "prompt", "reference"))
        number = prompts.setdefault((key[0], key[1], key[2]), len(prompts))
        short = {s: row[name] for s, name in _FIELDS.items() if row.get(name) is not None}
        short["p"] = number
        if row.get("tokens"):
            short["t"] = _encode_tokens(row["tokens"])
        rows.append(short)
    return {"prompts": [list(key) for key in prompts], "rows": rows, "total": samples.total}


def _encode_tokens(tokens: Mapping[str, Any]) -> dict[str, Any]:
    short = {s: tokens[name] for s, name in _TOKEN_FIELDS.items() if name in tokens}
    if all(short.get("z", ())):
        short.pop("z", None)
    if "g" in short:
        short["g"] = [None if gap is None else float(f"{gap:.2g}") for gap in short["g"]]
    return short


def render_viewer(viewer: Viewer) -> str:
    """Controls, data and script."""
    data = element("script", write_json_text(viewer.data), type="application/json", id=DATA_ID)
    return (
        _read("viewer.html")
        .replace("<!--data-->", data)
        .replace("<!--meaning-->", element("p", plain(viewer.meaning), class_="meaning"))
    )


def read_style() -> str:
    """What the viewer adds to the page's style."""
    return _read("viewer.css")


def hash_script() -> str:
    """The viewer's script as a content security policy names it."""
    found = _SCRIPT.search(_read("viewer.html"))
    assert found is not None
    digest = hashlib.sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(name: str) -> str:
    return files("raylign.evaluation.report").joinpath(name).read_text(encoding="utf-8")


def _count(samples: Samples) -> str:
    shown, steps = len(samples.rows), len({row["step"] for row in samples.rows})
    of = "s" if samples.total > 1 else ""
    if shown == samples.total:
        return f"All {shown:,} completion{of} of {samples.steps:,} steps are here."
    return (
        f"Here are {shown:,} of {samples.total:,} completions, from {steps:,} of "
        f"{samples.steps:,} steps: as many as a page of this size can hold."
    )


def _choose_examples(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], ...]:
    """Best and worst of the first and the last step, for a page that cannot be searched."""
    scored = [row for row in rows if row.get("reward") is not None]
    if not scored:
        return ()
    examples = []
    for step in dict.fromkeys((scored[0]["step"], scored[-1]["step"])):
        here = sorted((row for row in scored if row["step"] == step), key=lambda r: -r["reward"])
        for row in here[:1] + here[1:][-1:]:
            reward = show_number(float(row["reward"]))
            prompt, text = str(row.get("prompt") or row.get("prompt_id")), str(row["completion"])
            examples.append((str(step), reward, prompt, text, str(row.get("left_out") or "")))
    return tuple(examples)
