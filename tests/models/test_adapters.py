"""Every kind of adapter: what is trained, saved, switched off and folded, held against peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from raylign.config import AdapterConfig, SftConfig, UserError
from raylign.config.training import ADAPTER_KEYS, PeftKind
from raylign.data.packing import attention_mask, positions
from raylign.models.adapters import (
    CONFIG_FILE,
    FOLDABLE,
    find_adaptation,
    save_adapter,
    without_adapter,
)
from raylign.models.assembly import ModelPlan
from raylign.models.enclosure import embed_context
from raylign.models.folding import (
    attach_adapter,
    fold_into,
    plain_weights,
    rebuild,
    require_plain,
    trained_weights,
)
from raylign.models.loading import load_config, load_model
from raylign.models.logprobs import score_tokens
from raylign.models.quantization import dequantize, quantize

KINDS: tuple[PeftKind, ...] = tuple(kind for kind in get_args(PeftKind) if kind != "none")
VIRTUAL = ("prefix", "prompt")
TOKENS = torch.randint(4, 50, (3, 14), generator=torch.Generator().manual_seed(1))


@dataclass
class Trained:
    """A model after a few steps, and how it came there."""

    lm: PreTrainedModel
    losses: list[float]
    before: dict[str, torch.Tensor]
    logits: torch.Tensor


def train(lm: PreTrainedModel, steps: int = 5, lr: float = 2e-2) -> list[float]:
    lm.train()
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = lm(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    lm.eval()
    return losses


@torch.no_grad()
def compute(lm: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits of the text; peft's prompts leave their own in front."""
    return lm(input_ids=tokens).logits[:, -tokens.shape[1] :]


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> Callable[[PeftKind], Trained]:
    """Every kind, made and trained once."""
    made: dict[str, Trained] = {}

    def make(kind: PeftKind) -> Trained:
        if kind not in made:
            lm = ModelPlan(tiny_model, 3, peft=kind).build()
            before = {name: p.detach().clone() for name, p in lm.named_parameters()}
            losses = train(lm)
            made[kind] = Trained(lm, losses, before, compute(lm))
        return made[kind]

    return make


def quantized(path: Path, kind: PeftKind) -> PreTrainedModel:
    base = load_model(path)
    if kind == "qlora":
        quantize(base, "nf4")
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_the_adapter_alone_changes(
    adapted: Callable[[PeftKind], Trained], kind: PeftKind
) -> None:
    found = adapted(kind)
    assert found.losses[-1] < found.losses[0] - 0.05
    changed = {
        name for name, p in found.lm.named_parameters() if not torch.equal(p, found.before[name])
    }
    assert changed == {name for name, p in found.lm.named_parameters() if p.requires_grad}
    words = ("lora_", "vera_lambda", "hada_", "virtual_tokens")
    assert all(any(word in name for word in words) for name in changed)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_was_saved(
    adapted: Callable[[PeftKind], Trained], tiny_model: Path, tmp_path: Path, kind: PeftKind
) -> None:
    found = adapted(kind)
    save_adapter(found.lm, trained_weights(found.lm), tmp_path)
    theirs = PeftModel.from_pretrained(quantized(tiny_model, kind), tmp_path).eval()
    assert torch.allclose(compute(theirs), found.logits, atol=1e-5)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(
        tiny_model
    )
    ours = attach_adapter(load_model(tiny_model), tmp_path)
    assert torch.allclose(compute(ours), found.logits, atol=1e-5)
    assert torch.allclose(compute(load_model(tmp_path)), found.logits, atol=1e-4)
    assert load_config(tmp_path).hidden_size == 64


@pytest.mark.parametrize("kind", KINDS)
def test_trained_parameters_are_counted_as_peft_does(
    tiny_model: Path, tmp_path: Path, adapted: Callable[[PeftKind], Trained], kind: PeftKind
) -> None:
    found = adapted(kind)
    adaptation = find_adaptation(found.lm)
    assert adaptation is not None
    theirs = get_peft_model(load_model(tiny_model), adaptation.form)
    trained, total = theirs.get_nb_trainable_parameters()
    summary = adaptation.summarise()
    assert summary["trained_parameters"] == trained == sum(summary["trained_by_kind"].values())
    assert summary["trained_share"] == pytest.approx(trained / total)
    kinds = {"virtual_tokens"} if kind in VIRTUAL else {"q_proj", "down_proj"}
    assert kinds <= set(summary["trained_by_kind"])


