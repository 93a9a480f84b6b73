"""Fine-tuning as a job, without Ray: its rows, what it shows and refuses, and what it learns."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from jobs import sft
from jobs.entry import main
from raylign.config import EngineConfig, ModelConfig, Recipe, SftConfig, UserError
from raylign.models.loading import initialise, load_tokenizer, save_model
from raylign.models.presets import build_config
from raylign.run import Draft, Run
from raylign.tokenization.train import train_bpe
from raylign.tracking import ProgressBoard, read_lines
from raylign.training.loop import SupervisedLoop
from raylign.training.rows import DemonstrationRows

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "instruct"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 6,
    "micro_batch_size": 3,
    "sequence_length": 64,
    "validation_share": 0.1,
    "checkpoint_every": 2,
    "sample_prompts": ("one?",),
    "sample_tokens": 3,
    "engine": EngineConfig(backend="torch"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as it comes from a hub: a template without marks."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["one two three user assistant system yes no" * 3] * 9, 280, ())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    shape = ModelConfig(hidden_size=32, layers=1, ffn_size=48, heads=2, kv_heads=1, context=64)
    config = build_config(shape, len(tokenizer), pad_id=0, eos_id=1)
    made = initialise(config, 0)
    save_model(made, made.config, tokenizer, directory)
    return directory


@pytest.fixture
def board() -> ProgressBoard:
    return ProgressBoard(Console(quiet=True))


def write(directory: Path, rows: list[dict[str, Any]]) -> Path:
    file = directory / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def alpaca(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"say {n}", "output": "yes " * (n % 5 + 1)} for n in range(count)]


def prepare(
    model: Path, data: Path, output: Path, board: ProgressBoard, **changes: Any
) -> tuple[SftConfig, Draft]:
    """The rows of a stage in the making."""
    config = SftConfig(model=str(model), data=data, **SETTINGS | changes)
    draft = Draft(output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(model)
    sft.check(config, model, tokenizer)
    sft.prepare_rows(config, data, tokenizer, 0, output / ".rows", draft, board)
    return config, draft


def test_rows_that_cannot_be_used_are_on_record(
    model: Path, tmp_path: Path, board: ProgressBoard
) -> None:
    rows = alpaca(40)
    rows[4] = {"instruction": "x", "output": ""}
    rows[9] = {"instruction": "x", "output": "no " * 60}
    rows[30] = {"instruction": "x", "output": " "}
    data = write(tmp_path, rows)
    _, draft = prepare(model, data, tmp_path / "out", board, max_rejected_share=0.1)
    assert read_lines(tmp_path / "out" / "rejected.jsonl") == [
        {"row": 5, "reason": "a message without text content"},
        {"row": 10, "reason": "longer than sequence_length"},
        {"row": 31, "reason": "a message without text content"},
    ]
    reasons = {"a message without text content": 2, "longer than sequence_length": 1}
    assert draft.summary["rejected"] == 3 and draft.summary["rejected_reasons"] == reasons
    assert draft.summary["format"] == "alpaca" and draft.summary["conversations"] == 37
    _, draft = prepare(
        model, data, tmp_path / "cut", board, max_rejected_share=0.1, too_long="truncate"
    )
    assert draft.summary["truncated"] == 1 and draft.summary["conversations"] == 38
    with pytest.raises(UserError) as caught:
        prepare(model, data, tmp_path / "not", board)
    assert str(caught.value) == (
        f"demonstrations {data}: 3 of 40 rows cannot be used: 2 x a message without text content "
        "(first in row 5); 1 x longer than sequence_length (first in row 10); put them right or "
        "take them out"
    )


def test_without_packing_every_conversation_has_its_row(
    model: Path, tmp_path: Path, board: ProgressBoard
) -> None:
    data = write(tmp_path, alpaca(30))
    _, packed = prepare(model, data, tmp_path / "packed", board)
    _, apart = prepare(model, data, tmp_path / "apart", board, packing=False)
    assert packed.summary["rows"] < apart.summary["rows"] == 27
    whole = DemonstrationRows(tmp_path / "apart" / ".rows", "train").read(range(27))
    assert set(whole.segments.ravel().tolist()) == {0, 1}
    together = DemonstrationRows(tmp_path / "packed" / ".rows", "train")
    assert int(whole.trained.sum()) == int(together.read(range(together.count)).trained.sum())
    assert int(whole.trained.sum()) == packed.summary["trained_tokens"]


def test_brackets_of_a_template_s_message_are_words(model: Path, tmp_path: Path) -> None:
    """And not a terminal's markup."""
    odd = tmp_path / "odd"
    shutil.copytree(model, odd)
    rows = [*alpaca(9), {"instruction": "[/INST]", "output": "x"}]
    refusing = "{% if '[' in messages[0].content %}{{ raise_exception('[/INST] is no word') }}"
    (odd / "chat_template.jinja").write_text(refusing + "{% endif %}" + CHATML)
    said = io.StringIO()
    prepare(
        odd,
        write(tmp_path, rows),
        tmp_path / "out",
        ProgressBoard(Console(file=said)),
        max_rejected_share=0.2,
    )
    assert "left out: 1 x the chat template refuses it: [/INST] is no word" in said.getvalue()


