"""Families that differ from a Llama: windows, logits that are bent, other heads, other matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from raylign.config import AdapterConfig, UserError
from raylign.config.training import PeftKind
from raylign.data.comparisons import Answer, Compared
from raylign.data.packing import attention_mask, positions
from raylign.models.adapters import find_adaptation, save_adapter
from raylign.models.assembly import ModelPlan
from raylign.models.budget import count, count_adapter
from raylign.models.crossentropy import score_targets, sum_costs
from raylign.models.enclosure import embed_context
from raylign.models.folding import attach_adapter, fold_into, plain_weights, trained_weights
from raylign.models.heads import build_scorer, is_scorer, load_scorer, score_states
from raylign.models.loading import initialise, load_model, load_tokenizer, save_model
from raylign.models.quantization import dequantize, is_quantized, quantize
from raylign.models.windows import goes_by_masks, require_separable
from raylign.training.compared_rows import ComparedFile, assemble_compared, write_compared
from raylign.training.comparisons import sum_logprobs
from raylign.training.objectives import embed_batch

VOCABULARY = 57
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MIXED = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 8},
    "mistral": LLAMA | {"sliding_window": 4},
    "phi3": LLAMA | {"sliding_window": 4},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    "gemma2": LLAMA | {"sliding_window": 4, "layer_types": MIXED, "final_logit_softcapping": 2.0},
    "gemma3_text": LLAMA | {"sliding_window": 4, "layer_types": MIXED},
    "gpt_oss": LLAMA
    | {"sliding_window": 4, "layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "granite": LLAMA | {"logits_scaling": 4.0},
}

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def family(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The directory of a tiny model of a family, made once."""
    tokenizer = load_tokenizer(tiny_model)

    def make(kind: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / "families" / kind
        if not directory.exists():
            fields = FAMILIES[kind] | {"vocab_size": VOCABULARY, "initializer_range": 0.3}
            config = AutoConfig.for_model(
                kind, **fields, pad_token_id=0, bos_token_id=None, eos_token_id=1
            )
            # As saved by transformers itself: some families read another config than they write.
            initialise(config, 0).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        return directory

    return make


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "phi3", "qwen2", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_texts_of_a_row_are_as_alone_with_a_window(kind: str, family: Make) -> None:
    lm = load_model(family(kind))
    lengths = (11, 3, 9)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths, 1)])[None]
    tokens = torch.randint(
        4, VOCABULARY, segments.shape, generator=torch.Generator().manual_seed(2)
    )
    mask, places = attention_mask(segments), positions(segments)
    packed = embed_context(lm, tokens, attention_mask=mask, position_ids=places)[0]
    for number, text in enumerate(tokens[0].split(lengths), 1):
        alone = embed_context(lm, text[None])[0]
        assert torch.allclose(packed[segments[0] == number], alone, atol=1e-5)
    wide = lm.get_decoder()(input_ids=tokens, attention_mask=mask, position_ids=places)
    assert not torch.allclose(packed, wide.last_hidden_state[0], atol=1e-2)


def test_layers_that_go_by_no_mask_are_refused(family: Make) -> None:
    lm = load_model(family("qwen2"))
    lm.config.layer_types = ["linear_attention", "full_attention"]
    tokens = torch.ones((1, 4), dtype=torch.int64)
    mask = attention_mask(torch.tensor([[1, 1, 2, 2]]))
    assert not goes_by_masks(lm.config) and goes_by_masks(load_model(family("gemma2")).config)
    with pytest.raises(UserError, match="layers of the kind linear_attention"):
        embed_context(lm, tokens, attention_mask=mask)
    with pytest.raises(UserError, match=r"set sft\.packing to false"):
        require_separable(lm.config, 4, "none", "sft.packing")


def test_a_window_and_virtual_tokens_take_one_text_a_row(family: Make) -> None:
    lm = ModelPlan(family("mistral"), 0, peft="prompt").build()
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]])
    given = {"attention_mask": attention_mask(segments), "position_ids": positions(segments)}
    with pytest.raises(UserError, match="set packing to false"):
        embed_context(lm, segments, **given)


