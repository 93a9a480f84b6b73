"""Preference losses: what a policy learns from answers that somebody compared or judged.

Every loss takes one number an answer (the sum of its tokens' log-probs), and gives one loss a row;
the caller sums them and divides by the rows of the whole step, so any split gives the same
gradient. The implicit reward of an answer is beta * log(policy / reference) (Rafailov et al., 2023,
eq. 5), and beta * log(policy) / length where a loss has no reference.

A new loss is a row of `LOSSES`, and a function if it needs one; nothing else knows their names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.algorithms.masked import divide

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Name to (total, count), detached 0-d tensors: adding them over micro-batches is exact."""

# log(1 - exp(x)) has no finite gradient at x = 0, where an answer is certain.
_LARGEST_MEAN_LOGPROB = -1e-6
_LOG_HALF = -0.6931471805599453


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """One answer a row, N rows."""

    logprobs: Tensor
    """float32 [N]: sum of the answer's log-probs under the policy; with gradient."""
    lengths: Tensor
    """[N]: tokens that were summed, at least one."""
    reference: Tensor | None = None
    """float32 [N]: the same sum under the reference policy; a constant."""

    @property
    def log_ratios(self) -> Tensor:
        """log(policy / reference) [N]; raises `ValueError` without a reference."""
        if self.reference is None:
            raise ValueError("this loss needs the reference's log-probs")
        return self.logprobs - self.reference.detach()

    @property
    def mean_logprobs(self) -> Tensor:
        """Log-prob a token [N]."""
        return self.logprobs / self.lengths


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers of a preference loss; each uses those its row of `LOSSES` names."""

    beta: float = 0.1
    """Strength of the pull to the reference; the scale of implicit rewards."""
    label_smoothing: float = 0.0
    """Share of comparisons assumed to be the wrong way round, below 1/2."""
    margin: float = 0.0
    """By how much the chosen answer's reward should be larger."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What a loss says of N rows of pairs."""

    losses: Tensor
    """[N], with gradient."""
    chosen_rewards: Tensor
    """[N], detached."""
    rejected_rewards: Tensor
    """[N], detached."""


PairLoss = Callable[[Answers, Answers, Numbers], Judged]


def dpo(chosen: Answers, rejected: Answers, numbers: Numbers) -> Judged:
    """-log sigma(beta * (chosen log-ratio - rejected log-ratio)) (Rafailov et al., 2023, eq. 7)."""
    gap = numbers.beta * (chosen.log_ratios - rejected.log_ratios)
    return _judge(-logsigmoid(gap), chosen.log_ratios, rejected.log_ratios, numbers)


def conservative_dpo(chosen: Answers, rejected: Answers, numbers: Numbers) -> Judged:
    """DPO's expected loss when a share `label_smoothing` of the pairs is the wrong way round (cDPO;
    Mitchell, 2023, "A note on DPO with noisy preferences", eq. 3)."""
    gap = numbers.beta * (chosen.log_ratios - rejected.log_ratios)
    share = numbers.label_smoothing
    losses = -(1 - share) * logsigmoid(gap) - share * logsigmoid(-gap)
    return _judge(losses, chosen.log_ratios, rejected.log_ratios, numbers)


def robust_dpo(chosen: Answers, rejected: Answers, numbers: Numbers) -> Judged:
    """An unbiased estimate, from labels of which a share `label_smoothing` is wrong, of DPO's loss
    on right ones (Chowdhury et al., 2024, arXiv:2403.00409, eq. 12). It may be negative."""
    gap = numbers.beta * (chosen.log_ratios - rejected.log_ratios)
    share = numbers.label_smoothing
    losses = ((1 - share) * -logsigmoid(gap) - share * -logsigmoid(-gap)) / (1 - 2 * share)
    return _judge(losses, chosen.log_ratios, rejected.log_ratios, numbers)


