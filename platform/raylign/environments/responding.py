"""An environment as the answering side of an episode of tokens."""

from __future__ import annotations

from collections.abc import Callable

from raylign.environments.environment import Environment
from raylign.environments.rendering import TurnRenderer
from raylign.inference.episode import Reply
from raylign.inference.generator import Sample
from raylign.records import Prompt


class EnvironmentResponder:
    """Takes one environment through one episode of at most `max_turns` turns."""

    def __init__(
        self,
        make: Callable[[], Environment],
        prompt: Prompt,
        renderer: TurnRenderer,
        max_turns: int,
    ) -> None:
        self._make, self._prompt = make, prompt
        self._renderer, self._left = renderer, max_turns
        self._environment: Environment | None = None

    def reply(self, turn: Sample) -> Reply:
        """The observation as tokens; none when the episode is over, by the environment, by the
        number of turns, or because this one was cut off. An environment that raises ends it as a
        failure."""
        self._left -= 1
        try:
            if self._environment is None:
                self._environment = self._make()
                self._environment.reset(self._prompt)
            outcome = self._environment.step(turn.text)
            observation = str(outcome.observation)
            reward = None if outcome.reward is None else float(outcome.reward)
            done = bool(outcome.done)
        except Exception as error:  # the user's code: anything may happen there, and it is counted
            said = str(error).splitlines()[0][:200] if str(error) else ""
            return Reply(None, failure=f"environment raised {type(error).__name__}", detail=said)
        if done:
            return Reply(None, reward)
        if turn.finish_reason != "stop" or not self._left:
            return Reply(None, reward, cut=True)
        return Reply(self._renderer.render(observation, turn.token_ids[-1]), reward)
