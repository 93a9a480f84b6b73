"""Models and tokenizers in and out of plain Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from raylign.config import UserError
from raylign.models.folding import is_adapter, load_adapted, locate_base
from raylign.models.precision import narrow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def initialise(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A freshly initialised float32 model, the same to the bit for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return take_masks(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def load_model(path: Path, dtype: str = "float32") -> PreTrainedModel:
    """The causal language model in directory `path`, on the CPU.

    Of an adapter in PEFT's form, the model it adapts with the adapter folded in, or, where that
    cannot be (prefix, prompt), at work on top. Raises `UserError` when the directory, its
    configuration or its weights are missing or do not fit each other.
    """
    path = Path(path)
    if _is_adapter_alone(path):
        adapted = load_adapted(path, partial(load_model, dtype=dtype))
        narrow(adapted, DTYPES[dtype])
        return adapted
    _require(path, "config.json", "a model")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model {path} has no *.safetensors weights; save it in safetensors format")
    disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {path} cannot be loaded: {_first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model {path} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "copy the complete directory"
        )
    return take_masks(model)


def load_config(path: Path) -> PreTrainedConfig:
    """The configuration in directory `path`, or of the model that the adapter there adapts; raises
    `UserError` when there is none."""
    if _is_adapter_alone(Path(path)):
        return load_config(locate_base(Path(path)))
    _require(Path(path), "config.json", "a model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model {path} cannot be loaded: {_first_line(error)}") from None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in directory `path`; raises `UserError` when there is none, or no `<eos>`."""
    path = Path(path)
    _require(path, "tokenizer_config.json", "a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer {path} cannot be loaded: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path} has no eos_token; set one in tokenizer_config.json")
    return tokenizer


def require_chat_template(tokenizer: PreTrainedTokenizerBase, path: Path | str) -> None:
    """Raises `UserError` unless the tokenizer, found at `path`, has a chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {path} has no chat template; add chat_template.jinja to it, "
            "or train one with `python -m jobs.tokenizer`"
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or `<eos>` where a tokenizer has none (padding is never attended to)."""
    chosen = tokenizer.pad_token_id
    return tokenizer.eos_token_id if chosen is None else chosen


def list_stops(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens after which a text is over: the tokenizer's `<eos>`, and those of the model."""
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *_list_own_stops(config))))


def add_stops(config: PreTrainedConfig, stops: Sequence[int]) -> None:
    """Let texts end with `stops`, too, for every tool that reads the model's configuration."""
    every = list(dict.fromkeys((*_list_own_stops(config), *stops)))
    if len(every) > 1:
        config.eos_token_id = every
    elif every:
        config.eos_token_id = every[0]


def _list_own_stops(config: PreTrainedConfig) -> tuple[int, ...]:
    own = config.eos_token_id
    return () if own is None else (own,) if isinstance(own, int) else tuple(own)


def save_model(
    weights: torch.nn.Module | Mapping[str, torch.Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer: a directory any tool can load.

    Tied weights are stored once, under the name of the embedding.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(weights, torch.nn.Module):
        weights = dict(weights.named_parameters())
    tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    dtype = next(iter(tensors.values())).dtype
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = config.to_dict() | {"use_cache": True, "dtype": str(dtype).removeprefix("torch.")}
    saved = type(config).from_dict(fields)
    saved.save_pretrained(directory)
    GenerationConfig.from_model_config(saved).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def take_masks(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself, which takes masks of True and False: attention that is written out adds its
    mask to the scores, and would take True for 1."""
    if model.config._attn_implementation == "eager":
        model.get_decoder().register_forward_pre_hook(_make_addend, with_kwargs=True)
    return model


def _make_addend(
    decoder: PreTrainedModel, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = inputs.get("attention_mask")

    def add(mask: Any) -> Any:
        if mask is None or mask.dtype != torch.bool or mask.ndim != 4:
            return mask
        addend = torch.zeros_like(mask, dtype=decoder.dtype)
        return addend.masked_fill_(~mask, torch.finfo(decoder.dtype).min)

    if isinstance(mask, dict):  # of each kind of layer
        return args, inputs | {"attention_mask": {kind: add(one) for kind, one in mask.items()}}
    return args, inputs if mask is None else inputs | {"attention_mask": add(mask)}


def _is_adapter_alone(path: Path) -> bool:
    return is_adapter(path) and not (path / "config.json").is_file()


def _require(path: Path, name: str, what: str) -> None:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a directory that holds {what}")
    if not (path / name).is_file():
        raise UserError(f"{path} holds no {what.removeprefix('a ')}: {name} is missing")
    try:
        json.loads((path / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / name} is not valid JSON: {error}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
