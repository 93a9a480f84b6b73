"""Adapters folded into their bases as a job."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from jobs import merge
from jobs.entry import model_directory
from jobs.pretrain import show
from raylign.config import MergeConfig, Recipe, UserError
from raylign.models.adapters import save_adapter
from raylign.models.assembly import ModelPlan
from raylign.models.folding import attach_adapter, trained_weights
from raylign.models.loading import load_model, load_tokenizer
from raylign.models.merging import merge_adapter
from raylign.run import Draft, Run
from raylign.tracking import ProgressBoard

TOKENS = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def write_adapter(base: Path, kind: Any, directory: Path, dtype: str = "float32") -> Path:
    """An adapter that changes something."""
    lm = ModelPlan(base, 3, peft=kind, dtype=dtype).build()
    stream = torch.Generator().manual_seed(1)
    weights = {
        name: t + 0.05 * torch.randn(t.shape, generator=stream)
        for name, t in trained_weights(lm).items()
    }
    save_adapter(lm, weights, directory)
    return directory


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Run:
    """A run whose sft stage trained an adapter, in 4 bits."""
    found = Run(tmp_path / "run")
    with found.write("sft", {}, {}) as draft:
        write_adapter(tiny_model, "qlora", draft.path / "adapter")
    return found


@torch.no_grad()
def compute(lm: Any) -> torch.Tensor:
    logits: torch.Tensor = lm(input_ids=TOKENS).logits
    return logits


@pytest.mark.slow
def test_the_stage_is_a_plain_model_with_a_proof(
    ray_cluster: None, tiny_model: Path, run: Run
) -> None:
    board = ProgressBoard(Console(quiet=True))
    merge.run(Recipe(run=run.root, merge=MergeConfig()), run, board)
    stage = run.require("merge", "merge")
    plain = AutoModelForCausalLM.from_pretrained(stage.path / "model").eval()
    wanted = compute(attach_adapter(load_model(tiny_model), run.root / "sft" / "adapter"))
    assert torch.allclose(compute(plain), wanted, atol=1e-5)
    assert float((wanted - compute(load_model(tiny_model))).abs().max()) > 0.1
    summary = stage.manifest.summary
    assert 0 < summary["difference"] < 1e-4
    assert summary["stored_difference"] == summary["difference"]
    assert summary["base"] == str(tiny_model)
    assert set(stage.manifest.parents) == {"adapter", "model"}
    assert load_tokenizer(stage.path / "model").chat_template


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "vera"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merged_weights_are_stored_as_wished(
    tiny_model: Path, tmp_path: Path, kind: str, dtype: str | None
) -> None:
    adapter = write_adapter(tiny_model, kind, tmp_path / "adapter")
    proof = merge_adapter(adapter, tiny_model, tmp_path / "model", dtype)
    assert proof.difference < 1e-5 * max(1.0, proof.largest_logit)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["dtype"]
    assert stored == (dtype or "float32")
    assert (proof.stored_difference > 1e-3) == (dtype == "bfloat16")


def test_a_base_quantised_in_bfloat16_is_dequantised_to_the_same_values(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tiny_model, "qlora", tmp_path / "adapter", "bfloat16")
    assert json.loads((adapter / "quantization.json").read_text()) == {
        "type": "nf4",
        "dtype": "bfloat16",
    }
    proof = merge_adapter(adapter, tiny_model, tmp_path / "model", None)
    assert proof.difference < 1e-5 * max(1.0, proof.largest_logit)


def test_what_cannot_be_merged_is_one_line(tiny_model: Path, run: Run, tmp_path: Path) -> None:
    board = ProgressBoard(Console(quiet=True))

    def refuse(run: Run, **given: Any) -> str:
        with pytest.raises(UserError) as caught:
            merge.run(Recipe(run=run.root, merge=MergeConfig(**given)), run, board)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    prompt = write_adapter(tiny_model, "prompt", tmp_path / "prompt")
    assert "a prompt adapter is not a change of weights" in refuse(run, adapter=prompt)
    assert "holds no adapter: adapter_config.json is missing" in refuse(run, adapter=tiny_model)
    assert "merge.model=gone: no such" in refuse(run, model="gone")
    empty = Run(tmp_path / "empty")
    assert "has no stage with an adapter; train one with peft=lora" in refuse(empty)
    assert model_directory(run.root / "sft") == run.root / "sft" / "adapter"
    form = json.loads((prompt / "adapter_config.json").read_text())
    (prompt / "adapter_config.json").write_text(json.dumps(form | {"peft_type": "IA3"}))
    assert "a ia3 adapter is not a change of weights" in refuse(run, adapter=prompt)


def test_an_adapter_of_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_model, "lora", tmp_path / "adapter")
    other = ModelPlan(tiny_model, 0).build()
    other.config.intermediate_size = 96
    wider = type(other)(other.config)
    with pytest.raises(UserError, match="does not fit its base"):
        attach_adapter(wider, adapter)


def test_an_adapted_stage_says_what_was_trained_and_what_it_writes_now(tmp_path: Path) -> None:
    shown = io.StringIO()
    board = ProgressBoard(Console(file=shown, width=200))
    draft = Draft(tmp_path)
    draft.summary.update(
        parameters=1000, tokens=5, tokens_per_second=1.0, loss=1.0, initial_loss=2.0,
        validation_loss=None, peft="prefix", trained_parameters=20, trained_share=0.02,
        trained_by_kind={"virtual_tokens": 20},
    )  # fmt: skip
    rows = [(0, "a [b]", "old\nline"), (5, "a [b]", "half"), (9, "a [b]", "new")]
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps({"step": s, "prompt": p, "text": t}) + "\n" for s, p, t in rows)
    )
    with board:
        show(draft, board)
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    assert "prefix: 20 parameters trained, 2.00%: virtual_tokens 2.00%" in lines
    assert any("no model/: a prefix adapter cannot be folded" in line for line in lines)
    assert lines[-2:] == ["a [b]", "old line -> new"]
    assert (tmp_path / "samples.md").read_text().endswith("| a [b] | old<br>line | new |\n")
