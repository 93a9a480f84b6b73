"""Preference optimisation and reward models as jobs, on real comparisons."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ray.util import placement_group
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from jobs import preference, reward_model
from jobs.comparisons import split
from raylign.config import (
    EngineConfig,
    ModelConfig,
    PreferenceConfig,
    Recipe,
    RewardModelConfig,
    UserError,
)
from raylign.data.comparisons import Compared
from raylign.models.heads import build_scorer, load_scorer
from raylign.models.loading import initialise, load_tokenizer, save_model
from raylign.models.presets import build_config
from raylign.run import Draft, Run
from raylign.tokenization.train import train_bpe
from raylign.tracking import METRICS_FILE, ProgressBoard, read_lines
from raylign.training import supervised
from raylign.training.checkpoints import list_checkpoints
from raylign.training.compared_rows import ComparedFile
from raylign.training.loop import CHECKPOINTS, SupervisedLoop
from raylign.training.reservation import IdleReservations

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "preference"
PAIRS, LABELLED = REAL / "dpo_en_demo.json", REAL / "kto_en_demo.json"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not next to the checkout")
SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 6,
    "micro_batch_size": 2,
    "max_length": 96,
    "too_long": "truncate",
    "checkpoint_every": 2,
    "optimizer": {"lr": 3e-3},
    "schedule": {"warmup_steps": 1},
    "checkpoints": {"keep": 1, "after": "all"},
}


@pytest.fixture(scope="module")
def board() -> ProgressBoard:
    return ProgressBoard(Console(quiet=True))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy whose tokenizer knows the real data's characters."""
    directory = tmp_path_factory.mktemp("start")
    texts = ["the quick brown fox jumps over the lazy dog", "what is it? it is a question"]
    tokenizer = train_bpe(texts, 300)
    shape = ModelConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, ffn_size=48, context=128)
    config = build_config(
        shape, len(tokenizer), pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
    )
    save_model(initialise(config, 0), config, tokenizer, directory)
    return directory


def write_rows(directory: Path, rows: list[dict[str, Any]]) -> Path:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def draw_pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {n}.", "chosen": f" yes {n}", "rejected": f" no {n * 7}", "margin": 1}
        for n in range(count)
    ]


def draw_steps(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Add {n}.", "completions": [f"{n} + 1", f"= {n}"], "labels": [True, False]}
        for n in range(count)
    ]


def make_recipe(root: Path, **sections: Any) -> Recipe:
    return Recipe(run=root, seed=3, **sections)