def ipo(chosen: Answers, rejected: Answers, numbers: Numbers) -> Judged:
    """(gap of log-ratios - 1 / (2 beta)) squared (Azar et al., 2023, eq. 17, tau = beta), of means
    over each answer's tokens, as its authors ran it: else the target would depend on length."""
    ours, theirs = chosen.log_ratios / chosen.lengths, rejected.log_ratios / rejected.lengths
    losses = (ours - theirs - 1 / (2 * numbers.beta)) ** 2
    return _judge(losses, chosen.log_ratios, rejected.log_ratios, numbers)


def orpo(chosen: Answers, rejected: Answers, numbers: Numbers) -> Judged:
    """-beta * log sigma(log odds ratio), with odds of the geometric mean probability of a token
    (Hong et al., 2024, eq. 4 and 7; beta is their lambda).

    The other half of ORPO, the chosen answers' cross-entropy, is `chosen_cross_entropy`.
    """
    ours = chosen.mean_logprobs.clamp(max=_LARGEST_MEAN_LOGPROB)
    theirs = rejected.mean_logprobs.clamp(max=_LARGEST_MEAN_LOGPROB)
    log_odds_ratio = (ours - log1mexp(ours)) - (theirs - log1mexp(theirs))
    losses = -numbers.beta * logsigmoid(log_odds_ratio)
    return _judge(losses, chosen.mean_logprobs, rejected.mean_logprobs, numbers)


def simpo(chosen: Answers, rejected: Answers, numbers: Numbers) -> Judged:
    """-log sigma(beta * (gap of log-probs a token) - margin) (Meng et al., 2024, eq. 6)."""
    gap = numbers.beta * (chosen.mean_logprobs - rejected.mean_logprobs)
    losses = -logsigmoid(gap - numbers.margin)
    return _judge(losses, chosen.mean_logprobs, rejected.mean_logprobs, numbers)


