"""`--plan`: the arithmetic of a training stage, before anything heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.plan import explain
from raylign.config import Recipe, UserError
from raylign.run import Run

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "ray", "deepspeed", "peft", "pyarrow", "huggingface_hub")

# Runs a job as `python -m` does, and tells what it had imported by the end.
PROBE = """
import runpy, sys
name, *sys.argv = sys.argv[1:]
sys.argv.insert(0, name)
try:
    runpy.run_module(f"jobs.{name}", run_name="__main__")
finally:
    print(sorted(set(%r) & set(sys.modules)), file=sys.stderr)
"""


def plan(stage: str, root: Path = Path("/nowhere"), **sections: object) -> dict[str, str]:
    """The plan's lines by title; lines without one are appended to the one before."""
    recipe = Recipe.model_validate({"run": root, **sections})
    found: dict[str, str] = {}
    last = ""
    for title, text in explain(recipe, Run(recipe.run), stage):
        last = title or last
        found[last] = f"{found[last]}; {text}" if not title else text
    return found


@pytest.mark.parametrize("job", ["pretrain", "sft"])
def test_a_plan_imports_nothing_heavy(job: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"run: {tmp_path}/run\npretrain: {{model: gpt2-125m}}\nsft: {{}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROBE % (HEAVY,), job, str(tmp_path / "r.yaml"), "--plan"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    assert [line.split()[0] for line in done.stdout.splitlines() if line[0] != " "] == [
        "model", "parameters", "FLOPs", "batch", "run",
        *(["Chinchilla"] if job == "pretrain" else []), "memory", "disk", "time",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("pretrain: {model: gpt2-124m}\n")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.pretrain", str(tmp_path / "r.yaml"), "--plan"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: pretrain.model=gpt2-124m: neither a preset, a directory")
    assert done.stderr.count("\n") == 1


def test_the_arithmetic_of_pretraining() -> None:
    found = plan(
        "pretrain",
        prepare={"sequence_length": 1024},
        tokenizer={"vocab_size": 50_304},
        pretrain={
            "model": "gpt2-125m",
            "steps": 5000,
            "batch_size": 480,
            "micro_batch_size": 10,
            "workers": {"count": 8},
        },
    )
    assert found["parameters"].startswith("124,766,976; 86,133,504 outside embedding and head")
    # 6 x 124,766,976 + 12 x 12 x 768 x 1024 = 8.62e8
    assert found["FLOPs"].startswith("862 M a token")
    assert found["batch"] == (
        "491,520 tokens a step = 8 data ranks x 10 rows at once x 6 accumulated x 1,024 tokens"
    )
    assert found["run"] == "5,000 steps x 491,520 = 2.46 G tokens = 2.12 E FLOPs"
    assert "2.5 G tokens, 20 a parameter" in found["Chinchilla"]
    assert "20 a parameter, 98% of it" in found["Chinchilla"]
    assert "vocabulary: tokenizer.vocab_size" in found["model"]
    # 4 bytes of weights and of gradients; 12 of optimizer state over 8 ranks.
    assert (
        "weights 0.5 GiB, gradients 0.5 GiB, optimizer 0.2 GiB (float32, ZeRO-1)"
        in (found["memory"])
    )
    # (3 + 1/4) x 124.8 M x 16 bytes, of which the model is 4
    assert found["disk"].startswith("1.9 GiB a checkpoint, 6.0 GiB for 2, one in the making")


def test_ranks_that_share_a_model_are_taken_out() -> None:
    found = plan(
        "pretrain",
        pretrain={
            "batch_size": 7,
            "micro_batch_size": 2,
            "workers": {"count": 8},
            "engine": {"tensor_parallel": 2, "sequence_parallel": 2},
        },
    )
    assert found["batch"] == (
        "1,792 tokens a step < 2 data ranks x 2 rows at once x 2 accumulated x 256 tokens; "
        "7 rows do not divide evenly: some ranks compute fewer; "
        "2 data ranks = 8 ranks / (2 tensor x 1 pipeline x 2 sequence parallel)"
    )


