"""Small adapters in place of all weights, by peft: applied, counted, switched off, saved.

The transformers model stays what is called; peft's layers sit inside it. What is trained is the
adapter, and a score head where there is one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raylign.config import AdapterConfig, UserError
from raylign.config.training import PeftKind
from raylign.models.budget import FOLDABLE
from raylign.models.fingerprint import fingerprint_weights
from raylign.models.prompts import NAME, VirtualTokens
from raylign.models.quantization import count_weights, quantize, quieten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
QUANTIZATION_FILE = "quantization.json"
"""Beside them for qlora: how the base was quantised, which peft's form has no word for."""

_RANKS = {"vera": 64, "loha": 8}
_RANK, _LR_RATIO, _VIRTUAL_TOKENS = 16, 16.0, 16


@dataclass(slots=True)
class Adaptation:
    """What was done to a model; kept as its attribute `adaptation`."""

    kind: PeftKind
    base: str
    """Where the weights below it come from: a directory or a hub name."""
    form: Any
    """peft's configuration."""
    tuner: Any
    """peft's wrapper around the model; None for virtual tokens."""
    head: tuple[str, ...]
    """Parameters outside the language model that are trained as well."""
    quantization: dict[str, str] | None
    trained: dict[str, int]
    """Trained parameters by kind of module."""
    parameters: int
    """All of them, the adapter's included."""
    fingerprint: str
    """Of the base's weights, before they were quantised."""

    @property
    def foldable(self) -> bool:
        """Whether it can be folded into the base."""
        return self.kind in FOLDABLE

    def summarise(self) -> dict[str, Any]:
        """What a stage's summary says of it."""
        count = sum(self.trained.values())
        return {
            "peft": self.kind,
            "trained_parameters": count,
            "trained_share": count / self.parameters,
            "trained_by_kind": self.trained,
        }


def find_adaptation(lm: nn.Module) -> Adaptation | None:
    """What was adapted in `lm`, or None."""
    return getattr(lm, "adaptation", None)


def adapt(
    lm: PreTrainedModel, kind: PeftKind, config: AdapterConfig, seed: int, base: str
) -> PreTrainedModel:
    """`lm` itself, with an adapter that `seed` initialises; nothing else requires a gradient, but
    for parameters outside decoder and language head.

    Of most kinds the model computes at first what it did before; prefix, prompt and qlora change it
    from the start. Raises `UserError` for targets that the model does not have.
    """
    decoder = {id(p) for p in lm.get_decoder().parameters()}
    language = lm.get_output_embeddings()
    known = decoder | {id(p) for p in language.parameters()} if language is not None else decoder
    head = tuple(name for name, p in lm.named_parameters() if id(p) not in known)
    lm.requires_grad_(False)
    fingerprint = fingerprint_weights((n, p) for n, p in lm.named_parameters() if n not in head)
    quieten()
    quantization = None
    if kind == "qlora":
        quantization = {
            "type": config.quantization or "nf4",
            "dtype": str(lm.dtype).removeprefix("torch."),
        }
        quantize(lm, config.quantization or "nf4")
    form, tuner = _install(lm, kind, config, seed)
    for name, parameter in lm.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
        if kind == "loraplus" and ".lora_B." in name:
            parameter.lr_scale = config.lr_ratio or _LR_RATIO
    trained = Counter[str]()
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            trained[name_kind(name)] += parameter.numel()
    lm.adaptation = Adaptation(
        kind=kind,
        base=base,
        form=form,
        tuner=tuner,
        head=head,
        quantization=quantization,
        trained=dict(sorted(trained.items())),
        parameters=sum(count_weights(p) for p in lm.parameters()),
        fingerprint=fingerprint,
    )
    return lm


def name_kind(parameter: str) -> str:
    """What kind of module a trained parameter belongs to: the adapted matrix, as `q_proj`, or its
    own module."""
    parts = parameter.split(".")
    for place, part in enumerate(parts):
        if part.startswith(("lora_", "vera_", "hada_")):
            return parts[place - 1]
    return parts[-2] if parts[0] != NAME else NAME


def find_tuner() -> Any:
    """The class of peft's adapted matrices."""
    quieten()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


@contextmanager
def without_adapter(lm: nn.Module) -> Iterator[None]:
    """Inside, `lm` computes what it did before it was adapted."""
    tuner = find_tuner()
    layers = [module for module in lm.modules() if isinstance(module, tuner)]
    tokens = [module for module in lm.modules() if isinstance(module, VirtualTokens)]
    # peft's own switch also changes which parameters require a gradient, which wrappers rely on.
    for layer in layers:
        layer._disable_adapters = True
    for module in tokens:
        module.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for module in tokens:
            module.enabled = True


