"""Checkpoints on disk: whole or absent, verified before they are read, the last good one never
removed.

A checkpoint is a directory `step-NNNNNNNN` that was written under a hidden name and renamed into
place: `state/` (see `fragments`), `hf/` that other tools load, and a manifest, written last, with
size and sha256 of every file. The file `latest` names the newest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raylign.config import UserError
from raylign.run import hash_file, hash_json, write_json

MANIFEST = "manifest.json"
STATE = "state"
EXPORT = "hf"
LATEST = "latest"
_FORMAT = 1
_READERS = 4  # files read at the same time

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a manifest says."""

    step: int
    identity: dict[str, Any]
    """What it belongs to: model, tokenizer, task, seed, batch size."""
    progress: dict[str, Any]
    """Numbers that the run goes on counting."""
    ranks: int
    """That wrote it."""
    files: dict[str, dict[str, Any]]
    """Relative name to `size` and `sha256`."""
    format: int = _FORMAT


class DamageError(ValueError):
    """A checkpoint is not what was written; says how."""


def name_step(step: int) -> str:
    """The directory of a checkpoint, below the root."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Directories, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def commit(draft: Path, root: Path, checkpoint: Checkpoint) -> Path:
    """Make a checkpoint of the directory `draft`, whose files are on disk and are those that
    `checkpoint` names. Raises `OSError`."""
    body = asdict(checkpoint)
    write_json(draft / MANIFEST, body | {"digest": hash_json(body)})
    for directory in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
        sync(directory)
    final = root / name_step(checkpoint.step)
    if final.exists():
        _remove(final)
    os.rename(draft, final)
    sync(root)
    pointer = root / f".{LATEST}"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    sync(pointer)
    os.replace(pointer, root / LATEST)
    sync(root)
    return final


def read_manifest(path: Path) -> Checkpoint:
    """Raises `DamageError` when it is missing or not what was written."""
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        found = Checkpoint(**body)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if digest != hash_json(body):
        raise DamageError(f"{MANIFEST} was changed")
    return found


def verify(path: Path) -> Checkpoint:
    """Read every byte; raises `DamageError` unless all are those that were written."""
    checkpoint = read_manifest(path)
    for name, expected in checkpoint.files.items():
        file = path / name
        if not file.is_file():
            raise DamageError(f"{name} is missing")
        if file.stat().st_size != expected["size"]:
            raise DamageError(f"{name} has {file.stat().st_size:,} of {expected['size']:,} bytes")
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(lambda name: _read_back(path / name), checkpoint.files)
        for (name, expected), found in zip(checkpoint.files.items(), sums, strict=True):
            if found != expected["sha256"]:
                raise DamageError(f"{name} has another sha256")
    return checkpoint


def find_newest(root: Path) -> tuple[tuple[Path, Checkpoint] | None, list[Event]]:
    """The newest checkpoint that is what was written, and what was wrong with newer ones, which
    are put aside as `corrupt-...`."""
    events: list[Event] = []
    for path in reversed(list_checkpoints(root)):
        try:
            return (path, verify(path)), events
        except DamageError as error:
            events.append(put_aside(path, str(error)))
    return None, events


def put_aside(path: Path, reason: str) -> Event:
    """Rename a damaged checkpoint so that nobody reads it; the event to record."""
    aside, number = path.with_name(f"corrupt-{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"corrupt-{path.name}-{number}")
    os.rename(path, aside)
    return {
        "what": "checkpoint_corrupt",
        "checkpoint": path.name,
        "reason": reason,
        "now": aside.name,
    }


def prune(root: Path, keep: int) -> list[Event]:
    """Remove all but the newest `keep`, once the newest has been read back and is sound."""
    events: list[Event] = []
    while len(found := list_checkpoints(root)) > keep:
        try:
            verify(found[-1])
        except DamageError as error:
            events.append(put_aside(found[-1], str(error)))
            continue
        for path in found[:-keep]:
            _remove(path)
    return events


def clear_drafts(root: Path, current: Path | None = None) -> None:
    """Remove what saves that did not end have left, but not the `current` one."""
    for path in root.glob(".step-*"):
        if path != current:
            shutil.rmtree(path, ignore_errors=True)


def require_same(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], name: str
) -> None:
    """Raises `UserError` when a checkpoint belongs to something else than the stage `name`."""
    for what, value in wanted.items():
        if found.get(what) != value:
            was, now = (_shorten(v) for v in (found.get(what), value))
            raise UserError(
                f"{path} is a checkpoint of another {what.replace('_', ' ')} ({was}, not {now}); "
                f"give the run it belongs to, remove it, or set {name}.checkpoints.resume=never"
            )


def retain(root: Path, destination: Path, what: Literal["none", "models", "all"]) -> None:
    """Put what stays of the checkpoints below `destination`: links, so that nothing is written
    twice and `root` stays whole until the stage is finished."""
    shutil.rmtree(destination, ignore_errors=True)
    if what == "none":
        return
    for path in list_checkpoints(root):
        source = path / EXPORT if what == "models" else path
        target = destination / source.relative_to(root)
        shutil.copytree(source, target, copy_function=_link)


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """A directory leaves its name before its files go."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _read_back(file: Path) -> str:
    """sha256 of what is on the disk and not in memory, where the system allows it."""
    try:
        _forget_cached(file)
        return hash_file(file)
    except OSError as error:
        raise DamageError(f"{file.name} cannot be read ({error.strerror})") from None


def _forget_cached(file: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _shorten(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