def score_alone(lm: PreTrainedModel, item: Compared, side: int) -> float:
    prompt, answer = item.prompt.tolist(), item.answers[side].token_ids.tolist()
    with torch.no_grad():
        table = torch.log_softmax(lm(input_ids=torch.tensor([prompt + answer])).logits[0], -1)
    return sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "mistral", "gemma3_text"])
def test_a_shared_prompt_fits_where_its_answers_do(kind: str, family: Make, tmp_path: Path) -> None:
    """Positions of padding, too, are within the context; windows reach from answer to prompt."""
    stream = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return stream.integers(4, VOCABULARY, length).astype(np.int32)

    items = [
        Compared(draw(p), tuple(Answer(draw(n), np.ones(n, np.uint8)) for n in sizes), 0.0)
        for p, *sizes in ((30, 30, 20), (40, 2, 2))
    ]
    write_compared(items, tmp_path, "train")
    whole = ComparedFile(tmp_path, "train").read([0, 1])
    batch = assemble_compared(whole, slice(0, 2), "tokens", pad=0, share=True)
    assert batch.attention_mask is not None and batch.position_ids is not None
    assert int(batch.position_ids.max()) == 59
    lm = load_model(family(kind))
    with torch.no_grad():
        found = sum_logprobs(lm, embed_batch(lm, batch), batch)
    expected = [[score_alone(lm, item, side) for side in (0, 1)] for item in items]
    assert np.allclose(found.numpy(), expected, atol=1e-3)


# --- Bent logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("piece", [None, 3])
def test_logits_are_bent_as_the_family_does(kind: str, piece: int | None, family: Make) -> None:
    lm = load_model(family(kind))
    tokens = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    targets = tokens[:, 1:].flatten()
    parameters = list(lm.parameters())
    logits = lm(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    assert not torch.allclose(logits, lm.lm_head(embed_context(lm, tokens))[:, :-1].flatten(0, 1))
    naive = nn.functional.cross_entropy(logits, targets, reduction="sum")
    states = embed_context(lm, tokens)[:, :-1].flatten(0, 1)
    ours = sum_costs(lm, states, targets, piece=piece)
    assert float(ours.detach()) == pytest.approx(float(naive.detach()), rel=1e-5)
    scores, _ = score_targets(lm, states, targets, piece=piece)
    assert float(-scores.sum().detach()) == pytest.approx(float(naive.detach()), rel=1e-5)
    expected = torch.autograd.grad(naive, parameters)
    for one, other in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_what_is_not_known_of_logits_is_refused(family: Make) -> None:
    lm = load_model(family("mistral"))
    lm.config.lm_head_multiplier = 0.5
    with pytest.raises(UserError, match=r"lm_head_multiplier in config\.json"):
        sum_costs(lm, torch.zeros(2, 32), torch.tensor([1, 2]))
    del lm.config.lm_head_multiplier
    lm.config.logits_scaling = 2.0  # a divisor for Granite, a factor elsewhere
    with pytest.raises(UserError, match="logits_scaling"):
        sum_costs(lm, torch.zeros(2, 32), torch.tensor([1, 2]))


# --- Heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["score", "steps"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_heads_by_any_name(head: str, kind: str, family: Make, tmp_path: Path) -> None:
    scorer = build_scorer(family(kind), head, 0).eval()
    tokens = torch.randint(4, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = score_states(scorer, embed_context(scorer, tokens)[0])
        theirs = scorer(input_ids=tokens).logits[0]
    if head == "score":
        assert torch.allclose(found[-1], theirs[0], atol=1e-5)
    else:
        assert torch.allclose(found, theirs[:, 1] - theirs[:, 0], atol=1e-5)
    save_model(scorer, scorer.config, load_tokenizer(family(kind)), tmp_path)
    assert is_scorer(tmp_path, head)
    again = load_scorer(tmp_path, head).eval()
    with torch.no_grad():
        assert torch.allclose(
            score_states(again, embed_context(again, tokens)[0]), found, atol=1e-5
        )


def test_a_scorer_whose_attention_is_written_out_is_read_back(family: Make, tmp_path: Path) -> None:
    scorer = build_scorer(family("gptj"), "score", 0).eval()
    save_model(scorer, scorer.config, load_tokenizer(family("gptj")), tmp_path)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]])
    given = {"attention_mask": attention_mask(segments), "position_ids": positions(segments)}
    with torch.no_grad():
        states = [
            embed_context(s, segments + 4, **given) for s in (scorer, load_scorer(tmp_path).eval())
        ]
    assert torch.allclose(*states, atol=1e-5)


