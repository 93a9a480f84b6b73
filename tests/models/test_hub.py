"""A model's name is a directory or a repository of the hub, here the hub's cache on disk."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from raylign.config import UserError
from raylign.models.hub import identify_model, is_hub_name, locate_config, locate_model
from raylign.run import content_hash

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of one repository, and no network."""
    root = tmp_path / "hub" / "models--org--name"
    for commit, width in ((COMMIT, 32), (OTHER, 64)):
        (root / "snapshots" / commit).mkdir(parents=True)
        config = root / "snapshots" / commit / "config.json"
        config.write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (root / "refs" / "v2").write_text(OTHER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root


def test_what_was_fetched_before_needs_no_network(cache: Path) -> None:
    assert locate_model("org/name") == cache / "snapshots" / COMMIT
    assert locate_model("org/name@v2") == cache / "snapshots" / OTHER
    assert locate_model(f"org/name@{OTHER}") == cache / "snapshots" / OTHER
    for name, width in (("org/name", 32), ("org/name@v2", 64)):
        assert json.loads(locate_config(name).read_text())["hidden_size"] == width


def test_a_directory_goes_before_the_hub(cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "org" / "name"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "config.json").write_text("{}")
    assert locate_model("org/name") == mine
    assert locate_config("org/name") == mine / "model" / "config.json"
    assert identify_model(mine) == content_hash(mine)


def test_weights_are_fetched_where_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def note(repository: str, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    assert locate_model("org/name") == locate_model("org/name", weights=False) == tmp_path
    files = ("model-1.safetensors", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin")
    matched = [[f for f in files if any(fnmatch(f, p) for p in patterns)] for patterns in asked]
    assert matched == [list(files[:3]), list(files[1:3])]


def test_a_snapshot_is_known_by_its_commit(cache: Path) -> None:
    first, second = (locate_model(name) for name in ("org/name", "org/name@v2"))
    before = identify_model(first)
    (first / "more.txt").write_text("of the same commit, fetched later")
    assert identify_model(first) == before != identify_model(second)


def test_what_cannot_be_had_is_one_line(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sft.model=org/none: no such directory, and t") as found:
        locate_model("org/none", "sft.model")
    assert "\n" not in str(found.value)
    assert "where there is no network fetch it" in str(found.value)
    with pytest.raises(UserError, match=r"^sft.model=nowhere: no such file or directory, nor"):
        locate_model("nowhere", "sft.model")
    with pytest.raises(UserError, match=r"^model=.*runs/x: no such file or directory"):
        locate_model(tmp_path / "runs" / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no model: config.json is missing"):
        locate_config("empty")


def test_names_of_the_hub_have_two_parts() -> None:
    for name in ("org/name", "meta-llama/Llama-3.1-8B", "a/b@refs/pr/1", "a/b@v1.0"):
        assert is_hub_name(name)
    for name in ("gpt2", "runs/a/b", "/abs/olute", "./here/x", "../up", "a/b@", "a/", "~/x", ""):
        assert not is_hub_name(name)