def test_what_comes_of_a_row_stays_on_one_side() -> None:
    nothing = np.zeros(1, np.int32)
    made = [sft.Conversation(nothing, nothing.astype(bool), row) for row in range(10)] * 3
    train, validation = sft.split(made, 0.3, seed=0)
    assert len(train) == 21 and len(validation) == 9
    assert not {each.row for each in train} & {each.row for each in validation}
    with pytest.raises(UserError, match="validation needs a second one"):
        sft.split(made[:1], 0.3, seed=0)


def train(
    model: Path, data: Path, output: Path, board: ProgressBoard, **changes: Any
) -> dict[str, torch.Tensor]:
    """The weights after training in this process."""
    config, draft = prepare(model, data, output, board, **changes)
    task = sft.plan(0, config, model, load_tokenizer(model), output / ".rows", draft)
    SupervisedLoop(replace(task, output=output)).run()
    return load_file(output / "model" / "model.safetensors")


def test_noise_changes_what_is_learned_and_micro_batches_do_not(
    model: Path, tmp_path: Path, board: ProgressBoard
) -> None:
    data = write(tmp_path, alpaca(30))

    def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    options = {"packing": False, "neftune_alpha": 5.0, "steps": 3}
    noisy = train(model, data, tmp_path / "a", board, **options)
    assert differ(noisy, train(model, data, tmp_path / "b", board, **options)) == 0.0
    cut = train(model, data, tmp_path / "c", board, micro_batch_size=2, **options)
    assert differ(noisy, cut) < 2e-5
    plain = train(model, data, tmp_path / "d", board, **options | {"neftune_alpha": 0.0})
    assert differ(noisy, plain) > 1e-4


