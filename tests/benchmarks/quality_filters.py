"""What measuring a document costs: `python tests/benchmarks/quality_filters.py [DOCUMENTS]`.

Prints megabytes of text a second of CPU time on one core: all quality metrics together, language,
personal data, and everything. With `--datatrove-python PATH` (the interpreter of an environment
with datatrove) its four filters and its formatter judge the same documents, once as they are and
once with spaCy's words and sentences replaced by regular expressions, and ratios are printed.

Documents are the C4 sample of ../shared/data/web when present, else generated; repeated or cut to
DOCUMENTS (default 3000, of which datatrove sees the first 300).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "web" / "c4_demo.jsonl"
PEER_DOCUMENTS = 300


def time_call(call: Callable[[], Any]) -> float:
    """CPU seconds of the second call: the first compiles and loads."""
    call()
    started = time.process_time()
    call()
    return time.process_time() - started


def read_texts(count: int) -> list[str]:
    """The sample, or sentences of made-up words with a planted repetition in every tenth text."""
    if SAMPLE.exists():
        texts = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()]
    else:
        import numpy as np

        rng = np.random.default_rng(0)
        letters = np.array(list("etaoinshrdlucmfw"))
        words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)]
        words[:8] = ["the", "be", "to", "of", "and", "that", "have", "with"]
        ranks = 1 / np.arange(1, len(words) + 1)
        texts = []
        for number in range(300):
            chosen = rng.choice(words, 400, p=ranks / ranks.sum())
            lines = [" ".join(chosen[i : i + 12]).capitalize() + "." for i in range(0, 400, 12)]
            texts.append("\n".join(lines * (2 if number % 10 == 0 else 1)))
    return (texts * (count // len(texts) + 1))[:count]


def measure_ours(texts: list[str]) -> dict[str, float]:
    """Megabytes a second by what is measured."""
    import pyarrow as pa

    from raylign.config import PiiConfig, QualityConfig, SignalsConfig
    from raylign.data.quality.language import identify
    from raylign.data.quality.pii import KINDS, count, scrub
    from raylign.data.quality.rules import judge
    from raylign.data.quality.signals import measure

    column = pa.array(texts, pa.large_string())
    table = pa.table({"text": column, "url": pa.nulls(len(texts), pa.string())})
    plain, web = SignalsConfig(language=False), QualityConfig(preset="web")
    signals = measure(table, plain)
    both = PiiConfig(mails=True, ips=True)
    every = PiiConfig.model_validate(dict.fromkeys(KINDS, True))
    calls: dict[str, Callable[[], Any]] = {
        "all metrics": lambda: measure(table, plain),
        "judging them (preset web)": lambda: judge(signals, web),
        "language": lambda: identify(column),
        "personal data, counted": lambda: count(column),
        "personal data, mails and addresses replaced": lambda: [scrub(t, both) for t in texts],
        "personal data, all kinds replaced": lambda: [scrub(t, every) for t in texts],
        "all metrics, language, personal data": lambda: measure(
            table, SignalsConfig(language=True, pii=True)
        ),
    }
    size = sum(len(text.encode()) for text in texts) / 1e6
    return {name: size / time_call(call) for name, call in calls.items()}


def measure_py3langid(texts: list[str]) -> float:
    """Megabytes a second (of whole texts) of the same model in py3langid's own loop."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    from raylign.data.quality.language import HEAD_BYTES

    peer = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    heads = [text.encode()[:HEAD_BYTES] for text in texts]
    size = sum(len(text.encode()) for text in texts) / 1e6
    return size / time_call(lambda: [peer.classify(head) for head in heads])