def test_idle_ranks_are_told() -> None:
    found = plan("pretrain", pretrain={"batch_size": 3, "workers": {"count": 4}})
    assert "1 of 4 data ranks have NOTHING TO DO; raise batch_size" in found["batch"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"workers": {"count": 6}, "engine": {"tensor_parallel": 4}},
            "pretrain.workers.count=6 is no multiple of 4 = 4 tensor x 1 pipeline x 1 sequence",
        ),
        ({"model": {"context": 128}}, "rows of 256 tokens exceed the model's context of 128"),
        (
            {"workers": {"count": 3}, "engine": {"tensor_parallel": 3}},
            "pretrain.engine.tensor_parallel=3 does not divide the model's heads, 4; choose a",
        ),
        (
            {"workers": {"count": 4}, "engine": {"tensor_parallel": 4}},
            "pretrain.engine.tensor_parallel=4 does not divide the model's key/value heads, 2",
        ),
        (
            {"workers": {"count": 8}, "engine": {"tensor_parallel": 2, "sequence_parallel": 4}},
            "pretrain.engine.sequence_parallel=4 does not divide the model's heads of a rank, 2",
        ),
        (
            {"workers": {"count": 8}, "engine": {"pipeline_parallel": 8}},
            "pretrain.engine.pipeline_parallel=8 exceeds the model's 4 layers",
        ),
        ({"peft": "lora", "adapter": {"targets": ["wq"]}}, "pretrain.adapter.targets: a llama has"),
        (
            {"model": {"vocab_size": 800}},
            "the tokenizer has 1,000 entries and the model vocab_size",
        ),
        ({"model": "gpt2"}, "neither a preset, a directory, nor a hub name like org/name"),
        ({"corpus": "/nowhere"}, "pretrain.corpus=/nowhere: holds no readable index.json"),
        ({"tokenizer": "/nowhere"}, "pretrain.tokenizer=/nowhere: holds no tokenizer.json"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan("pretrain", tokenizer={"vocab_size": 1000}, pretrain=keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def write_run(root: Path, parameters: int) -> None:
    """The stages that a plan reads: shards, a tokenizer, a model that was trained."""
    run = Run(root)
    with run.write("tokenizer", {}, {}) as draft:
        draft.summary["vocab_size"] = 70
    with run.write("shards", {}, {}) as draft:
        split = {"rows": 100, "tokens": 6300, "shards": []}
        index = {"sequence_length": 64, "vocab_size": 70, "splits": {"train": split}}
        (draft.path / "index.json").write_text(json.dumps(index))
    with run.write("pretrain", {}, {}) as draft:
        (draft.path / "model").mkdir()
        config = {
            "model_type": "llama",
            "vocab_size": 70,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
        }
        (draft.path / "model" / "config.json").write_text(json.dumps(config))
        lines = [{"step": step, "tokens_per_second": 1000.0 + step} for step in (1, 2, 3)]
        (draft.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        draft.summary["parameters"] = parameters


def test_a_run_that_exists_is_read(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_size": 32}
    write_run(tmp_path, 70 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16)
    keys = {"model": shape, "batch_size": 8, "epochs": 2.5}
    found = plan("pretrain", tmp_path, pretrain=keys)
    assert "vocabulary 70" in found["model"]
    assert found["run"].startswith("32 steps x 512 = 16,384 tokens")  # 2.5 x 100 / 8, rounded up
    assert found["corpus"] == "6,300 tokens in 100 rows: 2.56 epochs"
    assert found["time"] == f"0.3 min at the 1,002 tokens a second that {tmp_path} has measured"
    wider = plan("pretrain", tmp_path, pretrain=keys | {"model": shape | {"ffn_size": 64}})
    assert wider["time"].startswith("known once")
    cut = plan("pretrain", tmp_path, pretrain=keys | {"sequence_length": 32})
    assert cut["run"].startswith("63 steps x 256 = 16,128 tokens")  # the rows are two each
    assert cut["corpus"] == "6,300 tokens in 200 rows: 2.52 epochs"
    with pytest.raises(UserError, match="sequence_length=48 does not divide the shards' rows of"):
        plan("pretrain", tmp_path, pretrain=keys | {"sequence_length": 48})


def test_later_stages_start_where_the_run_will(tmp_path: Path) -> None:
    """From the stage before, the recipe's section for it, or the directory it names."""
    with pytest.raises(UserError, match="no finished 'pretrain' stage"):
        plan("sft", tmp_path, sft={})
    coming = plan("sft", tmp_path, pretrain={"model": "tiny"}, sft={})
    assert coming["model"].startswith("llama (tiny; vocabulary: a guess")
    assert "Chinchilla" not in coming
    write_run(tmp_path, 0)
    found = plan("preference", tmp_path, pretrain={"model": "tiny"}, sft={}, preference={})
    assert "width 16" in found["model"] and str(tmp_path / "pretrain" / "model") in found["model"]
    assert "x 2 sequences x 512 tokens" in found["batch"]
    given = str(tmp_path / "pretrain")
    named = plan("preference", tmp_path, preference={"model": given, "loss": "kto"})
    assert "width 16" in named["model"] and "sequences" not in named["batch"]


def test_a_reward_model_has_a_score_in_place_of_a_vocabulary(tmp_path: Path) -> None:
    write_run(tmp_path, 0)
    keys = {"model": str(tmp_path / "pretrain")}
    policy = plan("sft", tmp_path, sft=keys)
    scored = plan("reward_model", tmp_path, reward_model=keys)

    def count(found: dict[str, str], title: str) -> int:
        return int(found[title].split()[0].rstrip(";").replace(",", ""))

    assert count(policy, "parameters") - count(scored, "parameters") == 70 * 16 - 16
    steps = plan("reward_model", tmp_path, reward_model=keys | {"kind": "process"})
    assert count(policy, "parameters") - count(steps, "parameters") == 70 * 16 - 2 * 17
    adapted = plan("reward_model", tmp_path, reward_model=keys | {"peft": "lora"})
    # Rank 16 on seven matrices, and the head, which is new.
    matrices = 4 * 32 + 3 * 48
    assert count(adapted, "trainable") == 16 * matrices + 16
