from __future__ import annotations

import gzip
import io
import os
from pathlib import Path
from typing import Any

import pytest

from raylign.config import SourceConfig, TextbookConfig
from raylign.data.sources.rows import DAMAGED, SKIPPED
from raylign.data.sources.slices import plan_slices, read_slice

HTML = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
SENTENCE = "This page tells a story about the river and the town. "


def record(
    body: bytes | str = f"<p>{SENTENCE * 20}</p>",
    kind: str = "response",
    address: str = "http://a.org/x",
    length: object = None,
    http: str = HTML,
    more: str = "",
) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    block = (http + "\r\n").encode() + body if http else body
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\n"
        f"WARC-Date: 2024-05-06T07:08:09Z\r\nWARC-Record-ID: <urn:uuid:0>\r\n{more}"
        f"Content-Type: {'application/http; msgtype=response' if http else 'text/plain'}\r\n"
        f"Content-Length: {len(block) if length is None else length}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def pages(count: int) -> list[bytes]:
    return [
        record(f"<p>Number {n}. {SENTENCE * 20}</p>", address=f"http://a.org/{n}")
        for n in range(count)
    ]


def read(path: Path, kind: Any = "warc", **more: Any) -> list[dict[str, Any]]:
    rows = []
    for part in plan_slices([SourceConfig(kind=kind, path=path, **more)], TextbookConfig()):
        for table in read_slice(part, TextbookConfig(), 0):
            rows += table.to_pylist()
    assert {row["reason"] for row in rows if row["reason"]} <= SKIPPED | DAMAGED
    assert len({row["doc_id"] for row in rows}) == len(rows)
    return rows


def outcomes(file: Path, data: bytes, **more: Any) -> list[str]:
    """The reason of each record, or the last part of a page's address."""
    file.write_bytes(data)
    return [row["reason"] or row["url"].rpartition("/")[2] for row in read(file, **more)]


