"""Objectives of judged answers: layouts, splits, scores, references, and that they learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from raylign.algorithms.preference import LOSSES, Answers, Numbers, kto, kto_kl
from raylign.config import EngineConfig, UserError
from raylign.data.comparisons import Answer, Compared
from raylign.models.heads import (
    build_scorer,
    is_scorer,
    load_scorer,
    require_language_model,
    score_states,
)
from raylign.models.loading import load_model, load_tokenizer, save_model
from raylign.training.compared_rows import (
    ComparedFile,
    add_strangers,
    assemble_compared,
    pick_answer,
    write_compared,
)
from raylign.training.comparisons import PreferenceObjective, RewardObjective, sum_logprobs
from raylign.training.objectives import embed_batch
from raylign.training.references import Reference

ENGINE = EngineConfig(backend="torch")


def make(prompt: Sequence[int], *answers: Sequence[int], value: float = 0.0) -> Compared:
    each = (Answer(np.array(a, np.int32), np.ones(len(a), np.uint8)) for a in answers)
    return Compared(np.array(prompt, np.int32), tuple(each), value)


def draw_pairs(count: int, seed: int = 0) -> list[Compared]:
    """Prompts of 2 to 12 tokens with two answers of 2 to 6, the last of them <eos>."""
    stream = np.random.default_rng(seed)

    def words(low: int, high: int) -> list[int]:
        return stream.integers(4, 56, stream.integers(low, high)).tolist()

    return [
        make(words(2, 13), [*words(1, 6), 1], [*words(1, 6), 1], value=stream.random())
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> Any:
    return load_model(tiny_model).train()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for split, count in (("train", 7), ("validation", 3)):
        write_compared(draw_pairs(count, count), tmp_path / "rows", split)
    return tmp_path / "rows"


def score_alone(lm: Any, item: Compared, side: int) -> torch.Tensor:
    """Log-prob of an answer after its prompt, with no trick."""
    prompt, answer = item.prompt.tolist(), item.answers[side].token_ids.tolist()
    ids = torch.tensor([prompt + answer])
    table = torch.log_softmax(lm(input_ids=ids).logits[0], -1)
    return sum(table[len(prompt) + i - 1, token] for i, token in enumerate(answer))


@pytest.mark.parametrize("share", [True, False])
def test_log_probs_are_those_of_each_answer_alone(share: bool, lm: Any, tmp_path: Path) -> None:
    items = draw_pairs(6)
    write_compared(items, tmp_path, "train")
    whole = ComparedFile(tmp_path, "train").read([4, 1, 5, 2])
    batch = assemble_compared(whole, slice(0, 4), "tokens", pad=0, share=share)
    assert (batch.attention_mask is not None) is share
    assert len(batch.tokens) == (4 if share else 8)
    sums = sum_logprobs(lm, embed_batch(lm, batch), batch)
    with torch.no_grad():
        expected = [
            [float(score_alone(lm, items[i], side)) for side in (0, 1)] for i in (4, 1, 5, 2)
        ]
    assert np.allclose(sums.detach().numpy(), expected, atol=1e-4)
    lengths = [[len(items[i].answers[side].token_ids) for side in (0, 1)] for i in (4, 1, 5, 2)]
    assert batch.lengths.tolist() == lengths
    for side in (0, 1):
        picked = pick_answer(whole, slice(1, 3), side)
        assert picked.lengths.tolist() == [[row[side]] for row in lengths[1:3]]
        part = assemble_compared(picked, slice(0, 2), "tokens", pad=0, share=share)
        one = sum_logprobs(lm, embed_batch(lm, part), part)
        assert torch.allclose(one[:, 0], sums[1:3, side], atol=1e-5)


def test_only_marked_tokens_count(lm: Any, tmp_path: Path) -> None:
    item = make([5, 6], [7, 8, 9, 1], [10, 1])
    item.answers[0].marks[:] = [1, 0, 1, 1]
    write_compared([item], tmp_path, "train")
    whole = ComparedFile(tmp_path, "train").read([0])
    batch = assemble_compared(whole, slice(0, 1), "tokens", pad=0, share=True)
    table = torch.log_softmax(lm(input_ids=torch.tensor([[5, 6, 7, 8, 9, 1]])).logits[0], -1)
    expected = table[1, 7] + table[3, 9] + table[4, 1]
    sums = sum_logprobs(lm, embed_batch(lm, batch), batch)
    assert float(sums[0, 0]) == pytest.approx(float(expected), abs=1e-5)
    assert whole.lengths.tolist() == [[3, 2]] and whole.real_tokens == 8


def test_a_prompt_is_shared_only_where_it_pays(tmp_path: Path) -> None:
    short = make([5], [6] * 20, [7] * 20)
    long = make([5] * 20, [6] * 3, [7] * 3)
    write_compared([short, long], tmp_path, "train")
    rows = ComparedFile(tmp_path, "train").read([0, 1])
    masks = [
        assemble_compared(rows, slice(i, i + 1), "tokens", pad=0, share=True).attention_mask
        for i in (0, 1)
    ]
    assert masks[0] is None and masks[1] is not None


def add_gradients(
    lm: Any, objective: Any, rows: Sequence[int], size: int, extra: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Gradients and sums of a step cut into micro-batches of `size`."""
    whole = objective.open("train").read(rows)
    totals: dict[str, float] = objective.count(whole)
    parts = [slice(i, min(i + size, len(rows))) for i in range(0, len(rows), size)]
    parts += [slice(0, 0)] * extra
    batches = [objective.assemble(whole, part, 0) for part in parts]
    sums: dict[str, Any] = {}
    if objective.surveyed:
        with torch.no_grad():
            surveyed = [objective.assemble_survey(whole, part) for part in parts]
            found = [objective.survey(lm, embed_batch(lm, batch), batch) for batch in surveyed]
        total = sum(each["kl"] for each in found)
        totals = totals | {"kl": float(total[0] / total[1])}
    lm.zero_grad()
    for batch in batches:
        loss, found_sums = objective.loss(lm, embed_batch(lm, batch), batch, totals)
        loss.backward()
        assert set(found_sums) == set(objective.measures)
        for name, value in found_sums.items():
            sums[name] = sums.get(name, 0) + value
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    return gradients, {name: value.tolist() for name, value in sums.items()}


