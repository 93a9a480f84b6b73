"""Scores agree with the plain forward pass, answers stop where they should, tasks run offline."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.evaluation.harness import GeneratorLM, evaluate_model
from raylign.evaluation.tasks import count_digits, grade_arithmetic, write_tasks
from raylign.inference.generator import Generator, build_generator
from raylign.models.loading import load_tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Iterator[Generator]:
    built = build_generator(
        "transformers", tiny_model, dtype="float32", max_length=CONTEXT, kv_cache_mb=64,
        max_sequences=32, threads=1, seed=0,
    )  # fmt: skip
    yield built
    built.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def lm(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> GeneratorLM:
    return GeneratorLM(generator, tokenizer, max_length=CONTEXT, max_tokens=8)


def ask(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
def score(
    policy: torch.nn.Module, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """The straightforward way: one sequence, full logits."""
    logits = policy(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    wanted = torch.tensor(continuation)
    total = float(logprobs.gather(1, wanted[:, None]).sum())
    return total, bool((logprobs.argmax(-1) == wanted).all())


def continue_greedily(policy: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(policy(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


def test_loglikelihood_is_the_forward_passes(lm, policy, tokenizer) -> None:
    cases = [("w1 w2 w3", " w4"), ("w1 w2 w3", " w5 w6"), ("w9", " w9 w8 w7 w6"), ("", "w3 w4")]
    best = continue_greedily(policy, tokenizer("w1 w2 w3").input_ids, 2)
    cases.append(("w1 w2 w3", " " + " ".join(tokenizer.convert_ids_to_tokens(best))))
    found = lm.loglikelihood([ask("loglikelihood", *case) for case in cases], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(cases, found, strict=True):
        before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
        expected, best_all = score(policy, before, tokenizer(continuation).input_ids)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == best_all
    assert found[-1][1]


def test_a_context_too_long_loses_its_beginning(lm, policy, tokenizer) -> None:
    words = " ".join(f"w{i % 50}" for i in range(100))
    [(value, _)] = lm.loglikelihood([ask("loglikelihood", words, " w1 w2")], disable_tqdm=True)
    kept = tokenizer(words).input_ids[-(CONTEXT - 3) :]
    assert value == pytest.approx(score(policy, kept, tokenizer("w1 w2").input_ids)[0], abs=1e-4)


def test_rolling_windows_score_every_token_once(lm, policy, tokenizer) -> None:
    texts = ["w5 w6 w7", " ".join(f"w{i % 50}" for i in range(150))]
    found = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
    short = score(policy, [tokenizer.eos_token_id], tokenizer(texts[0]).input_ids)[0]
    assert found[0] == pytest.approx(short, abs=1e-4)
    # By hand: the first window starts with <eos>, later ones with as much of the text as fits.
    ids, width, total, done = tokenizer(texts[1]).input_ids, CONTEXT - 2, 0.0, 0
    while done < len(ids):
        end = min(done + width, len(ids))
        context = [tokenizer.eos_token_id] if done == 0 else ids[max(0, end - width - 1) : done]
        total += score(policy, context, ids[done:end])[0]
        done = end
    assert found[1] == pytest.approx(total, abs=1e-3)


def test_generation_is_greedy_and_stops(lm, policy, tokenizer) -> None:
    ids = continue_greedily(policy, tokenizer("w1 w2 w3").input_ids, 8)
    words = tokenizer.convert_ids_to_tokens(ids)
    text = " ".join(words)
    stop = words[3]
    options = {"until": [], "do_sample": False}
    requests = [
        ask("generate_until", "w1 w2 w3", options),
        ask("generate_until", "w1 w2 w3", options | {"max_gen_toks": 2}),
        ask("generate_until", "w1 w2 w3", options | {"until": [f" {stop}"]}),
    ]
    whole, short, cut = lm.generate_until(requests)
    assert whole == text.split("<eos>")[0].rstrip()
    assert short == " ".join(words[:2])
    assert cut == whole.split(f" {stop}")[0]


def test_a_long_prompt_leaves_room_for_the_answer(lm) -> None:
    words = " ".join(f"w{i % 50}" for i in range(200))
    [answer] = lm.generate_until([ask("generate_until", words, {"until": [], "max_gen_toks": 8})])
    assert isinstance(answer, str)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [
        {"id": "0", "prompt": "w1 w2", "reference": "7", "key": "4 + 3"},
        {"id": "1", "prompt": "w3 w4", "reference": "20", "key": "12 + 8"},
        {"id": "2", "prompt": "w5 w6", "reference": "1", "key": "100 - 99"},
    ]
    texts = [{"text": "w1 w2 w3 w4 w5"}, {"text": "w9 w8 w7"}]
    for name, lines in (("held_out.jsonl", rows), ("english_held_out.jsonl", texts)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


def test_local_tasks_run_without_a_network(
    generator, tokenizer, corpus: Path, policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a task tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    names = ("arithmetic", "english")
    write_tasks(names, corpus, corpus / "tasks", max_tokens=8)
    found = evaluate_model(
        generator, tokenizer, names, corpus / "tasks", max_length=CONTEXT, max_tokens=8
    )
    arithmetic = found["metrics"]["arithmetic"]
    assert arithmetic["exact"] == {"value": 0.0, "stderr": 0.0, "n": 3}
    assert {name: score["n"] for name, score in arithmetic.items()} == {
        "exact": 3, "format": 3, "exact_1_digit": 1, "exact_2_digit": 1, "exact_3_digit": 1,
    }  # fmt: skip
    assert [row["doc"]["prompt"] for row in found["documents"]["arithmetic"]] == [
        "w1 w2",
        "w3 w4",
        "w5 w6",
    ]
    assert all(isinstance(row["answer"], str) for row in found["documents"]["arithmetic"])
    texts = ["w1 w2 w3 w4 w5", "w9 w8 w7"]
    total = sum(score(policy, [tokenizer.eos_token_id], tokenizer(t).input_ids)[0] for t in texts)
    bits = -total / sum(map(len, texts)) / math.log(2)
    english = found["metrics"]["english"]
    assert english["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert english["byte_perplexity"]["value"] == pytest.approx(2**bits, rel=1e-5)
    assert english["bits_per_byte"]["stderr"] > 0
    assert found["higher_is_better"]["english"]["bits_per_byte"] is False


def test_limit_and_chat_reach_the_tasks(generator, tokenizer, corpus: Path) -> None:
    write_tasks(("arithmetic",), corpus, corpus / "tasks", max_tokens=4)
    found = evaluate_model(
        generator, tokenizer, ("arithmetic",), corpus / "tasks", 2, chat=False, max_length=CONTEXT
    )
    assert found["metrics"]["arithmetic"]["exact"]["n"] == 2


def test_a_group_has_the_mean_of_its_tasks(generator, tokenizer, corpus: Path) -> None:
    write_tasks(("arithmetic",), corpus, corpus / "tasks", max_tokens=4)
    (corpus / "tasks" / "both.yaml").write_text(
        "group: both\ntask: [arithmetic]\n"
        "aggregate_metric_list: [{metric: exact, aggregation: mean, weight_by_size: true}]\n"
    )
    found = evaluate_model(generator, tokenizer, ("both",), corpus / "tasks", max_length=CONTEXT)
    assert found["metrics"]["both"]["exact"]["value"] == 0.0
    assert found["metrics"]["both"]["exact"]["n"] == found["metrics"]["arithmetic"]["exact"]["n"]
    assert list(found["documents"]) == ["arithmetic"]


def test_an_unknown_task_is_answered_with_a_suggestion(generator, tokenizer, corpus: Path) -> None:
    write_tasks(("arithmetic",), corpus, corpus / "tasks", max_tokens=4)
    with pytest.raises(UserError, match="unknown task 'arithmetics'; did you mean 'arithmetic'"):
        evaluate_model(generator, tokenizer, ("arithmetics",), corpus / "tasks", max_length=CONTEXT)


def test_a_task_that_would_download_is_refused_offline(
    generator, tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/no-such-data\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n"
        "  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n"
    )
    with pytest.raises(
        UserError, match=r"data of 'far' cannot be loaded; set evaluate\.offline=false"
    ):
        evaluate_model(generator, tokenizer, ("far",), tmp_path, max_length=CONTEXT)


def test_chat_needs_a_template(generator, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set evaluate\.chat=false"):
        evaluate_model(generator, tokenizer, ("arithmetic",), max_length=CONTEXT)


def test_missing_held_out_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'english' needs .*english_held_out\.jsonl"):
        write_tasks(("english",), tmp_path, tmp_path / "tasks", max_tokens=4)


def test_grading_follows_the_verifier() -> None:
    doc = {"reference": "489", "key": "431 + 58"}
    good = grade_arithmetic(doc, ["<work>I can see it.</work><answer>489</answer>"])
    assert good == {"exact": 1.0, "format": 1.0, "exact_3_digit": 1.0}
    assert grade_arithmetic(doc, ["489"])["exact"] == 0.0
    assert count_digits("7 - 7") == 1
