"""Models by name: a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from raylign.config import UserError
from raylign.run import content_hash, hash_json

# org/name, and after an @ a branch, tag or commit.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Weights in the one format that runs no code when read, and what belongs to them.
_WEIGHTS = "*.safetensors"
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_ELSEWHERE = ("*/*",)


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form org/name or org/name@revision."""
    return _NAME.fullmatch(name) is not None


def locate_model(name: str | Path, key: str = "model", *, weights: bool = True) -> Path:
    """The directory of a model: `name` itself if there is one, else a snapshot from the hub.

    weights: whether those are needed, or no more than tokenizer and configuration. A snapshot that
    was fetched before is used where the hub cannot be reached. Raises `UserError`, which names
    `key`, when there is neither.
    """

    def fetch(repository: str, revision: str | None) -> str:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*_FILES, *[_WEIGHTS] * weights],
                ignore_patterns=list(_ELSEWHERE),
            )
        )

    return _locate(name, key, fetch)


def identify_model(directory: Path) -> str:
    """Content hash of a model's directory; a snapshot of the hub is known by its commit."""
    cache = directory.parents[1:2]
    if directory.parent.name == "snapshots" and cache and cache[0].name.startswith("models--"):
        return hash_json([cache[0].name, directory.name])
    return content_hash(directory)


def locate_config(name: str | Path, key: str = "model") -> Path:
    """The `config.json` of a model, of which no more than that is fetched from the hub.

    A finished stage keeps its model in `model/`. Raises `UserError` as `locate_model` does.
    """

    def fetch(repository: str, revision: str | None) -> str:
        from huggingface_hub import hf_hub_download

        return str(Path(hf_hub_download(repository, "config.json", revision=revision)).parent)

    directory = _locate(name, key, fetch)
    for file in (directory / "config.json", directory / "model" / "config.json"):
        if file.is_file():
            return file
    raise UserError(f"{key}={name}: holds no model: config.json is missing")


def _locate(name: str | Path, key: str, fetch: Callable[[str, str | None], str]) -> Path:
    path = Path(name)
    if path.exists():
        return path.absolute()
    if not isinstance(name, str) or not is_hub_name(name):
        raise UserError(f"{key}={name}: no such file or directory, nor a hub name like org/name")
    repository, _, revision = name.partition("@")
    try:
        return Path(fetch(repository, revision or None))
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"{key}={name}: no such directory, and the Hugging Face hub did not give it "
            f"({reason}); correct the name, log in if it is gated, or where there is no network "
            "fetch it elsewhere and give its directory"
        ) from None
