"""A learner that goes on from its checkpoint is, to the bit, the one that was never interrupted;
two ranks learn what one does; and what is published is what is there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import raylign

sys.path.insert(0, str(Path(__file__).parent))

from learner_rank import AFTER, BEFORE, CASES
from learning import learn, make_learner, make_trajectories, weights_of

from raylign.models.folding import load_adapted
from raylign.models.loading import load_model
from raylign.tracking import merge

pytestmark = pytest.mark.slow
RESUMED = [name for name, case in CASES.items() if case.resumes]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """What two ranks found in every case."""
    directory = tmp_path_factory.mktemp("learners")
    here = Path(__file__)
    environment = os.environ | {
        "PYTHONPATH": f"{Path(raylign.__file__).parents[1]}{os.pathsep}{here.parent}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = str(here.with_name("learner_rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(directory), str(tiny_model), str(rank), "2", port],
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
    found: dict[str, Any] = torch.load(directory / "results.pt", weights_only=False)
    return found | {"directory": directory}


@pytest.mark.parametrize("name", RESUMED)
def test_going_on_changes_no_bit(group: dict[str, Any], name: str) -> None:
    found = group[name]
    assert (found["version"], found["progress"]) == (BEFORE, {"note": "half way"})
    assert found["whole"].keys() == found["resumed"].keys()
    assert ("critic" in found["whole"]) == (CASES[name].algorithm == "ppo")
    for part, weights in found["whole"].items():
        assert all(torch.equal(found["resumed"][part][n], t) for n, t in weights.items()), part
    assert [event["what"] for event in found["events"]] == ["checkpoint"]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_does(group: dict[str, Any], tiny_model: Path, name: str) -> None:
    case, found = CASES[name], group[name]
    learner = make_learner(tiny_model, case.algorithm, peft=case.peft, sample=3)
    trajectories = make_trajectories(tiny_model)
    for _ in range(BEFORE + AFTER):
        alone = learn(
            learner, trajectories, passes=case.passes, minibatches=case.minibatches
        )  # fmt: skip
    theirs = found["whole"]["policy"]
    gaps = torch.cat([(theirs[n] - t).abs().flatten() for n, t in weights_of(learner).items()])
    assert float(gaps.mean()) < 2e-6 and float(gaps.max()) < 2e-3
    metrics = merge(found["metrics"])
    assert metrics.keys() == alone.metrics.keys()
    for metric in ("loss", "kl", "entropy", "grad_norm"):
        if metric in metrics:
            expected = alone.metrics[metric].mean
            assert metrics[metric].mean == pytest.approx(expected, rel=2e-2, abs=2e-4), metric
    advantages = found["advantages"][0] | found["advantages"][1]
    assert advantages == pytest.approx(alone.advantages, abs=5e-3)


@pytest.mark.parametrize("name", CASES)
def test_what_is_streamed_is_what_is_there(group: dict[str, Any], name: str) -> None:
    found = group[name]
    weights = found["whole"]["policy"]
    assert list(found["streamed"]) == list(weights)
    assert all(torch.equal(found["streamed"][n], t) for n, t in weights.items())
    largest = max(t.nbytes for t in weights.values())
    assert len(found["buckets"]) > 5 and max(found["buckets"]) <= max(20_000, 2 * largest)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.peft != "none"])
def test_an_adapter_alone_has_peft_s_names_and_makes_the_policy(
    group: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    adapter, whole = group[name]["adapter"], group[name]["whole"]["policy"]
    assert sum(t.numel() for t in adapter.values()) < 0.5 * sum(t.numel() for t in whole.values())
    form = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    wrapped = get_peft_model(load_model(tiny_model), form)
    result = set_peft_model_state_dict(wrapped, adapter)
    assert not result.unexpected_keys
    plain = wrapped.merge_and_unload()
    for key, tensor in plain.named_parameters():
        torch.testing.assert_close(tensor.detach(), whole[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["torch-ppo", "zero3-ppo", "zero1-lora"])
def test_a_checkpoint_holds_what_other_tools_load(
    group: dict[str, Any], tiny_model: Path, name: str
) -> None:
    """The policy as it was when it was saved, which is neither the first nor the last."""
    [checkpoint] = (group["directory"] / name).glob("step-*")
    assert checkpoint.name == f"step-{BEFORE:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["progress"] == {"note": "half way"} and manifest["ranks"] == 2
    if CASES[name].peft == "none":
        saved = load_model(checkpoint / "hf")
    else:
        form = checkpoint / "hf" / "adapter_config.json"
        assert json.loads(form.read_text())["base_model_name_or_path"] == str(tiny_model)
        saved = load_adapted(checkpoint / "hf", load_model)
    start, final = load_model(tiny_model), group[name]["whole"]["policy"]
    last = dict(start.named_parameters())
    moved = sum(float((p - last[n]).detach().abs().sum()) for n, p in saved.named_parameters())
    left = sum(float((p - final[n]).detach().abs().sum()) for n, p in saved.named_parameters())
    assert moved > 0.1 and left > 0.1


def test_a_checkpoint_of_another_learner_is_refused(group: dict[str, Any]) -> None:
    assert "step-00000002 is a checkpoint of another case (ppo, not grpo)" in group["refusal"]
