"""Policy losses against loops written from the papers, and the invariances they promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from raylign.algorithms.importance import Importance
from raylign.algorithms.policy import (
    Coefficients,
    PolicyInputs,
    cispo_loss,
    gspo_loss,
    gspo_token_loss,
    ppo_clip_loss,
    sequence_clip_loss,
)
from raylign.algorithms.weighting import token_weights

MAX_TOKENS = 12
NUMBERS = Coefficients(
    clip_low=0.2,
    clip_high=0.3,
    kl_coef=0.1,
    entropy_coef=0.05,
    importance=Importance(cap=1.2),
)
WHOLE, MEAN = Importance(level="sequence", cap=1.2), Importance(level="geometric", cap=1.2)
CASES = {
    "ppo_clip": (ppo_clip_loss, NUMBERS),
    "dual_clip": (ppo_clip_loss, replace(NUMBERS, dual_clip=1.5)),
    "gspo": (gspo_loss, replace(NUMBERS, importance=MEAN)),
    "gspo_token": (gspo_token_loss, replace(NUMBERS, dual_clip=1.4, importance=MEAN)),
    "sequence": (sequence_clip_loss, replace(NUMBERS, importance=WHOLE)),
    "cispo": (cispo_loss, NUMBERS),
    "k1": (ppo_clip_loss, replace(NUMBERS, kl_estimator="k1", importance=Importance("none"))),
    "k2": (
        ppo_clip_loss,
        replace(NUMBERS, kl_estimator="k2", importance=Importance("mask", "token", 1.2, 0.8)),
    ),
    "reward": (ppo_clip_loss, replace(NUMBERS, kl_in="reward")),
}
TENSORS = [f.name for f in fields(PolicyInputs) if f.name != "pairs"]


@dataclass(frozen=True)
class World:
    """A bigram policy and a ragged batch that it partly trains on."""

    theta: Tensor  # [V, V] logits of the next token, float64, with gradient
    tokens: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]
    old: Tensor
    behaviour: Tensor
    reference: Tensor
    advantages: Tensor  # [B]

    def score(self) -> tuple[Tensor, Tensor]:
        """Log-probability of each token and entropy of its distribution [B, T]; column 0 is 0."""
        logs = self.theta.log_softmax(-1)[self.tokens[:, :-1]]
        chosen = logs.gather(-1, self.tokens[:, 1:, None])[..., 0]
        entropy = -(logs.exp() * logs).sum(-1)
        first = torch.zeros_like(chosen[:, :1])
        return torch.cat([first, chosen], 1), torch.cat([first, entropy], 1)

    def inputs(self, weighting: str, with_reference: bool = True) -> PolicyInputs:
        logprobs, entropy = self.score()
        return PolicyInputs(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=self.old,
            behaviour_logprobs=self.behaviour,
            advantages=self.advantages[:, None].expand_as(self.mask),
            weights=token_weights(self.mask, weighting, max_tokens=MAX_TOKENS).double(),  # type: ignore[arg-type]
            reference_logprobs=self.reference if with_reference else None,
        )


def make_world(seed: int = 0, rows: int = 7, width: int = 11, vocabulary: int = 5) -> World:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = normal(vocabulary, vocabulary).requires_grad_()
    tokens = torch.randint(0, vocabulary, (rows, width), generator=generator)
    starts = torch.randint(1, 4, (rows, 1), generator=generator)
    ends = torch.randint(4, width + 1, (rows, 1), generator=generator)
    place = torch.arange(width)
    mask = (place >= starts) & (place < ends) & (torch.rand(rows, width, generator=generator) < 0.9)
    world = World(theta, tokens, mask, theta, theta, theta, normal(rows))
    logprobs = world.score()[0].detach()
    noise = 0.4 * normal(3, rows, width)
    return replace(
        world, old=logprobs + noise[0], behaviour=logprobs + noise[1], reference=logprobs + noise[2]
    )


def take(inputs: PolicyInputs, rows: list[int], width: int | None = None) -> PolicyInputs:
    return PolicyInputs(**{name: getattr(inputs, name)[rows][:, :width] for name in TENSORS})


def gradient(loss: Tensor, world: World) -> Tensor:
    return torch.autograd.grad(loss, world.theta, retain_graph=True)[0]


# ---- loops from the papers ----------------------------------------------------------------------


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(torch.maximum(x, torch.tensor(low).double()), torch.tensor(high).double())


def _loop_value(name: str, ratio: Tensor, advantage: Tensor, logprob: Tensor) -> Tensor:
    """What one token contributes to the objective, before the importance weight."""
    c = CASES[name][1]
    if name == "cispo":
        return _clip(ratio.detach(), 1 - c.clip_low, 1 + c.clip_high) * advantage * logprob
    if advantage >= 0:
        value = torch.minimum(ratio * advantage, (1 + c.clip_high) * advantage)
    else:
        value = torch.minimum(ratio * advantage, (1 - c.clip_low) * advantage)
    if c.dual_clip is not None and advantage < 0:
        value = torch.maximum(value, c.dual_clip * advantage)
    return value


def _loop_ratio(name: str, logs: list[Tensor], t: int) -> Tensor:
    """The ratio of the t-th trained token, from all log-ratios of its sequence."""
    every = torch.stack(logs)
    if name == "gspo":
        return every.mean().exp()
    if name in ("gspo_token", "sequence"):
        combined = every.mean() if name == "gspo_token" else every.sum()
        return combined.exp().detach() * (1 + logs[t] - logs[t].detach())
    return logs[t].exp()


def _loop_importance(importance: Importance, shifts: list[float], t: int) -> float:
    if importance.mode == "none":
        return 1.0
    levels = {"token": shifts[t], "sequence": sum(shifts), "geometric": sum(shifts) / len(shifts)}
    ratio = math.exp(levels[importance.level])
    if importance.mode == "truncate":
        return min(ratio, importance.cap)
    return ratio if importance.floor <= ratio <= importance.cap else 0.0


def _loop_kl(c: Coefficients, logprob: Tensor, reference: Tensor) -> Tensor | float:
    if c.kl_in == "reward":
        return 0.0
    r = (reference - logprob).exp()
    return {"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": r - r.log() - 1}[c.kl_estimator]


def loop_loss(world: World, name: str, weighting: str) -> Tensor:
    """Sequence by sequence, token by token."""
    logprobs, entropy = world.score()
    c, sequences, tokens = CASES[name][1], [], 0
    for row in range(len(world.tokens)):
        trained = [t for t in range(world.tokens.shape[1]) if world.mask[row, t]]
        if not trained:
            continue
        logs = [logprobs[row, t] - world.old[row, t] for t in trained]
        shifts = [float(world.old[row, t] - world.behaviour[row, t]) for t in trained]
        values = []
        for place, t in enumerate(trained):
            ratio = _loop_ratio(name, logs, place)
            gain = _loop_value(name, ratio, world.advantages[row], logprobs[row, t])
            gain = gain * _loop_importance(c.importance, shifts, place)
            kl = _loop_kl(c, logprobs[row, t], world.reference[row, t])
            values.append(gain - c.kl_coef * kl + c.entropy_coef * entropy[row, t])
        tokens += len(trained)
        length = {"tokens": 1, "sequences": len(trained), "constant": MAX_TOKENS}[weighting]
        sequences.append(torch.stack(values).sum() / length)
    objective = torch.stack(sequences).sum() / (tokens if weighting == "tokens" else len(sequences))
    return -objective


@pytest.mark.parametrize("weighting", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_as_the_loop_says(name: str, weighting: str) -> None:
    loss_of, numbers = CASES[name]
    for seed in range(3):
        world = make_world(seed)
        loss, _ = loss_of(world.inputs(weighting), numbers)
        expected = loop_loss(world, name, weighting)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            gradient(loss, world), gradient(expected, world), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "gspo", "k1", "k2"])
def test_gradient_by_finite_differences(name: str) -> None:
    world, step = make_world(5), 1e-6
    loss_of, numbers = CASES[name]
    actual = gradient(loss_of(world.inputs("sequences"), numbers)[0], world)
    for place in [(0, 1), (2, 2), (4, 0)]:
        shift = torch.zeros_like(world.theta).detach()
        shift[place] = step
        up, down = (
            loss_of(replace(world, theta=world.theta + s).inputs("sequences"), numbers)[0]
            for s in (shift, -shift)
        )
        assert actual[place].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-7)


def test_gspo_by_token_is_gspo_when_a_sequence_has_one_advantage() -> None:
    world, numbers = make_world(9), Coefficients(clip_low=0.05, clip_high=0.06, importance=MEAN)
    inputs = world.inputs("sequences", with_reference=False)
    (whole, _), (token, _) = gspo_loss(inputs, numbers), gspo_token_loss(inputs, numbers)
    torch.testing.assert_close(token, whole)
    torch.testing.assert_close(gradient(token, world), gradient(whole, world))


def test_a_sequence_as_one_action_has_the_gradient_of_its_clipped_product() -> None:
    world, numbers = make_world(9), Coefficients(importance=Importance("none"))
    inputs = world.inputs("constant", with_reference=False)
    loss, metrics = sequence_clip_loss(inputs, numbers)
    logs = torch.where(world.mask, world.score()[0] - world.old, 0.0).sum(1)
    clipped = torch.minimum(
        logs.exp() * world.advantages, logs.exp().clamp(0.8, 1.2) * world.advantages
    )
    plain = -clipped[world.mask.any(1)].mean() / MAX_TOKENS
    torch.testing.assert_close(gradient(loss, world), gradient(plain, world))
    assert 0 < metrics["clip_fraction"][0] < metrics["clip_fraction"][1]
