"""Both generators sample from, score with and reload the same policy, to float32 accuracy."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raylign.config import UserError
from raylign.inference.generator import Generator, Sample, Sampling, build_generator, generate

PROMPTS = [(5, 6, 7, 8), (9, 10, 11), (5, 6, 7, 12, 13)]
SEEDED = Sampling(max_tokens=16, seed=11)


def build(backend: str, model: Path) -> Generator:
    importlib.import_module("numba")  # as a process has it that prepared data; it once broke vLLM
    return build_generator(
        backend,
        model,
        dtype="float32",
        max_length=64,
        kv_cache_mb=64,
        max_sequences=32,
        threads=1,
        seed=0,
    )


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def generator(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Generator]:
    built = build(request.param, tiny_model)
    yield built
    built.close()


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def restore(generator: Generator, policy: torch.nn.Module, version: int) -> None:
    generator.load_weights(version, [(n, p.detach()) for n, p in policy.named_parameters()])


@torch.no_grad()
def logprobs_of(
    policy: torch.nn.Module, prompt: tuple[int, ...], sampled: tuple[int, ...]
) -> np.ndarray:
    """The straightforward way: one sequence, full logits."""
    logits = policy(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(sampled)[:, None])[:, 0].numpy()


def test_reported_logprobs_are_the_policys(generator: Generator, policy: torch.nn.Module) -> None:
    restore(generator, policy, 0)
    for prompt, samples in zip(
        PROMPTS, generate(generator, PROMPTS, Sampling(max_tokens=12), count=4), strict=True
    ):
        assert len(samples) == 4
        for sample in samples:
            expected = logprobs_of(policy, prompt, sample.token_ids)
            np.testing.assert_allclose(sample.logprobs, expected, atol=2e-5)
            assert sample.finish_reason in ("stop", "length")
            assert len(sample.token_ids) <= 12


def test_temperature_logprobs_are_of_the_sampled_distribution(
    generator: Generator, policy: torch.nn.Module
) -> None:
    restore(generator, policy, 0)
    [[sample]] = generate(generator, PROMPTS[:1], Sampling(temperature=0.5, max_tokens=6))
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0] + sample.token_ids])
        logits = policy(ids).logits[0, len(PROMPTS[0]) - 1 : -1] / 0.5
    expected = torch.log_softmax(logits, -1)[range(len(sample.token_ids)), list(sample.token_ids)]
    np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=2e-5)


def test_greedy_takes_the_best_token(generator: Generator, policy: torch.nn.Module) -> None:
    restore(generator, policy, 0)
    [[sample]] = generate(generator, PROMPTS[:1], Sampling(temperature=0.0, max_tokens=8))
    sequence = list(PROMPTS[0])
    for token in sample.token_ids:
        with torch.no_grad():
            assert int(policy(torch.tensor([sequence])).logits[0, -1].argmax()) == token
        sequence.append(token)


def test_scores_equal_a_forward_pass(generator: Generator, policy: torch.nn.Module) -> None:
    restore(generator, policy, 0)
    for sequence, scores in zip(PROMPTS, generator.score(PROMPTS), strict=True):
        assert scores[0] == 0.0 and len(scores) == len(sequence)
        np.testing.assert_allclose(
            scores[1:], logprobs_of(policy, sequence[:1], sequence[1:]), atol=2e-5
        )


def test_every_sync_is_exact_and_leaves_nothing_behind(
    generator: Generator, policy: torch.nn.Module
) -> None:
    """Ten syncs, each proved by log-probs of samples that share cached prefixes with the last."""
    noise = torch.Generator().manual_seed(1)
    for version in range(1, 11):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
        restore(generator, policy, version)
        for prompt, samples in zip(
            PROMPTS, generate(generator, PROMPTS, Sampling(max_tokens=8), count=2), strict=True
        ):
            for sample in samples:
                assert set(sample.versions.tolist()) <= {version}
                expected = logprobs_of(policy, prompt, sample.token_ids)
                np.testing.assert_allclose(sample.logprobs, expected, atol=5e-5)


def test_a_sync_in_flight_splits_sequences_by_version(
    generator: Generator, policy: torch.nn.Module
) -> None:
    """Tokens before the sync follow the old policy, tokens after it the new one."""
    restore(generator, policy, 20)
    old = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for index, prompt in enumerate(PROMPTS):
        generator.submit(str(index), prompt, Sampling(max_tokens=24), count=4)
    for _ in range(6):
        generator.advance()
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    restore(generator, policy, 21)
    new = {name: p.detach().clone() for name, p in policy.named_parameters()}
    mixed = 0
    while generator.pending:
        for key, samples in generator.advance():
            prompt = PROMPTS[int(key)]
            for sample in samples:
                by_version = {}
                for version, weights in ((20, old), (21, new)):
                    with torch.no_grad():
                        for name, parameter in policy.named_parameters():
                            parameter.copy_(weights[name])
                    by_version[version] = logprobs_of(policy, prompt, sample.token_ids)
                expected = np.array([by_version[int(v)][i] for i, v in enumerate(sample.versions)])
                np.testing.assert_allclose(sample.logprobs, expected, atol=5e-5)
                mixed += len(set(sample.versions.tolist())) == 2
    assert mixed, "no sequence was in flight during the sync: the test tested nothing"


def test_a_prompt_longer_than_the_context_is_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="80 tokens; the context holds 64"):
        generator.submit("long", tuple(range(4, 84)), Sampling())


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_missing_model_is_the_users_mistake(backend: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        build(backend, tmp_path / "nowhere")


def test_an_unknown_backend_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="'vllm' or 'transformers'"):
        build("sglang", tiny_model)


def test_a_head_that_vllm_cannot_serve_on_a_cpu_is_named(tiny_model: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a limit of vLLM on CPUs")
    odd = tmp_path / "odd"
    shutil.copytree(tiny_model, odd)
    shape = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(shape | {"head_dim": 16}))
    with pytest.raises(UserError, match=r"heads of 16 dimensions .* knows 32, 64"):
        build("vllm", odd)


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_model_may_end_with_more_than_one_token(
    tiny_model: Path, tmp_path: Path, backend: str
) -> None:
    whole = generate_one("transformers", tiny_model)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    stop = whole[4]
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((model / name).read_text(encoding="utf-8"))
        fields["eos_token_id"] = [fields["eos_token_id"], stop]
        (model / name).write_text(json.dumps(fields), encoding="utf-8")
    assert generate_one(backend, model) == whole[: whole.index(stop) + 1]


def generate_one(backend: str, model: Path) -> tuple[int, ...]:
    """The likeliest continuation, of which the model decides where it ends."""
    generator = build(backend, model)
    greedy = Sampling(temperature=0.0, max_tokens=8)
    [[sample]] = generate(generator, PROMPTS[:1], greedy)
    generator.close()
    assert sample.finish_reason == ("length" if len(sample.token_ids) == 8 else "stop")
    return sample.token_ids


def finish(generator: Generator) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    while generator.pending:
        groups.update(generator.advance())
    return groups


def ids(samples: list[Sample]) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in samples]


def test_sampling_that_vllm_does_not_know_is_refused(generator: Generator) -> None:
    if type(generator).__name__ != "VLLMGenerator":
        pytest.skip("transformers knows any temperature")
    with pytest.raises(ValueError, match=r"prompt hot: temperature must be in \[0, 2\]"):
        generator.submit("hot", PROMPTS[0], Sampling(temperature=9.0))
    assert not generator.pending


def test_each_completion_of_a_seeded_request_has_its_own_noise(generator: Generator) -> None:
    [first] = generate(generator, PROMPTS[:1], SEEDED, count=4)
    [again] = generate(generator, PROMPTS[:1], SEEDED, count=4)
    assert ids(first) == ids(again) and len(set(ids(first))) == 4
    [[neighbour]] = generate(generator, PROMPTS[:1], replace(SEEDED, seed=12))
    assert neighbour.token_ids not in ids(first)  # seeds next to each other share nothing


def test_a_group_taken_back_goes_on_where_it_was(
    generator: Generator, policy: torch.nn.Module
) -> None:
    restore(generator, policy, 30)
    generator.submit("g", PROMPTS[0], SEEDED, 3)
    generator.submit("other", PROMPTS[0], SEEDED, 1)
    for _ in range(6):
        generator.advance()
    begun = generator.abort("g")
    assert {s.finish_reason for s in begun} <= {"abort", "stop"}
    for sample in begun:
        assert len(sample.logprobs) == len(sample.versions) == len(sample.token_ids) > 0
    generator.submit("again", PROMPTS[0], SEEDED, 3, begun)
    groups = finish(generator)
    assert set(groups) == {"other", "again"}
    for before, after in zip(begun, groups["again"], strict=True):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
        np.testing.assert_array_equal(after.logprobs[: len(before.logprobs)], before.logprobs)
        assert after.finish_reason in ("stop", "length") and len(after.token_ids) <= 16
        expected = logprobs_of(policy, PROMPTS[0], after.token_ids)
        np.testing.assert_allclose(after.logprobs, expected, atol=2e-5)
        if before.finish_reason == "abort":
            assert len(after.token_ids) > len(before.token_ids)
    with pytest.raises(KeyError):
        generator.abort("g")


def test_a_group_taken_back_before_its_first_step_has_nothing(generator: Generator) -> None:
    generator.submit("g", PROMPTS[0], SEEDED, 2)
    assert [(s.token_ids, s.finish_reason) for s in generator.abort("g")] == [((), "abort")] * 2
    assert not generator.pending
    [begun] = generate(generator, PROMPTS[:1], SEEDED, count=2)
    generator.submit("done", PROMPTS[0], SEEDED, 2, begun)  # complete: nothing is left to draw
    assert ids(finish(generator)["done"]) == ids(begun)


def test_a_stop_token_ends_a_completion_and_is_kept(generator: Generator) -> None:
    [[whole]] = generate(generator, PROMPTS[:1], SEEDED)
    stop = whole.token_ids[3]
    [[cut]] = generate(generator, PROMPTS[:1], replace(SEEDED, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


def test_nothing_asked_before_matters_to_the_bit(generator: Generator) -> None:
    generator.forget()
    first = generate(generator, PROMPTS, SEEDED, count=3)
    generate(generator, [(5, 6, 7, 8, 20, 21), (30, 31)], Sampling(max_tokens=9), count=5)
    generator.forget()
    again = generate(generator, PROMPTS, SEEDED, count=3)
    for group, other in zip(first, again, strict=True):
        assert ids(group) == ids(other)
        assert [s.logprobs.tobytes() for s in group] == [s.logprobs.tobytes() for s in other]


def test_what_goes_on_does_not_meet_the_same_noise_again(
    generator: Generator, policy: torch.nn.Module
) -> None:
    flat = [(name, torch.zeros_like(p)) for name, p in policy.named_parameters()]
    generator.load_weights(40, flat)  # all tokens are as likely: what is drawn is but the noise
    generator.submit("g", PROMPTS[0], SEEDED, 4)
    for _ in range(8):
        generator.advance()
    begun = generator.abort("g")
    generator.submit("again", PROMPTS[0], SEEDED, 4, begun)
    continued = 0
    for before, after in zip(begun, finish(generator)["again"], strict=True):
        said = len(before.token_ids)
        if len(after.token_ids) >= said + 4:
            continued += 1
            assert after.token_ids[said : said + 4] != before.token_ids[:4]
    assert continued