@pytest.mark.parametrize("kind", FOLDABLE)
def test_folded_weights_compute_what_the_adapted_model_does(
    adapted: Callable[[PeftKind], Trained], tiny_model: Path, tmp_path: Path, kind: PeftKind
) -> None:
    found = adapted(kind)
    weights = plain_weights(found.lm)
    plain = load_model(tiny_model)
    assert list(weights) == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(weights, strict=False)
    assert torch.allclose(compute(plain), found.logits, atol=1e-5)
    save_adapter(found.lm, trained_weights(found.lm), tmp_path)
    folded = fold_into(attach_adapter(load_model(tiny_model), tmp_path))
    assert torch.allclose(compute(folded), found.logits, atol=1e-5)
    assert not [name for name, _ in folded.named_modules() if "lora" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_is_the_base(
    adapted: Callable[[PeftKind], Trained], tiny_model: Path, kind: PeftKind
) -> None:
    lm = adapted(kind).lm
    trained = [p.requires_grad for p in lm.parameters()]
    with without_adapter(lm):
        off = compute(lm)
    assert torch.equal(off, compute(quantized(tiny_model, kind)))
    assert torch.equal(compute(lm), adapted(kind).logits)
    assert [p.requires_grad for p in lm.parameters()] == trained


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_how_it_begins(tiny_model: Path, kind: PeftKind) -> None:
    torch.manual_seed(99)
    first, other = (trained_weights(ModelPlan(tiny_model, s, peft=kind).build()) for s in (5, 6))
    torch.manual_seed(98)
    again = trained_weights(ModelPlan(tiny_model, 5, peft=kind).build())
    assert all(torch.equal(again[name], first[name]) for name in first)
    if kind != "vera":  # what is drawn there is not trained
        assert not all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_documents_of_a_packed_row_see_the_virtual_tokens_and_not_each_other(
    adapted: Callable[[PeftKind], Trained], kind: PeftKind
) -> None:
    lm = adapted(kind).lm
    parts = (TOKENS[0, :5], TOKENS[1, :6])
    segments = torch.tensor([[1] * 5 + [2] * 6 + [0] * 3]).numpy()
    row = torch.cat([*parts, torch.zeros(3, dtype=torch.int64)])[None]
    mask, places = attention_mask(torch.from_numpy(segments)), positions(torch.from_numpy(segments))
    with torch.no_grad():
        packed = embed_context(lm, row, attention_mask=mask, position_ids=places)
        alone = [embed_context(lm, part[None]) for part in parts]
    assert packed.shape == (1, 14, 64)
    assert torch.allclose(packed[:, :5], alone[0], atol=1e-5)
    assert torch.allclose(packed[:, 5:11], alone[1], atol=1e-5)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_decoding_with_a_cache_follows_scoring(
    adapted: Callable[[PeftKind], Trained], tiny_model: Path, tmp_path: Path, kind: PeftKind
) -> None:
    lm = adapted(kind).lm
    prompt = TOKENS[:2, :4]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    mask = torch.ones_like(prompt)
    ours = lm.generate(prompt, attention_mask=mask, **settings)
    step = prompt
    for _ in range(8):
        logits = compute(lm, step)[:, -1]
        logits[:, lm.config.eos_token_id] = -torch.inf
        step = torch.cat([step, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ours, step)
    save_adapter(lm, trained_weights(lm), tmp_path)
    theirs = PeftModel.from_pretrained(load_model(tiny_model), tmp_path).eval()
    assert torch.equal(ours, theirs.generate(input_ids=prompt, attention_mask=mask, **settings))
    with torch.no_grad():
        wanted = torch.log_softmax(compute(lm, ours), -1)[:, :-1].gather(2, ours[:, 1:, None])
        assert torch.allclose(score_tokens(lm, ours)[0][:, 1:], wanted[..., 0], atol=1e-5)
    # What another rank is given to sample from.
    whole = rebuild(lm, plain_weights(lm), trained_weights(lm), lm.device).eval()
    assert torch.allclose(compute(whole), adapted(kind).logits, atol=1e-5)


def test_prompts_begin_as_words(tiny_model: Path) -> None:
    adapter = AdapterConfig(virtual_tokens=3)
    lm = ModelPlan(tiny_model, 3, peft="prompt", adapter=adapter).build()
    words = lm.get_input_embeddings().weight
    [learned] = trained_weights(lm).values()
    assert learned.shape == (3, 64)
    assert all((words == row).all(1).any() for row in learned)
    form = find_adaptation(lm).form  # type: ignore[union-attr]
    assert isinstance(form, PromptTuningConfig) and form.num_virtual_tokens == 3


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_weights_are_a_function_of_the_base(tiny_model: Path, kind: Any) -> None:
    first, again = load_model(tiny_model), load_model(tiny_model)
    quantize(first, kind)
    quantize(again, kind)
    computed = compute(first)
    assert torch.equal(computed, compute(again))
    gap = (computed - compute(load_model(tiny_model))).abs().max()
    assert 1e-4 < gap < 2.0
    dequantize(first)
    weights = {name: p.dtype for name, p in first.named_parameters()}
    assert set(weights.values()) == {torch.float32}
    assert torch.allclose(compute(first), computed, atol=1e-5 if kind != "int8" else 5e-2)


def test_targets_are_families_or_names(tiny_model: Path) -> None:
    def count(targets: Any) -> set[str]:
        plan = ModelPlan(tiny_model, 3, peft="lora", adapter=AdapterConfig(targets=targets))
        return set(find_adaptation(plan.build()).trained)  # type: ignore[union-attr]

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert count("attention") == attention
    assert count("mlp") == {"gate_proj", "up_proj", "down_proj"}
    assert count("all-linear") == count("attention") | count("mlp")
    assert count(("layers.0.self_attn.q_proj",)) == {"q_proj"}
    with pytest.raises(UserError) as caught:
        count(("q_proj", "q_porj"))
    assert str(caught.value) == (
        "adapter.targets: no matrix of this model is called 'q_porj'; it has down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize("key", sorted(ADAPTER_KEYS))
def test_keys_without_effect_are_refused(key: str) -> None:
    assert set(ADAPTER_KEYS) == set(AdapterConfig.model_fields)
    values = {"targets": "mlp", "rs_lora": True, "quantization": "nf4", "dropout": 0.1}
    value = values.get(key, 4)
    for kind in get_args(PeftKind):
        given = {"peft": kind, "adapter": {key: value}}
        if kind in ADAPTER_KEYS[key]:
            assert SftConfig.model_validate(given).peft == kind
        else:
            with pytest.raises(ValueError, match=f"adapter.{key} has no effect with peft={kind}"):
                SftConfig.model_validate(given)


def test_engines_that_cannot_are_refused() -> None:
    for engine, message in (
        ({"tensor_parallel": 2}, "does not work with engine.tensor_parallel"),
        ({"activation_checkpointing": True}, "choose peft=prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            SftConfig.model_validate({"peft": "prefix", "engine": engine})
    for kind, engine in (("lora", {"pipeline_parallel": 2}), ("qlora", {"sequence_parallel": 2})):
        assert SftConfig.model_validate({"peft": kind, "engine": engine}).peft == kind
    with pytest.raises(ValueError, match=r"peft=qlora does not work with engine\.pipeline"):
        SftConfig.model_validate({"peft": "qlora", "engine": {"pipeline_parallel": 2}})


def test_what_cannot_be_is_said_in_one_line(
    adapted: Callable[[PeftKind], Trained], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="needs a model that has learnt something"):
        ModelPlan(load_config(tiny_model), 3, peft="lora").build()
    lm = adapted("prefix").lm
    with pytest.raises(UserError, match="a prefix adapter is text in front"):
        fold_into(lm)
    save_adapter(lm, trained_weights(lm), tmp_path)
    with pytest.raises(UserError, match="a prefix adapter is text in front"):
        ModelPlan(tmp_path, 3).build()  # no stage trains on from virtual tokens
    with pytest.raises(UserError, match="only the transformers backend can serve it"):
        require_plain(tmp_path)
    form = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(form | {"base_model_name_or_path": "gone"}))
    with pytest.raises(UserError, match="was trained on gone, which is not there"):
        load_model(tmp_path)
