"""Heads that give scores in place of next tokens, as transformers' own classes.

A reward model is an `AutoModelForSequenceClassification` with one label, whose score stands at the
last token that is not padding. A process reward model is an `AutoModelForTokenClassification` with
two, wrong and right, and is read where steps end. Other tools load both as they are.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from raylign.config import UserError
from raylign.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    pad_id,
    take_masks,
)

_FACTORIES = {"score": AutoModelForSequenceClassification, "steps": AutoModelForTokenClassification}
_LABELS = {"score": ("score",), "steps": ("wrong", "right")}


def build_scorer(start: Path, head: str, seed: int) -> PreTrainedModel:
    """The decoder in directory `start` under a head (`score` or `steps`), float32 on the CPU.

    A directory that holds such a model already gives its head too; another one is drawn from
    `seed`, with deviation 1 / sqrt(width + 1) (Stiennon et al., 2020). Raises `UserError` when the
    directory cannot be loaded, or transformers has no such class for its architecture.
    """
    kind = _find_class(load_config(start), head, start)
    if is_scorer(start, head):
        return _load(kind, start)
    lm = load_model(start)
    config = configure_scorer(lm.config, head, pad_id(load_tokenizer(start)))
    config.architectures = [kind.__name__]
    scorer: Any = sketch_scorer(config, head, start)
    setattr(scorer, scorer.base_model_prefix, lm.get_decoder())
    width, labels = config.get_text_config().hidden_size, len(_LABELS[head])
    name = _name_head(scorer)
    linear = nn.Linear(width, labels, bias=getattr(scorer, name).bias is not None)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.normal_(0.0, 1 / math.sqrt(width + 1), generator=stream)
        if linear.bias is not None:
            linear.bias.zero_()
    setattr(scorer, name, linear)
    return scorer


def sketch_scorer(config: PreTrainedConfig, head: str, source: object) -> PreTrainedModel:
    """A model of this configuration and head on torch's meta device; raises `UserError`, which
    names `source`, where transformers has no class for it."""
    kind = _find_class(config, head, source)
    with torch.device("meta"):
        scorer: PreTrainedModel = kind(config)
    return scorer


def load_scorer(path: Path, head: str = "score") -> PreTrainedModel:
    """The reward model in directory `path`; raises `UserError` when it holds none."""
    config = load_config(path)
    if not is_scorer(path, head):
        found = ", ".join(config.architectures or ["nothing"])
        raise UserError(
            f"{path} holds no reward model but {found}; train one with "
            "`python -m jobs.reward_model`"
        )
    return _load(_find_class(config, head, path), path)


def is_scorer(path: Path, head: str) -> bool:
    """Whether directory `path` holds a model with this head."""
    config = load_config(path)
    kind = _FACTORIES[head]._model_mapping.get(type(config), None)
    return kind is not None and kind.__name__ in (config.architectures or ())


def require_language_model(path: Path, key: str) -> None:
    """Raises `UserError`, naming the recipe's `key`, when `path` holds a reward model."""
    if is_scorer(path, "score") or is_scorer(path, "steps"):
        raise UserError(
            f"{key}={path} is a reward model, which says no next tokens; give a language model"
        )


def configure_scorer(config: PreTrainedConfig, head: str, pad: int) -> PreTrainedConfig:
    """The configuration of a language model with this head in place of its own."""
    chosen = copy.deepcopy(config)
    chosen.id2label = dict(enumerate(_LABELS[head]))
    chosen.label2id = {name: index for index, name in enumerate(_LABELS[head])}
    chosen.pad_token_id = pad
    chosen.classifier_dropout = 0.0
    return chosen


def score_states(scorer: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Scores float32 [n] of hidden states [n, width]; of two labels, the log odds of the second."""
    logits = getattr(scorer, _name_head(scorer))(states).float()
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def _name_head(scorer: PreTrainedModel) -> str:
    """What the class calls its last matrix: `score`, or in older families `classifier`."""
    return "score" if hasattr(scorer, "score") else "classifier"


def _find_class(config: PreTrainedConfig, head: str, path: object) -> Any:
    kind = _FACTORIES[head]._model_mapping.get(type(config), None)
    if kind is None:
        raise UserError(
            f"{path}: transformers has no {_FACTORIES[head].__name__} for {config.model_type}; "
            "choose a model of another architecture"
        )
    return kind


def _load(kind: Any, path: Path) -> PreTrainedModel:
    try:
        model, report = kind.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"reward model {path} cannot be loaded: {reason}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"reward model {path} lacks {len(missing)} of its weights, such as {missing[0]}; copy "
            "the complete directory"
        )
    return take_masks(model)
