"""Adapters in training: engines and ranks, the supervised loop, reinforcement learning."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

import raylign

sys.path.insert(0, str(Path(__file__).parent))

from learning import LENGTHS, learn, make_learner, make_trajectories
from peft_rank import CASES, train
from test_loop import make_task, shards  # noqa: F401

from raylign.config import AdapterConfig, AlignConfig, EngineConfig, OptimizerConfig, UserError
from raylign.models.assembly import ModelPlan
from raylign.models.loading import load_model, save_model
from raylign.models.logprobs import score_tokens
from raylign.models.quantization import quantize
from raylign.tracking import read_lines
from raylign.training.checkpoints import list_checkpoints
from raylign.training.engine import build_engine
from raylign.training.loop import CHECKPOINTS, SupervisedLoop, SupervisedTask
from raylign.training.policy import Rates
from raylign.training.sampling import COMPARISON_FILE, SAMPLES_FILE, compare_samples

TORCH = EngineConfig(backend="torch")


@pytest.fixture(scope="module")
def group(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found in every case."""
    directory = tmp_path_factory.mktemp("peft_ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (directory / "base").symlink_to(tiny_model)
    environment = os.environ | {
        "PYTHONPATH": str(Path(raylign.__file__).parents[1]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("peft_rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(directory), str(rank), "2", port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    found: dict[str, Any] = torch.load(directory / "results.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one(
    group: dict[str, Any], tiny_model: Path, case: str
) -> None:
    """Float32 to rounding, which Adam's first steps amplify; bfloat16 to its own."""
    found, alone = group[case], train(tiny_model, case.split("-")[0], EngineConfig(backend="torch"))
    rough = "bfloat16" in case
    assert found["losses"] == pytest.approx(alone["losses"], abs=2e-2 if rough else 5e-6)
    assert found["norms"] == pytest.approx(alone["norms"], rel=5e-2 if rough else 2e-5)
    assert found["trained"].keys() == alone["trained"].keys()
    for name, tensor in alone["weights"].items():
        assert torch.allclose(found["weights"][name], tensor, atol=5e-2 if rough else 2e-5), name


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("dora-zero3", "q_proj.base_layer.weight"),  # read by the adapter, to measure its rows
        ("loha-zero3", "gate_proj.hada_w1_a.default"),  # read by no forward of its own
        ("qlora-zero3", "q_proj.base_layer.weight"),
        ("lora-zero3", "embed_tokens.weight"),  # the head, used outside its module
    ],
)
def test_weights_that_others_read_are_shared_out_too(
    group: dict[str, Any], case: str, part: str
) -> None:
    """Or the steps of stage 3 above would show nothing."""
    assert any(name.endswith(part) for name in group[case]["released"])


def test_loraplus_steps_as_pefts_own_optimizer(tiny_model: Path) -> None:
    adapter = AdapterConfig(rank=4, alpha=8, targets=("q_proj", "v_proj"), lr_ratio=8.0)
    lm = ModelPlan(tiny_model, 3, peft="loraplus", adapter=adapter).build()
    theirs = get_peft_model(
        load_model(tiny_model),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    start = {f"base_model.model.{name}": p for name, p in lm.named_parameters()}
    theirs.load_state_dict({k: p.detach().clone() for k, p in start.items()}, strict=False)
    settings = OptimizerConfig(lr=1e-3, weight_decay=0.0, clip=1e9)
    engine = build_engine(TORCH, lm, settings)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, betas=settings.betas, eps=1e-8
    )
    tokens = torch.randint(4, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        engine.backward(engine.module(input_ids=tokens, labels=tokens).loss)
        engine.step(1e-3)
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own = dict(theirs.named_parameters())
    moved = 0.0
    for name, tensor in engine.exportable().items():
        assert torch.allclose(tensor, own[f"base_model.model.{name}"], atol=1e-6), name
        moved = max(moved, float(tensor.abs().max()) if "lora_B" in name else 0.0)
    assert moved == pytest.approx(2 * 8e-3, rel=0.1)  # Adam moves by the learning rate at first


@pytest.fixture(scope="module")
def finetuned(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """A stage of a kind, run once."""
    made: dict[str, tuple[SupervisedTask, dict[str, Any]]] = {}

    def make(kind: Any) -> tuple[SupervisedTask, dict[str, Any]]:
        if kind not in made:
            task = adapt_task(make_task(shards, tiny_model, tmp_path_factory.mktemp(kind)), kind)
            made[kind] = task, SupervisedLoop(task).run()
        return made[kind]

    return make


def adapt_task(task: SupervisedTask, kind: Any) -> SupervisedTask:
    plan = ModelPlan(task.tokenizer, 1, peft=kind)
    return replace(task, model=plan, optimizer=OptimizerConfig(lr=2e-2), steps=18)


@pytest.mark.parametrize("kind", ["qlora", "dora", "prompt"])
def test_a_stage_leaves_adapter_and_model(finetuned: Any, tiny_model: Path, kind: str) -> None:
    task, result = finetuned(kind)
    rows = read_lines(task.output / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    summary = result["adaptation"]
    assert summary["peft"] == kind
    assert summary["trained_parameters"] == sum(summary["trained_by_kind"].values())
    base = load_model(tiny_model)
    if kind == "qlora":
        quantize(base, "nf4")
    adapted = PeftModel.from_pretrained(base, task.output / "adapter").eval()
    tokens = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = adapted(input_ids=tokens).logits[:, -9:]
        assert (task.output / "model").is_dir() == (kind != "prompt")
        place = task.output / ("adapter" if kind == "prompt" else "model")
        assert torch.allclose(load_model(place)(input_ids=tokens).logits, wanted, atol=1e-4)


def test_samples_show_what_it_wrote_before_and_after(finetuned: Any) -> None:
    task, _ = finetuned("dora")
    rows = read_lines(task.output / SAMPLES_FILE)
    assert [row["step"] for row in rows if row["prompt"] == "w1 w2"] == [0, 8, 16, 18]
    [(prompt, before, after), _] = compare_samples(task.output)
    assert (prompt, before, after) == ("w1 w2", rows[0]["text"], rows[-2]["text"])
    assert before != after
    table = (task.output / COMPARISON_FILE).read_text().splitlines()
    assert table[0] == "| prompt | before | after |" and len(table) == 4


@pytest.mark.parametrize("kind", ["qlora", "prompt"])
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_exactly(
    finetuned: Any, tmp_path: Path, kind: str
) -> None:
    task, _ = finetuned(kind)
    again = replace(task, output=tmp_path)
    loop = SupervisedLoop(replace(again, steps=18))
    measure = loop._validation.measure
    loop._validation.measure = _Interrupt(measure, after=2)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop._checkpoints.finish()
    [checkpoint] = list_checkpoints(tmp_path / CHECKPOINTS)
    largest = max(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    assert largest < 3 * 4 * 80_000, "three float32 numbers a trained weight"
    saved = load_file(checkpoint / "hf" / "adapter_model.safetensors")
    SupervisedLoop(again).run()
    ours, theirs = (
        load_file(t.output / "adapter/adapter_model.safetensors") for t in (again, task)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert saved.keys() == theirs.keys()
    assert not all(torch.equal(saved[key], theirs[key]) for key in theirs)


class _Interrupt:
    """Calls on, so many times."""

    def __init__(self, function: Any, after: int) -> None:
        self._function, self._left = function, after

    def __call__(self) -> Any:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return self._function()


@pytest.mark.parametrize("kind", ["lora", "qlora", "dora"])
def test_reinforcement_learning_publishes_folded_weights(tiny_model: Path, kind: Any) -> None:
    learner = make_learner(tiny_model, peft=kind, history=1, sample=len(LENGTHS), kl_coef=0.1)
    engine, lm = learner.engine, learner.engine.lm
    base = {name: p.detach().clone() for name, p in lm.named_parameters() if not p.requires_grad}
    plain = load_model(tiny_model)
    names = [name for name, _ in plain.named_parameters()]
    first = {name: tensor.clone() for name, tensor in engine.weights().items()}
    assert list(first) == names
    trajectories, rates = make_trajectories(tiny_model), Rates(lr=1e-2)
    learned = [learn(learner, trajectories, rates) for _ in range(2)]
    kls = [each.metrics["kl"] for each in learned]
    assert kls[0].total == pytest.approx(0, abs=1e-4), "at first the policy is its reference"
    assert kls[1].mean > 1e-5
    last = engine.weights()
    changed = {n for n in names if not torch.equal(last[n], first[n])}
    assert changed == {n for n in names if n.split(".")[-2].endswith("_proj")}
    frozen = dict(lm.named_parameters())
    assert all(torch.equal(frozen[name], tensor) for name, tensor in base.items())
    # What is published computes what the learner does, now and at the version before.
    if kind != "qlora":  # whose policy never was the model that sampled
        assert learned[1].mismatch_max < 1e-4
    plain.load_state_dict(last, strict=False)
    [scores] = learner.scores.canary([trajectories[0].token_ids.tolist()])
    with torch.no_grad():
        own = score_tokens(plain, torch.tensor([trajectories[0].token_ids.tolist()]))[0][0]
    assert np.allclose(scores, own.numpy(), atol=1e-4)


def test_what_reinforcement_learning_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match="peft"):
        AlignConfig.model_validate({"peft": "prefix"})
    with pytest.raises(ValueError, match=r"adapter\.dropout would train another policy"):
        AlignConfig.model_validate({"peft": "lora", "adapter": {"dropout": 0.1}})


def test_a_score_head_is_trained_and_saved_with_the_adapter(
    tiny_model: Path, tmp_path: Path
) -> None:
    lm = ModelPlan(tiny_model, 2, head="score", peft="lora").build()
    engine = build_engine(TORCH, lm, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    tokens = torch.randint(4, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        engine.backward(engine.module(input_ids=tokens).logits.square().mean())
        engine.step(1e-2)
    assert "score.weight" in engine.exportable() and "score.weight" in engine.weights()
    from raylign.models.adapters import save_adapter
    from raylign.models.heads import build_scorer, load_scorer
    from raylign.models.loading import load_tokenizer
    from raylign.models.merging import merge_adapter

    save_adapter(lm, engine.exportable(), tmp_path / "adapter")
    save_model(engine.weights(), lm.config, load_tokenizer(tiny_model), tmp_path / "model")
    wanted = lm.eval()(input_ids=tokens).logits
    theirs = PeftModel.from_pretrained(build_scorer(tiny_model, "score", 9), tmp_path / "adapter")
    assert torch.allclose(theirs.eval()(input_ids=tokens).logits, wanted, atol=1e-5)
    folded = load_scorer(tmp_path / "model")
    assert torch.allclose(folded(input_ids=tokens).logits, wanted, atol=1e-5)
    merge_adapter(tmp_path / "adapter", tiny_model, tmp_path / "merged", None)
    merged = load_scorer(tmp_path / "merged")
    assert torch.allclose(merged(input_ids=tokens).logits, wanted, atol=1e-5)
    with pytest.raises(UserError, match="adapter of a reward model"):
        load_model(tmp_path / "adapter")
