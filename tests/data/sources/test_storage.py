from __future__ import annotations

import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import SourceConfig, TextbookConfig, UserError
from raylign.data.sources.fingerprints import identify_sources
from raylign.data.sources.slices import label_sources, plan_slices, read_slice
from raylign.data.sources.storage import (
    _join,
    _split_glob,
    _walk,
    list_stored,
    open_stored,
)


def read(source: SourceConfig) -> list[tuple[str, str]]:
    return [
        (row["doc_id"], row["text"])
        for part in plan_slices([source], TextbookConfig())
        for table in read_slice(part, TextbookConfig(), 0)
        for row in table.to_pylist()
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b c#1%.jsonl", "deep/er/c.jsonl", "deep/d.txt", "e.jsonl.zst"):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        line = b'{"text": "%s"}\n' % name.encode()
        file.write_bytes(pa.Codec("zstd").compress(line, asbytes=True) if "zst" in name else line)
    return tmp_path / "data"


NAMES = ["a.jsonl", "b c#1%.jsonl", "deep/er/c.jsonl", "e.jsonl.zst"]


def test_a_url_reads_as_the_path_does(tree: Path) -> None:
    local = read(SourceConfig(kind="jsonl", path=tree))
    remote = read(SourceConfig(kind="jsonl", path=f"file://{tree}"))
    assert [text for _, text in local] == NAMES
    assert remote == local  # ids, too


def test_parquet_by_url(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    source = SourceConfig(kind="parquet", path=f"file://{tmp_path}/a.parquet")
    assert [text for _, text in read(source)] == ["one", "two"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b c#1%.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b c#1%.jsonl", "deep/er/c.jsonl"]),
        ("[a-d]*", ["a.jsonl", "b c#1%.jsonl"]),
        ("[!a]*.jsonl", ["b c#1%.jsonl"]),
        ("deep/**", ["d.txt", "er/c.jsonl"]),
        ("?.jsonl", ["a.jsonl"]),
    ],
)
def test_patterns(tree: Path, pattern: str, names: list[str]) -> None:
    for base in (str(tree), f"file://{tree}"):
        found = list_stored(f"{base}/{pattern}", (".jsonl",), "key")
        assert [file.name for file in found] == names
        for file in found:
            with open_stored(file.path) as stream:
                assert len(stream.read()) == file.size > 0


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    file = tmp_path / "part[1].jsonl"
    file.write_text('{"text": "x"}\n')
    assert [text for _, text in read(SourceConfig(kind="jsonl", path=file))] == ["x"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file:///no/such/place", "no such file"),
        ("nonsense://bucket/dir", "cannot be listed"),
        ("{tree}/*.parquet", "matches no file; correct the pattern"),
        ("file://{tree}/deep/er/*.txt", "matches no file"),
    ],
)
def test_mistakes(tree: Path, path: str, message: str) -> None:
    path = path.format(tree=tree)
    with pytest.raises(UserError, match=message) as caught:
        list_stored(path, (".txt",), "prepare.sources.4")
    assert str(caught.value).startswith(f"prepare.sources.4.path={path}: ")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "back").symlink_to(tmp_path)  # no endless circle
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("/no/such/file")
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    Path(os.fsdecode(odd)).write_bytes(b"")
    for base in (str(tmp_path), f"file://{tmp_path}"):
        assert [f.name for f in list_stored(base, (".txt",), "key")] == ["a.txt", "c.txt"]
        for pattern, reason in [
            ("p*", "'pipe' is no regular file"),
            ("**/gon?", r"'gone' cannot be reached \(No such file"),
            ("*.jsonl", r"'caf\\udce9.jsonl' has a name that is not UTF-8"),
        ]:
            with pytest.raises(UserError, match=rf"^key\.path=.*: {reason}.*; remove or replace"):
                list_stored(f"{base}/{pattern}", (".txt",), "key")
        with pytest.raises(UserError, match="is no file or directory; correct the path"):
            list_stored(f"{base}/pipe", (".txt",), "key")


def test_a_pattern_looks_no_deeper_than_it_reaches(tree: Path) -> None:
    assert list(_walk(str(tree / "deep"), 1, frozenset())) == [str(tree / "deep" / "d.txt")]
    assert len(list(_walk(str(tree), math.inf, frozenset()))) == 5


def test_one_place_by_two_ways_is_listed_twice(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "deep")
    first = SourceConfig(kind="text", path=tree / "deep")
    for path in (tree / "deep" / ".." / "deep", tree / "link"):
        with pytest.raises(UserError, match=r"prepare\.sources\.1: .* is listed twice"):
            label_sources([first, SourceConfig(kind="text", path=path)])
    with pytest.raises(UserError, match="needs a path"):  # "" is not the working directory
        label_sources([SourceConfig(kind="text", path="")])


def test_a_changed_file_is_another_slice(tree: Path) -> None:
    source = SourceConfig(kind="jsonl", path=tree / "a.jsonl")
    (before,) = plan_slices([source], TextbookConfig())
    assert plan_slices([source], TextbookConfig()) == [before]
    (tree / "a.jsonl").write_text('{"text": "longer than before"}\n')
    (after,) = plan_slices([source], TextbookConfig())
    assert after.identity != before.identity


def test_fingerprints_follow_names_and_contents(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [SourceConfig(kind="jsonl", path=tree), SourceConfig(kind="pydoc")]
    for limit in (64 << 20, 0):  # whole, and at a glance
        monkeypatch.setattr("raylign.data.sources.fingerprints.WHOLE_BYTES", limit)
        before = identify_sources(sources)
        assert list(before) == [str(tree)] and identify_sources(sources) == before
        (tree / "a.jsonl").write_text('{"text": "A.jsonl"}\n')
        changed = identify_sources(sources)
        (tree / "a.jsonl").rename(tree / f"z{limit}.jsonl")
        renamed = identify_sources(sources)
        assert len({*before.values(), *changed.values(), *renamed.values()}) == 3
        (tree / f"z{limit}.jsonl").rename(tree / "a.jsonl")
        (tree / "a.jsonl").write_text('{"text": "a.jsonl"}\n')


def test_the_query_of_a_url_stays_at_its_end() -> None:
    url = "s3://bucket/dir/?region=eu-west-1&scheme=http"
    assert _join(url, "a b/c.gz") == "s3://bucket/dir/a%20b/c.gz?region=eu-west-1&scheme=http"
    assert _split_glob(url) == (url, None)
    assert _split_glob("s3://bucket/a-?/*.gz") == ("s3://bucket", "a-?/*.gz")


def test_labels() -> None:
    def label(*paths: str) -> list[str]:
        return label_sources([SourceConfig(kind="jsonl", path=path) for path in paths])

    assert label("s3://bucket/crawl/*.jsonl", "s3://bucket/books.v2?region=eu", "x/y.jsonl.gz") == [
        "crawl",
        "books",
        "y",
    ]
    assert label("a/x.jsonl", "b/x.jsonl") == ["a/x.jsonl", "b/x.jsonl"]
    twice = [
        SourceConfig(kind="huggingface", path="org/set", name=name) for name in ("first", "second")
    ]
    assert label_sources(twice) == ["org/set (first, train)", "org/set (second, train)"]
    with pytest.raises(UserError, match=r"prepare\.sources\.1: .* listed twice"):
        label_sources([twice[0], twice[0]])