def test_what_answers_end_with_ends_what_the_model_writes(
    model: Path, tmp_path: Path, board: ProgressBoard
) -> None:
    train(model, write(tmp_path, alpaca(20)), tmp_path / "out", board, steps=1)
    end = load_tokenizer(model).convert_tokens_to_ids("<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / "model" / name).read_text(encoding="utf-8"))
        assert found["eos_token_id"] == [1, end]
    assert json.loads((model / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == 1


def test_plain_pairs_train_a_model_without_a_template(
    model: Path, tmp_path: Path, board: ProgressBoard
) -> None:
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = None
    made = initialise(build_config(ModelConfig(hidden_size=16, layers=1, ffn_size=24, heads=2,
        kv_heads=1, context=64), len(tokenizer), pad_id=0, eos_id=1), 0)  # fmt: skip
    save_model(made, made.config, tokenizer, bare)
    pairs = [{"prompt": f"one {n} =", "completion": " two"} for n in range(20)]
    data = write(tmp_path, pairs)
    assert train(bare, data, tmp_path / "out", board)
    [sample, *_] = read_lines(tmp_path / "out" / "samples.jsonl")
    assert sample["prompt"] == "one?"
    with pytest.raises(UserError, match="train_on=user has no effect on plain prompts and compl"):
        prepare(bare, data, tmp_path / "no", board, train_on=("user",))
    with pytest.raises(UserError, match=r"tokenizer .*bare has no chat template; add chat_templa"):
        prepare(bare, write(tmp_path, alpaca(9)), tmp_path / "no", board)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sequence_length": 65}, "sft.sequence_length=65 exceeds the context of "),
        ({"train_on": ()}, "sft.train_on names no role; give at least one"),
        (
            {"neftune_alpha": 5.0, "engine": EngineConfig(pipeline_parallel=2)},
            "sft.neftune_alpha does not work with sft.engine.pipeline_parallel; leave one out",
        ),
        ({"format": "messages"}, "demonstrations "),
    ],
)
def test_what_does_not_fit_is_one_line(
    model: Path, tmp_path: Path, board: ProgressBoard, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(model, write(tmp_path, alpaca(5)), tmp_path / "out", board, **changes)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def show(model: Path, data: Path, count: str, directory: Path, **changes: Any) -> None:
    config = SftConfig(model=str(model), data=data, **SETTINGS | changes)
    recipe = Recipe(run=directory / "run", sft=config)
    sft.show_examples(count, recipe, Run(recipe.run), ProgressBoard(Console(quiet=True)))


def test_examples_are_shown_with_their_mask(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, [*alpaca(3), {"instruction": "x", "output": ""}, *alpaca(60)])
    show(model, data, "2", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("example")]
    assert [head.split(":")[0] for head in heads] == ["example 1 of 2", "example 2 of 2"]
    trained = [line.split(None, 4) for line in lines if " train " in line]
    assert trained[0][2] == "assistant" and trained[0][4].startswith("'yes"), trained[0]
    assert sum("'<|im_end|>'" in line for line in lines) == 4
    assert sum("'<|im_end|>'" in row[4] for row in trained) == 2, "the closing token is trained"
    assert lines[-3].startswith("63 demonstrations (alpaca): ")
    assert lines[-2].startswith("answers end with <|im_end|>, and the tokenizer's eos_token is ")
    assert lines[-1] == "left out: 1 x a message without text content (first in row 4)"
    assert not (tmp_path / "run" / "sft").exists()
    with pytest.raises(UserError, match="1 of 64 rows cannot be used"):
        show(model, data, "1", tmp_path, max_rejected_share=0.01)
    assert "example 1 of 1" in capsys.readouterr().out, "shown all the same"
    with pytest.raises(UserError, match="--show many: give the number of examples"):
        show(model, data, "many", tmp_path)


def test_a_lone_example_is_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^sft.data holds one demonstration; validation"):
        show(model, write(tmp_path, alpaca(1)), "3", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("example 1 of 1: row 1, ")
    assert any(" train " in line for line in lines)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data in ../shared/data/instruct")
def test_public_instructions_are_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(model, SHARED / "identity.json", "1", tmp_path, too_long="truncate")
    shown = capsys.readouterr().out
    assert "90 demonstrations (alpaca): " in shown and "cut at sequence_length" in shown


@pytest.mark.slow
def test_showing_starts_no_ray_and_needs_no_weights(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "weightless"
    bare.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    data = write(tmp_path, alpaca(9))
    recipe.write_text(f"run: run\nsft: {{model: {bare}, data: {data}, sequence_length: 64}}\n")
    code = (
        "import sys, ray, runpy; ray.init = None\n"
        "sys.argv = ['sft', *sys.argv[1:]]; runpy.run_module('jobs.sft', run_name='__main__')"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe), "--show", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("example 1 of 1: row ")


@pytest.mark.parametrize("arguments", [["--show"], ["recipe.yaml", "--show"]])
def test_an_option_without_its_value_shows_the_usage(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft", *arguments])
    with pytest.raises(SystemExit) as caught:
        main("sft", sft.run, options={"--show COUNT": sft.show_examples})
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("[section.key=value ...] [--show COUNT]\n")
