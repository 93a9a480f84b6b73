"""Rotary frequencies stay in float32, however a model comes to be in bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from raylign.config import AdapterConfig
from raylign.models.adapters import save_adapter
from raylign.models.assembly import ModelPlan
from raylign.models.folding import attach_adapter, trained_weights
from raylign.models.loading import load_model
from raylign.models.merging import merge_adapter
from raylign.models.precision import narrow

PLATFORM = Path(__file__).resolve().parents[2] / "platform"


def list_types(module: nn.Module) -> set[torch.dtype]:
    """Of what is neither trained nor saved."""
    return {b.dtype for b in module.buffers() if b.is_floating_point()}


def save(start: Path, directory: Path, kind: str) -> Path:
    lm = ModelPlan(start, 1, peft=kind, dtype="bfloat16").build()  # type: ignore[arg-type]
    save_adapter(lm, trained_weights(lm), directory)
    return directory


LOADERS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "a model": lambda start, _: load_model(start, "bfloat16"),
    "a folded adapter": lambda start, to: load_model(save(start, to, "lora"), "bfloat16"),
    "an adapter on top": lambda start, to: load_model(save(start, to, "prompt"), "bfloat16"),
    "a quantised base": lambda start, to: attach_adapter(
        load_model(start), save(start, to, "qlora")
    ),
    "qlora": lambda start, _: ModelPlan(start, 1, peft="qlora", dtype="bfloat16").build(),
    "a reward model": lambda start, _: ModelPlan(
        start, 1, head="score", peft="qlora", dtype="bfloat16"
    ).build(),
}


@pytest.mark.parametrize("name", LOADERS)
def test_frequencies_stay_in_float32(tiny_model: Path, tmp_path: Path, name: str) -> None:
    lm = LOADERS[name](tiny_model, tmp_path)
    assert list_types(lm) == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in lm.parameters()}
    expected = load_model(tiny_model).model.rotary_emb.inv_freq
    found = [b for n, b in lm.named_buffers() if n.endswith("rotary_emb.inv_freq")]
    assert found and all(torch.equal(buffer, expected) for buffer in found)


def test_only_weights_are_cast_and_tied_ones_stay_tied(tiny_model: Path) -> None:
    lm = load_model(tiny_model)
    lm.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    lm.lm_head.weight = lm.model.embed_tokens.weight
    narrow(lm, torch.bfloat16)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert list_types(lm) == {torch.float32} and lm.steps.dtype == torch.int64


def test_a_merged_model_is_measured_as_it_will_be_loaded(tiny_model: Path, tmp_path: Path) -> None:
    lm = ModelPlan(tiny_model, 1, peft="lora", adapter=AdapterConfig(rank=2)).build()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
    save_adapter(lm, trained_weights(lm), tmp_path / "adapter")
    proof = merge_adapter(tmp_path / "adapter", tiny_model, tmp_path / "model", "bfloat16")
    tokens = torch.randint(0, 57, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stored = load_model(tmp_path / "model", "bfloat16")(input_ids=tokens).logits.float()
        exact = lm.eval()(input_ids=tokens).logits
    assert proof.stored_difference == float((stored - exact).abs().max()) > 0


def test_reading_an_adapted_model_says_nothing_of_kernels(tiny_model: Path) -> None:
    """A process that has not quantised anything, and imports what could."""
    script = (
        "import sys; from pathlib import Path; from raylign.models.folding import plain_weights; "
        "from raylign.models.loading import load_model; "
        "plain_weights(load_model(Path(sys.argv[1]))); assert 'bitsandbytes' in sys.modules"
    )
    command = [sys.executable, "-c", script, str(tiny_model)]
    environment = os.environ | {"PYTHONPATH": str(PLATFORM)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "gemm" not in found.stderr + found.stdout, found.stderr