def make_preference(name: str, directory: Path, **more: Any) -> PreferenceObjective:
    cache = directory / "reference"
    cache.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        count = ComparedFile(directory, split).count
        values = np.random.default_rng(5).normal(-12, 3, (count, 2)).astype(np.float32)
        np.save(cache / f"{split}.npy", values)
    numbers = LOSSES[name].numbers
    return PreferenceObjective(directory, name, numbers, 0, reference=Reference(cache), **more)


@pytest.mark.parametrize("name", [*LOSSES, "dpo+sft"])
def test_any_split_and_layout_gives_the_same_gradient(name: str, lm: Any, pairs: Path) -> None:
    kind, _, more = name.partition("+")
    objective = make_preference(kind, pairs, sft_weight=0.5 if more else 0.0)
    rows = [3, 0, 6, 1, 5]
    whole, sums = add_gradients(lm, objective, rows, 5)
    for other, size in ((objective, 2), (replace(objective, share_prompts=False), 3)):
        gradients, parts = add_gradients(lm, other, rows, size, extra=True)
        assert all(torch.allclose(whole[n], gradients[n], atol=2e-6) for n in whole)
        for metric, value in sums.items():
            assert parts[metric] == pytest.approx(value, abs=1e-4), metric
    assert sums["loss"][1] == 5


def test_a_pair_objective_is_its_loss(lm: Any, pairs: Path) -> None:
    """Against the pure function, on log-probs computed one answer at a time."""
    items = draw_pairs(7, 7)
    objective = make_preference("dpo", pairs)
    _, sums = add_gradients(lm, objective, [2, 4], 2)
    reference = torch.from_numpy(objective.open("train").read([2, 4]).reference)
    with torch.no_grad():
        sides = [
            Answers(
                torch.stack([score_alone(lm, items[i], side) for i in (2, 4)]),
                torch.ones(2),
                reference[:, side],
            )
            for side in (0, 1)
        ]
    judged = LOSSES["dpo"].pair_loss(*sides, Numbers())  # type: ignore[misc]
    assert sums["loss"] == pytest.approx([float(judged.losses.sum()), 2], abs=1e-5)
    gap = (judged.chosen_rewards - judged.rejected_rewards).sum()
    assert sums["rewards/margin"] == pytest.approx([float(gap), 2], abs=1e-5)


def test_kto_takes_its_reference_point_from_strangers(lm: Any, tmp_path: Path) -> None:
    stream = np.random.default_rng(3)
    items = [
        make(stream.integers(4, 56, 5).tolist(), [*stream.integers(4, 56, 3), 1], value=place % 2)
        for place in range(5)
    ]
    paired = add_strangers(items, max_length=7)
    assert paired[1].answers[1].token_ids.tolist() == items[3].answers[0].token_ids.tolist()[:2]
    assert paired[4].answers[1].token_ids.tolist() == items[1].answers[0].token_ids.tolist()[:2]
    for split in ("train", "validation"):
        write_compared(paired, tmp_path, split)
    objective = make_preference("kto", tmp_path)
    rows = [0, 1, 2, 3, 4]
    _, sums = add_gradients(lm, objective, rows, 2)
    reference = torch.from_numpy(objective.open("train").read(rows).reference)
    with torch.no_grad():
        own, other = (
            torch.stack([score_alone(lm, item, side) for item in paired]) for side in (0, 1)
        )
    kl = kto_kl((other - reference[:, 1]).sum(), 5)
    labels = torch.tensor([False, True, False, True, False])
    answers = Answers(own, torch.ones(5), reference[:, 0])
    losses, _ = kto(answers, labels, kl, LOSSES["kto"].numbers)
    assert sums["loss"] == pytest.approx([float(losses.sum()), 5], abs=1e-4)