def kto(answers: Answers, desirable: Tensor, kl: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Losses and rewards [N] of labelled answers (Ethayarajh et al., 2024, eq. 7 and 8).

    weight * (1 - sigma(+-(beta * (log-ratio - kl)))), + for desirable answers. desirable: bool [N].
    kl: 0-d, an estimate of KL(policy || reference) by `kto_kl`; a constant, and common to all rows.
    """
    gap = numbers.beta * (answers.log_ratios - kl.detach())
    values = torch.sigmoid(torch.where(desirable, gap, -gap))
    weights = torch.where(desirable, numbers.desirable_weight, numbers.undesirable_weight)
    return weights * (1 - values), numbers.beta * answers.log_ratios.detach()


def kto_kl(log_ratio_sum: Tensor, rows: Tensor | float) -> Tensor:
    """max(0, mean log-ratio of answers to other prompts than their own), the reference point of KTO
    (section 4.1): an estimate of the KL, biased, that needs no sampling."""
    return divide(log_ratio_sum, rows).clamp(min=0).detach()


def chosen_cross_entropy(chosen: Answers) -> Tensor:
    """Sum over rows and tokens of -log-prob (a 0-d tensor), to be divided by the chosen tokens of
    the whole step: ORPO's first half, and the term that keeps DPO's chosen answers likely (RPO;
    Pang et al., 2024, eq. 3, there a mean over each answer first)."""
    return -chosen.logprobs.sum()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler, 2012)."""
    near = x > _LOG_HALF
    # Each branch gets arguments at which it and its gradient are finite.
    small = torch.log(-torch.expm1(torch.where(near, x, _LOG_HALF)))
    large = torch.log1p(-torch.exp(torch.where(near, _LOG_HALF, x)))
    return torch.where(near, small, large)


def compare_rewards(chosen: Tensor, rejected: Tensor) -> Statistics:
    """Means of both rewards [N], their margin, and the share of pairs in which the chosen answer
    has the larger one; a tie counts half."""
    chosen, rejected = chosen.detach().float(), rejected.detach().float()
    count = torch.tensor(float(len(chosen)), device=chosen.device)
    wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {
        "rewards/chosen": (chosen.sum(), count),
        "rewards/rejected": (rejected.sum(), count),
        "rewards/margin": ((chosen - rejected).sum(), count),
        "rewards/accuracy": (wins.sum(), count),
    }


def compare_labelled(rewards: Tensor, desirable: Tensor) -> Statistics:
    """Mean rewards [N] of desirable (bool [N]) and other answers, and the share of answers whose
    reward has the right sign; 0 counts half."""
    rewards = rewards.detach().float()
    signed = torch.where(desirable, rewards, -rewards)
    right = (signed > 0).float() + 0.5 * (signed == 0).float()
    good = desirable.float()
    return {
        "rewards/chosen": ((rewards * good).sum(), good.sum()),
        "rewards/rejected": ((rewards * (1 - good)).sum(), (1 - good).sum()),
        "rewards/accuracy": (right.sum(), good.sum() + (1 - good).sum()),
    }


def _judge(losses: Tensor, chosen: Tensor, rejected: Tensor, numbers: Numbers) -> Judged:
    return Judged(losses, numbers.beta * chosen.detach(), numbers.beta * rejected.detach())


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A way to learn from preferences, as a value."""

    name: str
    doc: str
    """What sets it apart, in one line."""
    paper: str
    """arXiv number, or where it was published."""
    pair_loss: PairLoss | None
    """None for a loss of labelled answers, that is `kto`."""
    needs_reference: bool = True
    needs_lengths: bool = False
    """Whether it averages over an answer's tokens."""
    cross_entropy: float = 0.0
    """Weight of `chosen_cross_entropy` that belongs to it."""
    takes: tuple[str, ...] = ()
    """Numbers that it uses besides beta."""
    numbers: Numbers = field(default_factory=Numbers)
    """What the authors used, as far as they said."""


_ROWS = (
    PreferenceLoss(
        name="dpo",
        doc="logistic loss on the difference of implicit rewards",
        paper="2305.18290",
        pair_loss=dpo,
    ),
    PreferenceLoss(
        name="cdpo",
        doc="dpo that expects a share of wrong labels, and so stops at a finite margin",
        paper="ericmitchell.ai/cdpo.pdf",
        pair_loss=conservative_dpo,
        takes=("label_smoothing",),
        numbers=Numbers(label_smoothing=0.1),
    ),
    PreferenceLoss(
        name="robust",
        doc="dpo corrected for a share of wrong labels, without bias",
        paper="2403.00409",
        pair_loss=robust_dpo,
        takes=("label_smoothing",),
        numbers=Numbers(label_smoothing=0.1),
    ),
    PreferenceLoss(
        name="ipo",
        doc="squared distance to a finite margin; does not overfit certain preferences",
        paper="2310.12036",
        pair_loss=ipo,
        needs_lengths=True,
    ),
    PreferenceLoss(
        name="kto",
        doc="labelled answers in place of pairs; gains and losses seen from a common reference",
        paper="2402.01306",
        pair_loss=None,
        takes=("desirable_weight", "undesirable_weight"),
    ),
    PreferenceLoss(
        name="orpo",
        doc="fine-tuning and an odds ratio in one; no reference, no sft stage before",
        paper="2403.07691",
        pair_loss=orpo,
        needs_reference=False,
        needs_lengths=True,
        cross_entropy=1.0,
    ),
    PreferenceLoss(
        name="simpo",
        doc="log-prob a token as reward, and a margin; no reference",
        paper="2405.14734",
        pair_loss=simpo,
        needs_reference=False,
        needs_lengths=True,
        takes=("margin",),
        numbers=Numbers(beta=2.0, margin=1.0),
    ),
)

LOSSES: dict[str, PreferenceLoss] = {row.name: row for row in _ROWS}


def find_loss(name: str) -> PreferenceLoss:
    """The row called `name`; raises `ValueError` with a suggestion when there is none."""
    if name in LOSSES:
        return LOSSES[name]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), LOSSES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown preference loss {name!r}; {hint}known: {', '.join(LOSSES)}")