@real
@pytest.mark.slow
def test_two_ranks_learn_preferences(
    ray_cluster: None,
    start: Path,
    board: ProgressBoard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What lost its controller holds a core, and is given back because the ranks need it.
    monkeypatch.setattr(supervised, "IdleReservations", partial(IdleReservations, patience_s=1.0))
    assert placement_group([{"CPU": 1.0}]).wait(30)
    config = PreferenceConfig(model=str(start), data=PAIRS, sample_prompts=("Hi",), **SMALL)
    run = Run(tmp_path / "run")
    preference.run(make_recipe(run.root, preference=config), run, board)
    stage = run.require("preference", "preference")
    summary = stage.manifest.summary
    counts = [summary[name] for name in ("rows", "validation_rows", "rejected")]
    assert summary["format"] == "sharegpt-pairs" and sum(counts) == 300
    assert counts[2] == len(read_lines(stage.path / "rejected.jsonl")) > 0
    assert 0 <= summary["validation_accuracy"] <= 1 and summary["truncated"] > 200
    rows = read_lines(stage.path / METRICS_FILE)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert rows[0]["rewards/margin"] == pytest.approx(0, abs=1e-3)
    assert {"rewards/accuracy", "validation_rewards/accuracy"} <= rows[-1].keys()
    AutoModelForCausalLM.from_pretrained(stage.path / "model")
    (cache,) = (run.root / ".reference").iterdir()
    table = np.load(cache / "train.npy")
    assert table.shape == (counts[0], 2) and (table < 0).all()
    assert [path.name for path in (stage.path / "checkpoints").iterdir()] == ["step-00000002"]


def test_scores_of_a_reference_are_named_after_what_decides_them() -> None:
    plain = PreferenceConfig()
    name = preference.name_scores(plain, "policy", "rows", True)
    same = PreferenceConfig(loss="ipo", optimizer={"lr": 1.0}, workers={"count": 5}, peft="lora")
    assert preference.name_scores(same, "policy", "rows", True) == name
    others = {
        preference.name_scores(plain, "other", "rows", True),
        preference.name_scores(plain, "policy", "other", True),
        preference.name_scores(PreferenceConfig(peft="qlora"), "policy", "rows", True),
        preference.name_scores(
            PreferenceConfig(engine={"dtype": "bfloat16"}), "policy", "rows", True
        ),
    }
    assert len(others | {name}) == 5
    assert preference.name_scores(PreferenceConfig(peft="qlora"), "policy", "rows", False) == name


@real
@pytest.mark.slow
def test_a_reward_model_scores_the_same_in_transformers(
    ray_cluster: None, start: Path, board: ProgressBoard, tmp_path: Path
) -> None:
    one: dict[str, Any] = {"engine": {"backend": "torch"}, "workers": {"count": 1}}
    config = RewardModelConfig(model=str(start), data=PAIRS, centring=0.01, **SMALL, **one)
    run = Run(tmp_path / "run")
    reward_model.run(make_recipe(run.root, reward_model=config), run, board)
    stage = run.require("reward_model", "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(stage.path / "model")
    tokenizer = load_tokenizer(stage.path / "model")
    found = reward_model._find_source(config, PAIRS).read(tokenizer)
    _, held = split(found.items, config.validation_share, 3, "reward_model")
    margins = []
    for item in held:
        scores = [
            model(input_ids=torch.tensor([[*item.prompt, *answer.token_ids]])).logits[0, 0]
            for answer in item.answers
        ]
        margins.append(float((scores[0] - scores[1]).detach()))
    last = read_lines(stage.path / METRICS_FILE)[-1]
    assert last["validation_rewards/margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert last["validation_rewards/accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert stage.manifest.summary["validation_accuracy"] == last["validation_rewards/accuracy"]
    assert [path.name for path in (stage.path / "checkpoints").iterdir()] == ["step-00000002"]


def train_alone(
    job: Any, config: Any, start: Path, directory: Path, board: ProgressBoard
) -> tuple[Draft, list[dict[str, Any]]]:
    """The stage in this process, without Ray."""
    directory.mkdir()
    draft = Draft(directory)
    tokenizer = load_tokenizer(start)
    job.prepare_rows(job._find_source(config, config.data), tokenizer, 3, draft, board)
    more = ()
    if job is preference:
        more = (preference.Reference(directory / "cache"),)
    SupervisedLoop(job.plan(3, config, start, tokenizer, *more, draft)).run()
    assert len(list_checkpoints(directory / CHECKPOINTS)) == config.checkpoints.keep == 1
    return draft, read_lines(directory / METRICS_FILE)


@pytest.mark.parametrize("loss", ["kto", "orpo", "robust"])
def test_policies_of_every_kind(
    loss: Any, start: Path, board: ProgressBoard, tmp_path: Path
) -> None:
    data = write_rows(tmp_path, draw_pairs(40))
    engine = EngineConfig(backend="torch")
    config = PreferenceConfig(
        model=str(start), data=data, loss=loss, engine=engine, **(SMALL | {"steps": 12})
    )
    draft, rows = train_alone(preference, config, start, tmp_path / "out", board)
    assert draft.summary["format"] == "pairs"
    assert draft.summary["rows"] == (76 if loss == "kto" else 38)
    assert rows[-1]["validation_rewards/accuracy"] == 1.0
    assert rows[-1]["validation_loss"] < rows[1]["validation_loss"]
    assert (draft.path / "cache").exists() is (loss != "orpo")
    assert (rows[-1].get("kl", -1.0) >= 0) is (loss == "kto")


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_reward_models_of_every_kind(
    kind: Any, start: Path, board: ProgressBoard, tmp_path: Path
) -> None:
    rows = draw_pairs(40) if kind == "outcome" else draw_steps(40)
    data = write_rows(tmp_path, rows)
    engine = EngineConfig(backend="torch")
    config = RewardModelConfig(
        model=str(start), data=data, kind=kind, engine=engine, **(SMALL | {"steps": 24})
    )
    draft, metrics = train_alone(reward_model, config, start, tmp_path / "out", board)
    assert metrics[-1]["validation_accuracy"] == 1.0
    if kind == "process":
        model = AutoModelForTokenClassification.from_pretrained(draft.path / "model")
        tokenizer = load_tokenizer(start)
        ids = torch.tensor([tokenizer("Add 5.5 + 1\n= 5\n")["input_ids"]])
        logits = model.eval()(input_ids=ids).logits[0]
        places = (ids[0] == tokenizer("\n")["input_ids"][0]).nonzero()[:, 0]
        assert logits[places].argmax(-1).tolist() == [1, 0]


def test_adapters_learn_from_comparisons_too(
    start: Path, board: ProgressBoard, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "model": str(start),
        "data": write_rows(tmp_path, draw_pairs(40)),
        "peft": "lora",
        "engine": EngineConfig(backend="torch"),
        **(SMALL | {"steps": 12, "optimizer": {"lr": 2e-2}}),
    }
    draft, rows = train_alone(
        preference, PreferenceConfig(**given), start, tmp_path / "policy", board
    )
    assert rows[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["validation_rewards/accuracy"] == 1.0
    AutoModelForCausalLM.from_pretrained(draft.path / "model")
    draft, rows = train_alone(
        reward_model, RewardModelConfig(**given), start, tmp_path / "reward", board
    )
    assert rows[-1]["validation_rewards/accuracy"] == 1.0
    assert load_scorer(draft.path / "model").score.weight.shape == (1, 32)


def test_a_comparison_and_what_comes_of_it_stay_on_one_side() -> None:
    nothing = np.zeros(1, np.int32)
    items = [Compared(nothing, (), row=row) for row in range(1, 21) for _ in range(2)]
    train, held = split(items, 0.25, 0, "preference")
    assert len(held) == 10 and len(train) == 30
    assert not {item.row for item in held} & {item.row for item in train}
    assert [item.row for item in split(items, 0.25, 0, "preference")[1]] == [
        item.row for item in held
    ]
    with pytest.raises(UserError, match="one usable row"):
        split(items[:2], 0.5, 0, "preference")


def test_examples_are_shown_with_what_is_scored(
    start: Path, board: ProgressBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path, [*draw_pairs(30), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    given: dict[str, Any] = {"model": str(start), "data": data, "max_length": 96}
    recipe = make_recipe(
        tmp_path / "run",
        preference=PreferenceConfig(**given),
        reward_model=RewardModelConfig(**given),
    )
    preference.show_examples("2", recipe, Run(tmp_path / "run"), board)
    shown = capsys.readouterr().out
    assert "example 2 of 2: row " in shown and "margin 1" in shown
    assert "'<eos>'" in shown or "eos" in shown
    assert "30 rows (pairs)" in shown and "left out: 1 x `chosen` and `rejected`" in shown
    reward_model.show_examples("1", recipe, Run(tmp_path / "run"), board)
    lines = capsys.readouterr().out.splitlines()
    assert sum("  score  " in line for line in lines) == 2
    with pytest.raises(UserError, match="give the number of examples"):
        preference.show_examples("few", recipe, Run(tmp_path / "run"), board)
    write_rows(tmp_path, draw_pairs(1))
    with pytest.raises(UserError, match=r"holds one usable row; validation needs a second one"):
        preference.show_examples("2", recipe, Run(tmp_path / "run"), board)
    assert "example 1 of 1: row 1, " in capsys.readouterr().out


def test_numbers_are_the_authors_unless_given() -> None:
    found = preference.choose_numbers(PreferenceConfig(loss="simpo", beta=4.0))
    assert (found.beta, found.margin) == (4.0, 2.0)
    found = preference.choose_numbers(PreferenceConfig(loss="cdpo", label_smoothing=0.0))
    assert (found.beta, found.label_smoothing) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (PreferenceConfig, {"label_smoothing": 0.1}, "no effect with loss=dpo"),
        (PreferenceConfig, {"loss": "orpo", "reference": "x"}, "no effect with loss=orpo"),
        (PreferenceConfig, {"loss": "kto", "sft_weight": 1.0}, "no effect with loss=kto"),
        (RewardModelConfig, {"kind": "outcome", "centring": 0.1}, "no effect with kind=outcome"),
        (RewardModelConfig, {"step_separator": "x"}, "no effect with kind=pairs"),
    ],
)
def test_keys_without_effect_are_refused(kind: Any, keys: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**keys)


def test_parts_that_do_not_fit_each_other_stop_with_one_line(
    start: Path, board: ProgressBoard, tmp_path: Path
) -> None:
    data = write_rows(tmp_path, draw_pairs(10))
    tokenizer = load_tokenizer(start)
    scorer = build_scorer(start, "score", 0)
    save_model(scorer, scorer.config, tokenizer, tmp_path / "scorer")
    other = tmp_path / "other"
    shutil.copytree(start, other)
    train_bpe(["a b c d e f g h"], 262).save_pretrained(other)
    wide = tmp_path / "wide"
    shutil.copytree(start, wide)
    texts = ["it is a story about two ships and three islands where nobody had been before them"]
    train_bpe(texts, 310).save_pretrained(wide)
    given: dict[str, Any] = {"model": str(start), "data": data, "max_length": 96}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": None}, r"preference\.data is not given; name a file"),
        ({"data": tmp_path / "nothing"}, "no such file or directory"),
        ({"max_length": 512}, r"preference\.max_length=512 exceeds the context of .*128 tokens"),
        ({"model": str(tmp_path / "scorer")}, r"preference\.model=.* is a reward model"),
        ({"model": str(wide)}, "has 310 entries and its model 300"),
        ({"model": str(tmp_path / "gone")}, r"preference\.model=.*no such"),
    ]
    for change, message in cases:
        recipe = make_recipe(tmp_path / "run", preference=PreferenceConfig(**(given | change)))
        with pytest.raises(UserError, match=message) as error:
            preference.show_examples("1", recipe, Run(tmp_path / "run"), board)
        assert "\n" not in str(error.value)
    config = PreferenceConfig(**given, reference=str(other))
    with pytest.raises(UserError, match="another tokenizer than"):
        preference.check_models(config, start, other, tokenizer)


def test_kto_needs_answers_of_both_kinds(start: Path, board: ProgressBoard, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": f" a {n}", "label": n > 8} for n in range(10)]
    config = PreferenceConfig(
        model=str(start), data=write_rows(tmp_path, rows), loss="kto", max_length=96
    )
    directory = tmp_path / "out"
    directory.mkdir()
    draft = Draft(directory)
    source = preference._find_source(config, config.data)  # type: ignore[arg-type]
    preference.prepare_rows(source, load_tokenizer(start), 3, draft, board)
    preference.say_balance(config, draft, board)
    assert (draft.summary["desirable"], draft.summary["undesirable"]) == (1, 8)
    file = directory / ".rows" / "train.values.npy"
    np.save(file, np.zeros_like(np.load(file)))
    with pytest.raises(UserError, match="kto needs both"):
        preference.say_balance(config, draft, board)
    assert ComparedFile(directory / ".rows", "train").answers == 2