def measure_peer(file: Path, tokenizer: str) -> None:
    """Runs in datatrove's environment; prints CPU seconds and judgements as JSON."""
    import re

    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.utils import text as splitting
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    texts: list[str] = json.loads(file.read_text("utf-8"))
    tokenizing = [0.0]
    peer = load_word_tokenizer("eng")
    if tokenizer == "regex":
        peer.word_tokenize = re.compile(r"\w+|[^\w\s]").findall
        sentence = re.compile(r".+?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)
        peer.span_tokenize = lambda text: [m.span() for m in sentence.finditer(text)]

    def clock(call: Callable[[str], Any]) -> Callable[[str], Any]:
        def timed(text: str) -> Any:
            started = time.process_time()
            result = call(text)
            tokenizing[0] += time.process_time() - started
            return result

        return timed

    peer.word_tokenize, peer.span_tokenize = clock(peer.word_tokenize), clock(peer.span_tokenize)
    chain = {
        "Gopher quality": filters.GopherQualityFilter(),
        "Gopher repetition": filters.GopherRepetitionFilter(),
        "C4": filters.C4QualityFilter(filter_no_terminal_punct=True),
        "FineWeb": filters.FineWebQualityFilter(),
    }
    seconds: dict[str, float] = {}
    verdicts: dict[str, list[Any]] = {}
    for name, each in chain.items():
        verdicts[name] = []
        each.filter(Document(text=texts[0], id="0"))
        started = time.process_time()
        for text in texts:
            splitting.split_into_parts.cache_clear()
            verdict = each.filter(Document(text=text, id="0"))
            verdicts[name].append(verdict if verdict is True else verdict[1])
        seconds[name] = time.process_time() - started
    tokenizing[0] = 0.0
    started = time.process_time()
    for text in texts:
        for each in chain.values():
            each.filter(Document(text=text, id="0"))
    seconds["all four, words split once"] = time.process_time() - started
    seconds["of which splitting"] = tokenizing[0]
    formatter = PIIFormatter()
    started = time.process_time()
    for text in texts:
        formatter.format(text)
    seconds["PII formatter"] = time.process_time() - started
    sys.stdout.write("\n" + json.dumps({"seconds": seconds, "verdicts": verdicts}) + "\n")


def run_peer(python: Path, texts: list[str], tokenizer: str) -> dict[str, Any]:
    """What `measure_peer` printed."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "texts.json"
        file.write_text(json.dumps(texts), "utf-8")
        command = [str(python), __file__, "--peer", str(file), "--tokenizer", tokenizer]
        output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        raise SystemExit(f"{python} cannot run datatrove's filters:\n{output.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(output.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="MB/s a core of the quality signals")
    parser.add_argument("documents", nargs="?", type=int, default=3000)
    parser.add_argument("--datatrove-python", type=Path)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", default="spacy", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        measure_peer(given.peer, given.tokenizer)
        return
    sys.path.insert(0, str(ROOT / "platform"))
    texts = read_texts(given.documents)
    ours = measure_ours(texts)
    for name, rate in ours.items():
        sys.stdout.write(f"{name:<48}{rate:>10.1f} MB/s\n")
    rate = measure_py3langid(texts[:PEER_DOCUMENTS])
    sys.stdout.write(f"{'language by py3langid itself':<48}{rate:>10.1f} MB/s\n")
    sys.stdout.write(f"{'our language is faster by':<48}{ours['language'] / rate:>10.1f} x\n")
    if not given.datatrove_python:
        return
    texts = texts[:PEER_DOCUMENTS]
    size = sum(len(text.encode()) for text in texts) / 1e6
    for tokenizer in ("spacy", "regex"):
        seconds = run_peer(given.datatrove_python, texts, tokenizer)["seconds"]
        together = seconds["all four, words split once"]
        share = seconds.pop("of which splitting") / together
        sys.stdout.write(f"\ndatatrove, {tokenizer} splits words and sentences ({share:.0%})\n")
        for name, spent in seconds.items():
            sys.stdout.write(f"  {name:<46}{size / spent:>10.2f} MB/s\n")
        ratio = ours["all metrics"] * together / size
        sys.stdout.write(f"  {'our metrics are faster than all four by':<46}{ratio:>10.0f} x\n")
        ratio = ours["personal data, mails and addresses replaced"] / size
        ratio *= seconds["PII formatter"]
        sys.stdout.write(f"  {'our replacement of mails and addresses by':<46}{ratio:>10.1f} x\n")


if __name__ == "__main__":
    main()