def pack(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("packed", [True, False])
def test_pages_keep_where_they_are_from(tmp_path: Path, packed: bool) -> None:
    raw = [pack(page) if packed else page for page in pages(40)]
    file = tmp_path / "a.warc.gz"
    file.write_bytes(b"".join(raw))
    rows = read(file)
    starts = [sum(map(len, raw[:n])) for n in range(40)]
    assert [row["offset"] for row in rows] == starts
    assert [row["origin"] for row in rows] == [f"a:a.warc.gz@{start}" for start in starts]
    assert [row["url"] for row in rows] == [f"http://a.org/{n}" for n in range(40)]
    assert {row["date"] for row in rows} == {"2024-05-06T07:08:09Z"}
    assert rows[7]["text"] == f"Number 7. {SENTENCE * 20}".strip()


@pytest.mark.parametrize("codec", ["zst", "lz4", "whole"])
def test_other_packings(tmp_path: Path, codec: str) -> None:
    from fastwarc.stream_io import Lz4Writer, ZstdWriter

    out = io.BytesIO()
    if codec == "whole":
        out.write(pack(b"".join(pages(6))))
    else:
        for page in pages(6):
            writer = {"zst": ZstdWriter, "lz4": Lz4Writer}[codec](out)
            writer.write(page)
            writer.close()
    name = "a.warc.gz" if codec == "whole" else f"a.warc.{codec}"
    assert outcomes(tmp_path / name, out.getvalue()) == list("012345")


def test_what_is_no_page_is_skipped_with_a_reason(tmp_path: Path) -> None:
    records = [
        record("software: x", "warcinfo", http=""),
        record("GET / HTTP/1.1\r\n", "request", http=""),
        record("", "revisit"),
        record("", "metadata", http=""),
        record("a.org. IN A 1.2.3.4", "response", "dns:a.org", http=""),
        record(http=HTML.replace("200 OK", "404 Not Found")),
        record("{}", http=HTML.replace("text/html", "application/json")),
        record("<html><script>x</script></html>"),
        record(f"<p>{SENTENCE * 9}</p>", address="http://a.org/good"),
    ]
    found = outcomes(tmp_path / "a.warc", b"".join(records))
    assert found == [
        *["not_a_response"] * 4,
        "not_html",
        "http_status",
        "not_html",
        "no_main_text",
        "good",
    ]


def spoil(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (lambda page: spoil(pack(page), len(pack(page)) // 2), "damaged_compression"),
        (lambda page: spoil(pack(page), len(pack(page)) - 6), "damaged_compression"),
        (lambda page: b"garbage" * 20, "damaged_compression"),
        (lambda page: pack(record(length=200)), "wrong_content_length"),
        (lambda page: pack(record(length=99_999)), "wrong_content_length"),
        (lambda page: pack(record(length="many")), "damaged_header"),
        (lambda page: pack(page.replace(b"Content-Length", b"Length")), "damaged_header"),
        (lambda page: pack(page.replace(b"WARC/1.0", b"HTML/1.0")), "damaged_record"),
        (lambda page: pack(record(address="\x01")), "bad_target_uri"),
        (lambda page: pack(record(address="no address")), "bad_target_uri"),
        (lambda page: pack(page.replace(b"a.org", b"\xff\xfe")), "bad_target_uri"),
        (lambda page: pack(page.replace(b"WARC-Target-URI", b"X")), "bad_target_uri"),
        (lambda page: pack(record("", http="nonsense\r\n")), "damaged_http"),
    ],
)
def test_reading_goes_on_after_a_damaged_member(tmp_path: Path, damaged: Any, reason: str) -> None:
    members = [pack(page) for page in pages(5)]
    file = tmp_path / "a.warc.gz"
    bad = damaged(pages(3)[2])
    assert outcomes(file, b"".join([*members[:2], bad, *members[3:]])) == ["0", "1", reason, *"34"]
    start = len(members[0]) + len(members[1])
    assert read(file)[2]["offset"] == start and f"@{start}" in read(file)[2]["origin"]


@pytest.mark.parametrize("length", [100, 1300, 10**6])
def test_reading_goes_on_after_a_wrong_length(tmp_path: Path, length: int) -> None:
    all_pages = pages(5)
    all_pages[2] = record(length=length)
    found = outcomes(tmp_path / "a.warc", b"".join(all_pages))
    assert found == ["0", "1", "wrong_content_length", "3", "4"]


@pytest.mark.parametrize("packed", [True, False])
def test_every_place_to_break_off(tmp_path: Path, packed: bool) -> None:
    """Whole records before the break are read, and what is left of one is reported."""
    raw = [pack(page) if packed else page for page in pages(3)]
    data = b"".join(raw)
    whole = len(data) - len(raw[2])
    for size in range(whole, len(data), 31 if packed else 211):
        found = outcomes(tmp_path / "a.warc", data[:size])
        assert found[:2] == ["0", "1"] and len(found) == 2 + (size > whole), size
        if size < len(data) - 12:
            assert set(found[2:]) <= DAMAGED, size


@pytest.mark.parametrize("data", [b"junk\n" * 99, b"\x1f\x8b\x08junk" * 9, b"WARC/1.0\r\n", b"\0"])
def test_a_file_that_is_no_archive_is_one_bad_record(tmp_path: Path, data: bytes) -> None:
    (found,) = outcomes(tmp_path / "a.warc", data)
    assert found in DAMAGED
    assert outcomes(tmp_path / "a.warc", b"") == []


def encoded(body: bytes, name: str, value: str) -> bytes:
    return record(body, address="http://a.org/page", http=f"{HTML}{name}: {value}\r\n")


def test_encodings_of_http(tmp_path: Path) -> None:
    page = f"<p>{SENTENCE * 20}</p>".encode()
    half = len(page) // 2
    first, second = page[:half], page[half:]
    chunks = b"%x\r\n%s\r\n%x;ext\r\n" % (len(first), first, len(second))
    chunks += second + b"\r\n0\r\n\r\n"
    records = [
        encoded(chunks, "Transfer-Encoding", "chunked"),
        encoded(page, "Transfer-Encoding", "chunked"),  # undone by the crawler
        encoded(b"ff\r\n" + page + b"\r\nzz\r\n", "Transfer-Encoding", "chunked"),
        encoded(gzip.compress(page), "Content-Encoding", "gzip"),
        encoded(page, "Content-Encoding", "gzip"),
        encoded(b"\x1f\x8bnot gzip", "Content-Encoding", "gzip"),
        encoded(gzip.compress(b" " * (1 << 20)), "Content-Encoding", "gzip"),
        encoded(page, "Content-Encoding", "identity"),
        encoded(b"\1\2", "Content-Encoding", "unheard-of"),
    ]
    found = outcomes(tmp_path / "a.warc", b"".join(records), max_record_bytes=100_000)
    bad = "broken_encoding"
    assert found == ["page", "page", bad, "page", "page", bad, bad, "page", bad]


def test_a_large_record_is_not_read(tmp_path: Path) -> None:
    records = [pages(1)[0], record("x" * 50_000), record(address="http://a.org/last")]
    found = outcomes(tmp_path / "a.warc", b"".join(records), max_record_bytes=20_000)
    assert found == ["0", "too_large", "last"]


def test_wet_records_are_text(tmp_path: Path) -> None:
    def text(body: bytes, name: str) -> bytes:
        more = "WARC-Identified-Content-Language: eng\r\n"
        return record(body, "conversion", f"http://a.org/{name}", http="", more=more)

    records = [
        record("x", "warcinfo", http=""),
        text("Grüße \n".encode(), "one"),
        text(b"\xff\xfe", "two"),
    ]
    file = tmp_path / "a.warc.wet.gz"
    file.write_bytes(b"".join(map(pack, records)))
    rows = read(file, "wet")
    assert [row["reason"] for row in rows] == ["not_a_conversion", None, "invalid_utf8"]
    assert (rows[1]["text"], rows[1]["meta"]) == ("Grüße", '{"language": "eng"}')
    assert [row["reason"] for row in read(file, "warc")] == ["not_a_response"] * 3


def real_archive(name: str) -> Path:
    root = Path(__file__).resolve().parents[3]
    base = Path(os.environ.get("RAYLIGN_TEST_DATA", root.parent / "shared" / "data"))
    file = base / "web" / "warc" / name
    if not file.exists():
        pytest.skip(f"no real archive at {file}; set RAYLIGN_TEST_DATA")
    return file


@pytest.mark.parametrize(
    ("name", "good", "damaged"),
    [
        ("bad.arc", 0, 6),
        ("example-bad-non-chunked.warc.gz", 1, 0),
        ("example-bad.warc.gz.bad", 1, 0),
        ("example-digest.warc", 0, 0),
        ("example-iana.org-chunked.warc", 1, 0),
        ("example-resource.warc.gz", 1, 0),
        ("example-space-in-target-uri.warc.gz", 0, 0),
        ("example-space-in-url.arc", 0, 1),
        ("example-trunc.warc", 0, 1),
        ("example-wget-bad-target-uri.warc.gz", 1, 0),
        ("example-wrong-chunks.warc.gz", 1, 0),
        ("example.arc", 1, 0),
        ("example.arc.gz", 1, 0),
        ("example.warc", 1, 0),
        ("example.warc.gz", 1, 0),
        ("post-test.warc.gz", 0, 0),
    ],
)
def test_real_archives(name: str, good: int, damaged: int) -> None:
    rows = read(real_archive(name))
    assert sum(row["reason"] is None for row in rows) == good
    assert sum(row["reason"] in DAMAGED for row in rows) == damaged
    assert all(row["url"].startswith("http") for row in rows if row["reason"] is None)