# --- Reward models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> Any:
    return build_scorer(tiny_model, "score", seed=3).train()


@pytest.mark.parametrize("kind", ["pairs", "outcome"])
def test_any_split_of_reward_rows_gives_the_same_gradient(
    kind: Any, scorer: Any, tmp_path: Path
) -> None:
    items = draw_pairs(5)
    if kind == "outcome":
        items = [
            replace(item, answers=item.answers[:1], value=i % 2) for i, item in enumerate(items)
        ]
    write_compared(items, tmp_path, "train")
    objective = RewardObjective(tmp_path, kind, 0, centring=0.1 if kind == "pairs" else 0.0)
    whole, sums = add_gradients(scorer, objective, range(5), 5)
    for other, size in ((objective, 2), (replace(objective, share_prompts=False), 3)):
        gradients, parts = add_gradients(scorer, other, range(5), size, extra=True)
        assert all(torch.allclose(whole[n], gradients[n], atol=2e-6) for n in whole)
        assert all(parts[name] == pytest.approx(sums[name], abs=1e-4) for name in sums)


def test_the_exported_reward_model_scores_the_same_anywhere(
    scorer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    items = draw_pairs(4)
    write_compared(items, tmp_path, "train")
    whole = ComparedFile(tmp_path, "train").read(range(4))
    batch = assemble_compared(whole, slice(0, 4), "ends", pad=0, share=True)
    hidden = embed_batch(scorer, batch).flatten(0, 1)
    ours = score_states(scorer, hidden[batch.places]).view(4, 2).detach()
    save_model(scorer, scorer.config, load_tokenizer(tiny_model), tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for side in (0, 1):
        texts = [[*i.prompt.tolist(), *i.answers[side].token_ids.tolist()] for i in items]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        logits = theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
        assert torch.allclose(ours[:, side], logits, atol=1e-5)
    again = load_scorer(tmp_path / "model")
    assert torch.equal(again.score.weight, scorer.score.weight)
    # Training on goes on from this head, not from a new one.
    assert torch.equal(
        build_scorer(tmp_path / "model", "score", 9).score.weight, again.score.weight
    )


def test_steps_are_scored_at_their_marks(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    item = make([5, 6], [7, 8, 20, 9, 20])
    item.answers[0].marks[:] = [0, 0, 1, 0, 2]
    other = make([5], [7, 20])
    other.answers[0].marks[:] = [0, 1]
    write_compared([item, other], tmp_path, "train")
    model = build_scorer(tiny_model, "steps", seed=3)
    objective = RewardObjective(tmp_path, "process", 0)
    whole = objective.open("train").read([0, 1])
    assert objective.count(whole) == {"rows": 3}
    batch = objective.assemble(whole, slice(0, 2), 0)
    assert batch.right.tolist() == [True, False, True]
    scores = score_states(model, embed_batch(model, batch).flatten(0, 1)[batch.places])
    loss, sums = objective.loss(model, embed_batch(model, batch), batch, {"rows": 3.0})
    save_model(model, model.config, load_tokenizer(tiny_model), tmp_path / "model")
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval()
    assert theirs.config.id2label == {0: "wrong", 1: "right"}
    logits = theirs(input_ids=torch.tensor([[5, 6, 7, 8, 20, 9, 20]])).logits[0]
    last = theirs(input_ids=torch.tensor([[5, 7, 20]])).logits[0, -1:]
    table = torch.cat([logits[[4, 6]], last])
    assert torch.allclose(scores, table[:, 1] - table[:, 0], atol=1e-5)
    expected = torch.nn.functional.cross_entropy(table, torch.tensor([1, 0, 1]))
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert sums["loss"][1] == 3
    gradients, _ = add_gradients(model, objective, [0, 1], 1, extra=True)
    whole_gradients, _ = add_gradients(model, objective, [0, 1], 2)
    assert all(torch.allclose(gradients[n], whole_gradients[n], atol=2e-6) for n in gradients)


def test_a_padding_token_that_ends_answers_is_looked_over(scorer: Any, tmp_path: Path) -> None:
    """As transformers does where a tokenizer has no padding token of its own."""
    write_compared([make([5, 6], [7, 1], [8, 9, 1])], tmp_path, "train")
    whole = ComparedFile(tmp_path, "train").read([0])
    batch = assemble_compared(whole, slice(0, 1), "ends", pad=1, share=False)
    assert batch.places.tolist() == [2, 5 + 3]


def test_models_of_the_other_kind_are_turned_away(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no reward model but LlamaForCausalLM"):
        load_scorer(tiny_model)
    scorer = build_scorer(tiny_model, "score", 0)
    save_model(scorer, scorer.config, load_tokenizer(tiny_model), tmp_path)
    assert is_scorer(tmp_path, "score") and not is_scorer(tmp_path, "steps")
    with pytest.raises(UserError, match=r"preference.model=.* is a reward model"):
        require_language_model(tmp_path, "preference.model")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_scorer(tmp_path)
