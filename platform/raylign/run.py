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


@dataclass(frozen=True, slots=True)
class Keeping:
    """What an unfinished stage holds that is not removed unasked."""

    settings: Mapping[str, Any]
    """Those that a later attempt must share to go on after it; it may change the others."""
    patterns: tuple[str, ...]
    """Of what would be lost, below the stage's directory."""
    noun: str
    """What that is, in words."""
    remedy: str
    """Overrides that begin again."""


class Draft:
    """A stage in the making: write files below `path`, numbers into `summary`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}
        """sha256 of files that were hashed where they were written; the others are read again."""


class Run:
    """A directory of stages."""

    def __init__(self, root: Path | str, redo: str | None = None) -> None:
        """redo: the stage whose unfinished attempt gives way to one with other settings."""
        self.root, self._redo = Path(root).absolute(), redo

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
        keeping: Keeping | None = None,
    ) -> Iterator[Draft]:
        """Build a stage; it appears whole when the block ends, and not at all when it raises.

        Files and directories with a name that begins with a dot are not part of it, and go.
        With `resume`, what an earlier attempt with the same settings and parents left behind is
        still there, and stays when this one fails: the block continues after it. `keeping` says
        which settings count, and what of an attempt with others must not be lost.

        Raises `UserError` when something that is not a stage has its name, another process is
        building it, an attempt with other settings left what `keeping` names, or the run directory
        cannot be written.
        """
        if (self.root / name).exists() and self.find(name) is None:
            raise UserError(
                f"{self.root / name} exists and is not a finished stage; "
                "move it away, or choose another run=..."
            )
        draft = Draft(self._draft(name))
        started = time.monotonic()
        with _claim(draft.path):
            counted = settings if keeping is None else keeping.settings
            intent = None
            if resume or keeping is not None:
                intent = {"settings": to_json(counted), "parents": dict(parents)}
            begun = _read_intent(draft.path)
            if not resume or intent is None or not _same(begun, intent):
                if resume and keeping is not None and self._redo != name:
                    self._refuse_to_lose(name, begun, intent or {}, keeping)
                _empty(draft.path)
                if intent is not None:
                    write_json(draft.path / INTENT, intent)
            try:
                yield draft
                self._commit(name, draft, settings, parents, time.monotonic() - started)
            finally:
                if not resume:
                    shutil.rmtree(draft.path, ignore_errors=True)

    def _draft(self, name: str) -> Path:
        return self.root / f".{name}.partial"

    def _refuse_to_lose(
        self, name: str, begun: Mapping[str, Any], intent: Mapping[str, Any], keeping: Keeping
    ) -> None:
        """Raise `UserError` when a draft that was begun otherwise holds what is to be kept."""
        path = self._draft(name)
        held = sum(len(list(path.glob(pattern))) for pattern in keeping.patterns)
        if held:
            difference = describe_difference(begun, intent) if begun else "unknown settings"
            raise UserError(
                f"stage {name!r} in {self.root} was begun with {difference}, and is unfinished "
                f"({keeping.noun}: {held}); give that to go on, choose another run=..., or discard "
                f"them and begin again with {keeping.remedy}"
            )

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
            settings=to_json(settings),
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
        self.tidy(name)

    def tidy(self, name: str) -> None:
        """Remove what is no part of a finished stage; a process that was killed may not have."""
        for file in (self.root / name).glob(".*"):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)

    def abandon(self, name: str) -> None:
        """Remove an unfinished stage. Raises `UserError` while another process is building it."""
        path = self._draft(name)
        if path.is_dir():
            with _claim(path):
                shutil.rmtree(path)

    def begun_from(self, name: str) -> dict[str, str]:
        """The parents of an unfinished stage, by role; empty when there is none."""
        return dict(_read_intent(self._draft(name)).get("parents", {}))

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


def list_contents(stage: Stage) -> set[str]:
    """All content hashes by which others may name a stage: its own, and those of the files and
    directories in it."""
    files = {name: entry["sha256"] for name, entry in stage.manifest.files.items()}
    inside: dict[Path, dict[str, str]] = {}
    for name, content in files.items():
        for directory in Path(name).parents[:-1]:
            inside.setdefault(directory, {})[str(Path(name).relative_to(directory))] = content
    return {stage.manifest.content, *files.values(), *map(hash_json, inside.values())}


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first setting, else the parents, in which two stages differ: what the old one had, and
    what the new one has. Both hold `settings` and `parents`."""
    was, now = (_flatten(side.get("settings", {})) for side in (old, new))
    for key in sorted(was.keys() | now.keys()):
        if str(was.get(key)) != str(now.get(key)):
            return f"{key}={was.get(key)}, not {now.get(key)}"
    known = old.get("parents", {})
    changed = [role for role, content in new["parents"].items() if known.get(role) != content]
    return f"another {', '.join(changed) or 'input'}"


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}{name}.")
    return flat


def fingerprint(settings: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """Hash of what determines a stage's work."""
    return hash_json({"settings": settings, "parents": sorted(parents.values())})


def hash_json(value: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(value: Any) -> Any:
    """`value` as it is when it has been written to a file and read again."""
    return json.loads(json.dumps(value, default=str))


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
def _claim(directory: Path) -> Iterator[None]:
    """Make a directory and lock it; the lock dies with its holder, however that ends."""
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
        yield
    finally:
        os.close(descriptor)


def _read_intent(directory: Path) -> dict[str, Any]:
    """What a draft was begun with; empty when that is not known."""
    try:
        intent = json.loads((directory / INTENT).read_text(encoding="utf-8"))
        fingerprint(intent["settings"], intent["parents"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    found: dict[str, Any] = intent
    return found


def _same(begun: Mapping[str, Any], intent: Mapping[str, Any]) -> bool:
    return bool(begun) and fingerprint(**begun) == fingerprint(**intent)


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
