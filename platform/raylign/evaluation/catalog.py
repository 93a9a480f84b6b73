"""Finding lm-eval tasks: the given directories first, then the ones that ship with lm-eval."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from raylign.config import UserError

_NAMES = re.compile(rb"""^["']?(?:task|group|tag)["']?:[ ]*["']?([\w./-]+)""", re.MULTILINE)


def load_tasks(
    names: Sequence[str], paths: Sequence[Path], seed: int, offline: bool
) -> dict[str, Any]:
    """lm-eval's dictionary of tasks and groups called `names`.

    Own tasks win over lm-eval's of the same name, whose thousands of files are indexed only when a
    name is not among the own ones. Raises `UserError` for unknown names and unobtainable data.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"evaluate.task_path={path}: no such directory")
    own = TaskManager(include_path=list(paths), include_defaults=False)
    foreign = [name for name in names if name not in own.task_index]
    shipped = own
    if foreign:
        _refuse_unknown(foreign, set(own.task_index))
        shipped = TaskManager()
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        manager = shipped if name in foreign else own
        for kind, found in _load(manager, name, offline).items():
            loaded[kind].update(found)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed)
    return loaded


def _refuse_unknown(names: Sequence[str], known: set[str]) -> None:
    """Raise `UserError` for a name that no task file of lm-eval mentions.

    Reading the files as bytes takes a second, indexing them takes a quarter of a minute.
    """
    unseen = set(names)
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        content = file.read_bytes()
        unseen -= {name for name in unseen if name.encode() in content}
        known |= {name.decode() for name in _NAMES.findall(content)}
        if not unseen:
            return
    for name in names:
        if name in unseen:
            raise UserError(f"evaluate.tasks: unknown task {name!r}{_suggest(name, known)}")


def _load(manager: TaskManager, name: str, offline: bool) -> dict[str, Any]:
    if name not in manager.task_index:
        # Mentioned in some file, but not as the name of a task.
        raise UserError(
            f"evaluate.tasks: unknown task {name!r}{_suggest(name, set(manager.task_index))}"
        )
    try:
        return dict(manager.load([name]))
    # An OSError covers both "offline" and "no such file"; a ValueError is a cache without the data.
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "set evaluate.offline=false to download them" if offline else "check the network"
        raise UserError(
            f"evaluate.tasks: the data of {name!r} cannot be loaded; {remedy} ({reason})"
        ) from None


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; `lm-eval ls tasks` lists lm-eval's, evaluate.task_path adds your own"
