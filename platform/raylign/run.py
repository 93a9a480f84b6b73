"""The run directory: stages that are whole or absent, and the lineage between them.

A stage is a directory with a `manifest.json` that was written last. It is built under a hidden
name and renamed into place, so a directory under its own name is complete by construction. The
manifest names every file with size and sha256, the settings it was made with, and its parents by
content hash, which gives lineage from policy back to corpus.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylign.config import UserError

MANIFEST = "manifest.json"
# What a resumable stage in the making was begun with.
INTENT = ".intent"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished stage says of itself."""

    stage: str
    fingerprint: str
    """Hash of settings, seed and parents: equal fingerprints mean the same work."""
    content: str
    """Hash of the files' hashes."""
    settings: dict[str, Any]
    parents: dict[str, str]
    """Stage name or path to content hash."""
    files: dict[str, dict[str, Any]]
    """Relative name to `size` and `sha256`."""
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)
    """Numbers worth showing."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: a directory and its manifest."""

    path: Path
    manifest: Manifest


class Draft:
    """A stage in the making: write files below `path`, numbers into `summary`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}
        """sha256 of files that were hashed where they were written; the others are read again."""


class Run:
    """A directory of stages."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def find(self, name: str) -> Stage | None:
        """The finished stage `name`, or None."""
        return read_stage(self.root / name)

    def require(self, name: str, job: str) -> Stage:
        """The finished stage `name`; raises `UserError` naming the `job` that makes it."""
        stage = self.find(name)
        if stage is None:
            raise UserError(
                f"run {self.root} has no finished {name!r} stage; "
                f"run `python -m jobs.{job}` on this recipe first, or give a path"
            )
        return stage

    @contextmanager
    def write(
        self,
        name: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, str],
        resume: bool = False,
    ) -> Iterator[Draft]:
        """Build a stage; it appears whole when the block ends, and not at all when it raises.

        Files and directories with a name that begins with a dot are not part of it, and go.
        With `resume`, what an earlier attempt with the same settings and parents left behind is
        still there, and stays when this one fails: the block continues after it.

        Raises `UserError` when something that is not a stage has its name, another process is
        building it, or the run directory cannot be written.
        """
        if (self.root / name).exists() and self.find(name) is None:
            raise UserError(
                f"{self.root / name} exists and is not a finished stage; "
                "move it away, or choose another run=..."
            )
        draft = Draft(self.root / f".{name}.partial")
        started = time.monotonic()
        with _claim(draft.path, fingerprint(settings, parents) if resume else None):
            try:
                yield draft
                self._commit(name, draft, settings, parents, time.monotonic() - started)
            finally:
                if not resume:
                    shutil.rmtree(draft.path, ignore_errors=True)

    def _commit(
        self,
        name: str,
        draft: Draft,
        settings: Mapping[str, Any],
        parents: Mapping[str, str],
        seconds: float,
    ) -> None:
        files = {
            str(file.relative_to(draft.path)): {
                "size": file.stat().st_size,
                "sha256": draft.hashes.get(str(file.relative_to(draft.path))) or hash_file(file),
            }
            for file in sorted(draft.path.rglob("*"))
            if file.is_file() and not _is_hidden(file, draft.path)
        }
        manifest = Manifest(
            stage=name,
            fingerprint=fingerprint(settings, parents),
            content=hash_json({k: v["sha256"] for k, v in files.items()}),
            settings=json.loads(json.dumps(settings, default=str)),
            parents=dict(parents),
            files=files,
            seconds=round(seconds, 3),
            summary=draft.summary,
        )
        body = {slot: getattr(manifest, slot) for slot in Manifest.__slots__}
        write_json(draft.path / MANIFEST, body)
        for file in (*draft.path.rglob("*"), draft.path):
            if not _is_hidden(file, draft.path):
                _sync(file)
        self.discard(name)
        os.rename(draft.path, self.root / name)
        _sync(self.root)
        # Only now: were it killed before, a rerun would still find what had been done.
        for file in (self.root / name).glob(".*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def discard(self, name: str) -> None:
        """Remove a stage, finished or damaged; it leaves its name before its files go."""
        doomed = self.root / f".{name}.discarded"
        shutil.rmtree(doomed, ignore_errors=True)
        if (self.root / name / MANIFEST).exists():
            os.rename(self.root / name, doomed)
            shutil.rmtree(doomed)


def read_stage(path: Path | str) -> Stage | None:
    """The stage at `path`, or None when it has no manifest. Raises `UserError` if it is damaged."""
    path = Path(path)
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return Stage(path, Manifest(**body))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST} is damaged ({error}); delete {path} and rerun"
        ) from None


def verify(stage: Stage) -> list[str]:
    """Names of files that are missing or differ from the manifest; empty when all is well."""
    return [
        name
        for name, expected in stage.manifest.files.items()
        if not (stage.path / name).is_file() or hash_file(stage.path / name) != expected["sha256"]
    ]


def content_hash(path: Path | str) -> str:
    """Content hash of a stage, or of any file or directory that is not one."""
    path = Path(path)
    stage = read_stage(path) if path.is_dir() else None
    if stage is not None:
        return stage.manifest.content
    if path.is_file():
        return hash_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_json({str(file.relative_to(path)): hash_file(file) for file in files})


def fingerprint(settings: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """Hash of what determines a stage's work."""
    return hash_json({"settings": settings, "parents": sorted(parents.values())})


def hash_json(value: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, default=str), encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)


@contextmanager
def _claim(directory: Path, intent: str | None) -> Iterator[None]:
    """Make a directory and lock it; the lock dies with its holder, however that ends.

    What it holds is removed, unless it was begun with the same `intent`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be made ({error.strerror}); choose another run=..."
        ) from None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is building {directory}; wait for it, or choose another run=..."
            ) from None
        mark = directory / INTENT
        if intent is None or not mark.is_file() or mark.read_text(encoding="utf-8") != intent:
            _empty(directory)
            if intent is not None:
                mark.write_text(intent, encoding="utf-8")
        yield
    finally:
        os.close(descriptor)


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _empty(directory: Path) -> None:
    for leftover in directory.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
