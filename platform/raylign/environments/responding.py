"""An environment as the answering side of an episode of tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from raylign.config import EnvironmentConfig
from raylign.environments.environment import Environment, Outcome
from raylign.environments.rendering import TurnRenderer
from raylign.environments.source import load_environment
from raylign.inference.episode import Reply
from raylign.inference.generator import Sample
from raylign.records import Prompt


def plan_answers(
    config: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase, place: str
) -> Callable[[Prompt], EnvironmentResponder]:
    """Makes the answering side of each episode. `place`: the section of the recipe that `config`
    is. Raises `UserError` for an environment that cannot be made, or rendered."""
    assert config.source is not None  # whoever asks has seen to it
    make = load_environment(config.source, config.options, place)
    renderer = TurnRenderer(tokenizer, place)

    def respond(prompt: Prompt) -> EnvironmentResponder:
        return EnvironmentResponder(make, prompt, renderer, config.max_turns, config.deadline_s)

    return respond


class EnvironmentResponder:
    """Takes one environment through one episode of at most `max_turns` turns, each answered within
    `deadline_s`."""

    def __init__(
        self,
        make: Callable[[], Environment],
        prompt: Prompt,
        renderer: TurnRenderer,
        max_turns: int,
        deadline_s: float,
    ) -> None:
        self._make, self._prompt = make, prompt
        self._renderer, self._left, self._deadline_s = renderer, max_turns, deadline_s
        self._environment: Environment | None = None

    def reply(self, turn: Sample) -> Reply:
        """The observation as tokens; none when the episode is over, by the environment, by the
        number of turns, or because this one was cut off. An environment that raises, or is not
        heard of in time, ends it as a failure."""
        self._left -= 1
        heard: list[Outcome | Reply] = []
        # A thread of its own, for a call that hangs cannot be ended, only left behind.
        thread = threading.Thread(target=lambda: heard.append(self._hear(turn.text)), daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if not heard:
            return Reply(None, failure=f"environment gave no answer in {self._deadline_s:g} s")
        outcome = heard[0]
        if isinstance(outcome, Reply):
            return outcome
        if outcome.done:
            return Reply(None, outcome.reward)
        if turn.finish_reason != "stop" or not self._left:
            return Reply(None, outcome.reward, cut=True)
        tokens = self._renderer.render(outcome.observation, turn.token_ids[-1])
        return Reply(tokens, outcome.reward)

    def _hear(self, text: str) -> Outcome | Reply:
        """What the environment says, or the failure that it ends in."""
        try:
            if self._environment is None:
                self._environment = self._make()
                self._environment.reset(self._prompt)
            outcome = self._environment.step(text)
            reward = None if outcome.reward is None else float(outcome.reward)
            return Outcome(str(outcome.observation), reward, bool(outcome.done))
        except Exception as error:  # the user's code: anything may happen there, and it is counted
            said = str(error).splitlines()[0][:200] if str(error) else ""
            return Reply(None, failure=f"environment raised {type(error).__name__}", detail=said)
