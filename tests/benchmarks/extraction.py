"""What reading costs beyond the libraries: `python tests/benchmarks/extraction.py [PAGES]`.

A WARC file of generated pages is read and extracted by fastwarc and resiliparse alone, and by
`read_slice`, which also decodes, repairs, cleans, identifies and tabulates; then the same texts as
JSON lines against `json.loads`, as Parquet against `pyarrow` alone, and where they are installed,
trafilatura on warcio's records. All in this process, in CPU seconds, the best of five.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import SourceConfig, TextbookConfig
from raylign.data.extraction.text import clean_text
from raylign.data.sources.python import read_topics
from raylign.data.sources.slices import plan_slices, read_slice


def write_pages(file: Path, count: int) -> tuple[list[str], int]:
    """Pages as crawls have them: a request before, a third that is no page; (texts, HTML bytes)."""
    rng = random.Random(0)
    sentences = [s for row in read_topics() for s in row.text.split(". ") if len(s) > 40]
    texts, size = [], 0
    with file.open("wb") as out:
        for number in range(count):
            paragraphs = [
                ". ".join(rng.choices(sentences, k=rng.randint(2, 6)))
                for _ in range(rng.randint(3, 20))
            ]
            if number % 7 == 0:
                paragraphs.append("Ungewöhnliche Größen, «déjà vu»; привет.")
            texts.append("\n\n".join(paragraphs))
            page = _frame(paragraphs, rng)
            status = "404 Not Found" if number % 9 == 0 else "200 OK"
            size += len(page) * (number % 9 > 0)
            for kind, block in (
                ("request", b"GET / HTTP/1.1\r\nHost: a.org\r\n\r\n"),
                (
                    "response",
                    f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\n\r\n".encode() + page,
                ),
            ):
                head = (
                    f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a.org/{number}\r\n"
                    f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
                    f"Content-Type: application/http; msgtype={kind}\r\n"
                    f"Content-Length: {len(block)}\r\n\r\n"
                )
                out.write(gzip.compress(head.encode() + block + b"\r\n\r\n", 5, mtime=0))
    return texts, size


def _frame(paragraphs: list[str], rng: random.Random) -> bytes:
    links = "".join(f'<li class="m"><a href="/{n}">Section {n}</a></li>' for n in range(40))
    body = "".join(f'<div class="b"><p id="p{rng.random()}">{p}</p></div>' for p in paragraphs)
    script = "<script>var a = 1; function f(x) { return x + a; }</script>" * 12
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>Page</title>{script}</head>"
        f"<body><nav><ul>{links}</ul></nav><main><article><h1>Page</h1>{body}</article></main>"
        f"<footer><ul>{links}</ul></footer></body></html>"
    ).encode()


def read_bare(file: Path) -> int:
    """fastwarc and resiliparse, and nothing else; characters found."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    chars = 0
    with file.open("rb") as stream:
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response):
            if record.http_headers.status_code != 200:
                continue
            data = record.reader.read()
            page = bytes_to_str(data, detect_encoding(data, from_html_meta=True) or "utf-8")
            chars += len(
                extract_plain_text(
                    page,
                    main_content=True,
                    preserve_formatting=True,
                    alt_texts=False,
                    comments=False,
                )
            )
    return chars


def read_ours(kind: Any, file: Path) -> int:
    """`read_slice`; usable documents."""
    found = 0
    for part in plan_slices([SourceConfig(kind=kind, path=file)], TextbookConfig()):
        for table in read_slice(part, TextbookConfig(), 0):
            found += table["reason"].null_count
    return found


def read_warcio(file: Path) -> int:
    """warcio and trafilatura, as datatrove reads; characters found."""
    import trafilatura
    from warcio.archiveiterator import ArchiveIterator

    chars = 0
    with file.open("rb") as stream:
        for record in ArchiveIterator(stream):
            if record.rec_type == "response" and record.http_headers.get_statuscode() == "200":
                page = record.content_stream().read().decode(errors="ignore")
                chars += len(trafilatura.extract(page, include_comments=False) or "")
    return chars


def extract_careful(file: Path) -> int:
    """fastwarc and trafilatura; characters found."""
    import trafilatura
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    chars = 0
    with file.open("rb") as stream:
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response):
            if record.http_headers.status_code == 200:
                page = record.reader.read().decode(errors="ignore")
                chars += len(trafilatura.extract(page, include_comments=False) or "")
    return chars


def read_json(file: Path) -> int:
    """The standard library's parser; characters found."""
    with file.open("rb") as stream:
        return sum(len(json.loads(line)["text"]) for line in stream)


def read_parquet(file: Path) -> int:
    """pyarrow, batch by batch, no value touched; rows found."""
    return sum(batch.num_rows for batch in pq.ParquetFile(file).iter_batches(1000))


def measure(*works: Callable[[], int], rounds: int = 5) -> list[float]:
    """CPU seconds of each, the least of some rounds; in turns, so that a busy machine slows all."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for number, work in enumerate(works):
            started = time.process_time()
            assert work()
            best[number] = min(best[number], time.process_time() - started)
    return best


def show(name: str, size: float, seconds: float, peer: float | None = None) -> None:
    ratio = "" if peer is None else f"   {peer / seconds:>6.2f} x"
    sys.stdout.write(f"{name:<44} {size / seconds / 1e6:>8.1f} MB/s a core{ratio}\n")


def run(pages: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        archive = Path(name, "pages.warc.gz")
        texts, size = write_pages(archive, pages)
        lines, table = Path(name, "pages.jsonl"), Path(name, "pages.parquet")
        lines.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
        pq.write_table(pa.table({"text": texts * 4}), table)
        read_ours("text", lines)  # compiles

        bare, ours = measure(lambda: read_bare(archive), lambda: read_ours("warc", archive))
        show("WARC: fastwarc + resiliparse (HTML)", size, bare)
        show("WARC: read_slice", size, ours, bare)
        for peer, modules in (
            (extract_careful, "fastwarc + trafilatura"),
            (read_warcio, "warcio + trafilatura"),
        ):
            try:
                (careful,) = measure(partial(peer, archive), rounds=1)
                show(f"WARC: {modules}", size, careful, bare)
            except ImportError as error:
                sys.stdout.write(f"WARC: {modules}: not measured ({error})\n")
        size = lines.stat().st_size
        bare, ours = measure(lambda: read_json(lines), lambda: read_ours("jsonl", lines))
        show("JSON lines: json.loads", size, bare)
        show("JSON lines: read_slice", size, ours, bare)
        size = sum(len(text.encode()) for text in texts) * 4
        bare, ours = measure(lambda: read_parquet(table), lambda: read_ours("parquet", table))
        show("Parquet: pyarrow batches", size, bare)
        show("Parquet: read_slice", size, ours, bare)
        pq.write_table(pa.table({"text": [clean_text(text) for text in texts] * 4}), table)
        (ours,) = measure(lambda: read_ours("parquet", table))
        show("Parquet: read_slice, texts clean already", size, ours, bare)


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