def save_adapter(lm: PreTrainedModel, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as peft loads them.

    weights: at least the trained ones, whole, by name in `lm`, which itself may be partitioned and
    is not changed.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adaptation = find_adaptation(lm)
    assert adaptation is not None
    directory.mkdir(parents=True, exist_ok=True)
    if adaptation.tuner is None:
        saved = {"prompt_embeddings": weights[f"{NAME}.embedding.weight"]}
    else:
        tuner = adaptation.tuner
        state = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        # vera's projections are drawn, not trained, and belong to the adapter all the same.
        for name, tensor in tuner.named_buffers(remove_duplicate=False):
            if name.startswith("base_model.vera_"):
                state[name] = tensor
        saved = get_peft_model_state_dict(tuner, state_dict=state)
    for name in adaptation.head:
        saved[f"base_model.model.{name}"] = weights[name]
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in saved.items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_form(lm, adaptation, directory)


def _write_form(lm: PreTrainedModel, adaptation: Adaptation, directory: Path) -> None:
    form = adaptation.form
    fields = form.to_dict() | {
        "base_model_name_or_path": adaptation.base,
        "inference_mode": True,
        "task_type": _find_task(lm),
    }
    if adaptation.head:
        fields["modules_to_save"] = sorted({name.split(".")[0] for name in adaptation.head})
    text = json.dumps(fields, indent=2, sort_keys=True, default=_write_set)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if adaptation.quantization is not None:
        text = json.dumps(adaptation.quantization) + "\n"
        (directory / QUANTIZATION_FILE).write_text(text, encoding="utf-8")


def _find_task(lm: PreTrainedModel) -> str:
    name = type(lm).__name__
    for ending, task in (
        ("SequenceClassification", "SEQ_CLS"),
        ("TokenClassification", "TOKEN_CLS"),
    ):
        if name.endswith(ending):
            return task
    return "CAUSAL_LM"


def _write_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _install(
    lm: PreTrainedModel, kind: PeftKind, config: AdapterConfig, seed: int
) -> tuple[Any, Any]:
    """peft's configuration and wrapper, the layers being in place."""
    if kind not in ("prefix", "prompt"):
        from peft import get_peft_model

        form = configure(lm, kind, config, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return form, get_peft_model(lm, form)
    count = config.virtual_tokens or _VIRTUAL_TOKENS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = VirtualTokens(lm, kind, count)
    tokens.attach(lm)
    from peft import PrefixTuningConfig, PromptTuningConfig

    form = (PrefixTuningConfig if kind == "prefix" else PromptTuningConfig)(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        num_layers=tokens.layers,
        num_attention_heads=tokens.heads,
        token_dim=tokens.heads * tokens.width,
        num_transformer_submodules=1,
    )
    return form, None


def configure(lm: PreTrainedModel, kind: PeftKind, config: AdapterConfig, seed: int) -> Any:
    """peft's configuration of a kind that adapts matrices."""
    quieten()
    from peft import LoHaConfig, LoraConfig, VeraConfig

    kinds = (nn.Linear,) if kind == "loha" else (nn.Linear, Conv1D)
    found = {type(module) for module in lm.get_decoder().modules()}
    if not any(issubclass(each, kinds) for each in found):
        raise UserError(
            f"peft={kind}: peft has no {kind} for the matrices of a {lm.config.model_type}; use "
            "lora or dora"
        )
    targets = choose_targets(lm, config.targets, kinds)
    rank = config.rank or _RANKS.get(kind, _RANK)
    alpha = 2.0 * rank if config.alpha is None else config.alpha
    if kind == "vera":
        return VeraConfig(
            r=rank,
            target_modules=targets,
            fan_in_fan_out=Conv1D in found,
            vera_dropout=config.dropout,
            projection_prng_key=seed % 2**31,
        )
    if kind == "loha":
        return LoHaConfig(r=rank, alpha=alpha, target_modules=targets)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=Conv1D in found,
        use_rslora=config.rs_lora,
        use_dora=kind == "dora",
    )


def outline_adapter(shape: PreTrainedConfig, config: AdapterConfig) -> tuple[int, tuple[str, ...]]:
    """Rank and targets that a LoRA adapter of a model of this shape will have."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(shape)
    targets = choose_targets(lm, config.targets, (nn.Linear, Conv1D))
    return config.rank or _RANK, tuple(targets)


def choose_targets(
    lm: PreTrainedModel, targets: tuple[str, ...] | str, kinds: tuple[type[nn.Module], ...]
) -> list[str]:
    """Names, or endings of names, of the matrices to adapt, as peft reads them.

    Raises `UserError` for a name that no matrix of the decoder has.
    """
    tuner = find_tuner()
    names = [
        name
        for name, module in lm.get_decoder().named_modules()
        if isinstance(module, kinds) and not isinstance(module, tuner)
    ]
    families = {
        "all-linear": names,
        "attention": [name for name in names if "attn" in name or "attention" in name],
        "mlp": [name for name in names if "mlp" in name or "ffn" in name or "feed_forward" in name],
    }
    if isinstance(targets, str):
        chosen = families[targets]
        if not chosen:
            raise UserError(f"adapter.targets={targets}: {_list(names)}; name some of them")
        return _shorten(chosen, names)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"adapter.targets: no matrix of this model is called {target!r}; {_list(names)}"
            )
    if not targets:
        raise UserError(f"adapter.targets is empty; {_list(names)}")
    return list(targets)


def _shorten(chosen: list[str], names: list[str]) -> list[str]:
    """The fewest last parts of each chosen name that say which are chosen."""
    excluded = set(names) - set(chosen)
    found = set()
    for name in chosen:
        parts = name.split(".")
        for size in range(1, len(parts) + 1):
            ending = ".".join(parts[-size:])
            if not any(other == ending or other.endswith(f".{ending}") for other in excluded):
                found.add(ending)
                break
    return sorted(found)


def _list(names: list[str]) -> str:
    return f"it has {', '.join(sorted({name.rpartition('.')[2] for name in names}))}"