# --- Matrices of GPT-2 ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "qlora"])
def test_transposed_matrices_are_adapted(kind: PeftKind, family: Make, tmp_path: Path) -> None:
    """Trained, counted, saved, read back, and folded into a plain GPT-2."""
    directory = family("gpt2")
    lm = ModelPlan(directory, 3, peft=kind).build().eval()  # a GPT-2 has dropout
    tokens = torch.randint(4, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
    learnt = [p for p in lm.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learnt, lr=2e-2), []
    for _ in range(6):
        loss = lm(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    blueprint = count(load_model(directory).config.to_dict())
    adaptation = find_adaptation(lm)
    assert adaptation is not None
    trained = count_adapter(blueprint, kind, AdapterConfig())
    assert sum(adaptation.trained.values()) == trained == sum(p.numel() for p in learnt)
    quantised = {id(module.weight) for module in lm.modules() if is_quantized(module)}
    assert len(quantised) == (8 if kind == "qlora" else 0)
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits
        save_adapter(lm, trained_weights(lm), tmp_path)
        again = attach_adapter(load_model(directory), tmp_path)
        assert torch.allclose(again(input_ids=tokens).logits, expected, atol=1e-4)
        plain = load_model(directory)
        missing = plain.load_state_dict(plain_weights(lm), strict=False)
        assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
        assert torch.allclose(plain(input_ids=tokens).logits, expected, atol=1e-3)
        folded = fold_into(lm)
        assert torch.allclose(folded(input_ids=tokens).logits, expected, atol=1e-3)
        assert {n: type(m) for n, m in folded.named_modules()} == {
            n: type(m) for n, m in plain.named_modules()
        }


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_transposed_matrices_are_quantised(kind: Any, family: Make) -> None:
    lm = load_model(family("gpt2"))
    tokens = torch.arange(4, 20)[None]
    before = {name: p.clone() for name, p in lm.named_parameters()}
    quantize(lm, kind)
    quantised = lm(input_ids=tokens).logits
    dequantize(lm)
    changed = 0
    for name, parameter in lm.named_parameters():
        error = float((parameter - before[name]).norm() / before[name].norm().clamp(min=1e-9))
        changed += error > 0
        assert error < (0.3 if kind == "nf4" else 0.02)
    assert changed == 8
    assert torch.allclose(lm(input_ids=tokens).logits, quantised, atol=0.1)


def test_kinds_that_do_not_go_with_transposed_matrices_are_refused(family: Make) -> None:
    with pytest.raises(UserError, match="peft has no loha for the matrices of a gpt2"):
        ModelPlan(family("gpt2"), 0, peft="loha").build()
    blueprint = count(load_model(family("gpt2")).config.to_dict())
    with pytest.raises(UserError, match=r"sft\.adapter: peft has no loha"):
        count_adapter(blueprint, "loha", AdapterConfig(), "sft.adapter")
    lm = load_model(family("gpt_oss"))
    for name, module in list(lm.get_decoder().named_modules()):
        if type(module) is nn.Linear:
            place, _, child = name.rpartition(".")
            setattr(lm.get_decoder().get_submodule(place), child, nn.Identity())
    with pytest.raises(UserError, match="no matrices that can be quantised"):
        quantize(lm, "nf4")
