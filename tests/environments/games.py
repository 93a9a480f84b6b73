"""Environments of users, one of which has bad days, and a model that gets on in them."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

from raylign.environments.environment import Outcome
from raylign.records import Prompt


class Words:
    """Wants a word with an odd number in the second turn, and says `w8 w9` before. Where the prompt
    is told to, it breaks down in that turn, or hangs."""

    def __init__(self, breaks: str = "", hangs: str = "") -> None:
        self._breaks, self._hangs = breaks, hangs
        self._prompt, self._turns = "", 0

    def reset(self, prompt: Prompt) -> None:
        self._prompt = prompt.text

    def step(self, completion: str) -> Outcome:
        self._turns += 1
        if self._turns == 1:
            return Outcome("w8 w9")
        if self._prompt == self._breaks:
            raise LookupError("the board is gone")
        if self._prompt == self._hangs:
            threading.Event().wait()
        odd = sum(word[-1:] in "13579" for word in completion.split())
        return Outcome(reward=1.0 + odd, done=True)


class Broken(Words):
    """Has none but bad days."""

    def reset(self, prompt: Prompt) -> None:
        raise LookupError("there is no board")


def write_brief_model(model: Path, directory: Path) -> Path:
    """The model, but many tokens end its turn; written to `directory`."""
    shutil.copytree(model, directory, dirs_exist_ok=True)
    file = directory / "config.json"
    settings = json.loads(file.read_text()) | {"eos_token_id": [1, *range(4, 24)]}
    file.write_text(json.dumps(settings))
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory
