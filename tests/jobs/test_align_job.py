"""What `align` refuses before anything is started, each in one line with its remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.align import check
from jobs.asking import read_prompts
from raylign.config import AlgorithmConfig, AlignConfig, CriticConfig, RewardConfig, UserError
from raylign.models.loading import load_tokenizer, require_chat_template
from tests.tiny_model import write_speller


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_go_through_the_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", {"prompt": "w1 w2", "reference": 3, "id": "x"})
    [prompt] = read_prompts(file, load_tokenizer(tiny_model), 64, 8)
    assert prompt.id == "x" and prompt.reference == "3" and prompt.text == "w1 w2"
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.convert_ids_to_tokens(prompt.token_ids) == [
        "<user>",
        "w1",
        "w2",
        "<assistant>",
    ]


def test_a_prompt_that_does_not_fit_is_named_by_line(tiny_model: Path, tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "p.jsonl",
        {"prompt": "w1", "reference": "1"},
        {"prompt": " ".join(["w1"] * 60), "reference": "1"},
    )
    with pytest.raises(
        UserError, match=r"p.jsonl:2: prompt of 62 tokens .*max_tokens=8.*context of 64"
    ):
        read_prompts(file, load_tokenizer(tiny_model), 64, 8)


def test_a_line_separator_inside_a_prompt_ends_no_row(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "w1\u2028w2", "reference": "1"}\n', encoding="utf-8")
    [prompt] = read_prompts(file, load_tokenizer(tiny_model), 64, 8)
    assert prompt.text == "w1\u2028w2"


@pytest.mark.parametrize("row", [{"prompt": "w1"}, ["w1"], {"reference": "1"}])
def test_a_malformed_row_is_named_by_line(tiny_model: Path, tmp_path: Path, row: object) -> None:
    file = write_rows(tmp_path / "p.jsonl", {"prompt": "w1", "reference": "1"}, row)
    with pytest.raises(UserError, match=r"p.jsonl:2: not a row"):
        read_prompts(file, load_tokenizer(tiny_model), 64, 8)


def test_prompts_of_another_encoding_are_named_by_line(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "w1", "reference": "1"}\n{"prompt": "\xe9", "reference": "1"}\n')
    with pytest.raises(UserError, match=r"p.jsonl:2: not UTF-8 \(byte 0xe9\); save the file"):
        read_prompts(file, load_tokenizer(tiny_model), 64, 8)


def test_no_prompts_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl", load_tokenizer(tiny_model), 64, 8)
    with pytest.raises(UserError, match="is empty"):
        read_prompts(write_rows(tmp_path / "p.jsonl"), load_tokenizer(tiny_model), 64, 8)


def test_a_model_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no chat template"):
        require_chat_template(load_tokenizer(bare), bare)


def test_unknown_algorithm_and_reward_are_refused_early() -> None:
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        check(AlignConfig(algorithm=AlgorithmConfig(name="grop")))
    with pytest.raises(UserError, match="arithmetic"):
        check(AlignConfig(reward=RewardConfig(source="arithmetics")))


def test_a_group_of_one_is_refused_where_groups_are_compared() -> None:
    with pytest.raises(UserError, match=r"align.group_size=1: grpo compares"):
        check(AlignConfig(group_size=1))
    check(AlignConfig(group_size=1, algorithm=AlgorithmConfig(name="reinforce_pp")))


def test_a_critic_that_reads_other_tokens_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = write_speller(tmp_path / "other")
    for start, message in ((other, "has another tokenizer than the policy"), (None, "no such dir")):
        critic = CriticConfig(model=start or tmp_path / "none")
        config = AlignConfig(algorithm=AlgorithmConfig(name="ppo"), critic=critic)
        with pytest.raises(UserError, match=rf"align.critic.model=.*{message}"):
            check(config, tiny_model)


def test_vllm_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name)
    )
    with pytest.raises(UserError, match=r"not installed; install raylign\[cpu\]"):
        check(AlignConfig())
