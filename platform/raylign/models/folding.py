"""Adapters folded into the weights they adapt, and adapters read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from raylign.config import UserError
from raylign.models.adapters import (
    CONFIG_FILE,
    QUANTIZATION_FILE,
    WEIGHTS_FILE,
    find_tuner,
)
from raylign.models.hub import locate_model
from raylign.models.precision import narrow
from raylign.models.prompts import NAME, VirtualTokens
from raylign.models.quantization import (
    build_plain,
    dequantize,
    is_quantized,
    is_transposed,
    orient,
    quantize,
    quieten,
    read_weight,
)

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes partitioned parameters whole inside a block."""


def plain_weights(
    lm: PreTrainedModel, gather: Gather | None = None, keep: bool = True
) -> dict[str, torch.Tensor]:
    """All weights as a plain model has them: adapters folded in, quantised ones dequantised, tied
    ones once, virtual tokens left out. What nothing was done to shares memory with `lm`; what had
    to be gathered is put on the CPU, one tensor at a time, and without `keep` nowhere."""
    dtype = lm.get_input_embeddings().weight.dtype
    return _collect(((name, t.to(dtype)) for name, t in _walk(lm, "", gather, set())), gather, keep)


def trained_weights(
    lm: PreTrainedModel, gather: Gather | None = None, keep: bool = True
) -> dict[str, torch.Tensor]:
    """The parameters that are trained, whole, by their name in `lm`; memory as of
    `plain_weights`."""
    trained = ((name, p) for name, p in lm.named_parameters() if p.requires_grad)
    return _collect(((name, _read(p, gather)) for name, p in trained), gather, keep)


def _collect(
    tensors: Iterable[tuple[str, torch.Tensor]], gather: Gather | None, keep: bool
) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors:  # all of them, also where none is kept: others wait for this rank
        if gather is None:
            found[name] = tensor
        elif keep:
            found[name] = tensor.cpu()
    return found


def _walk(
    module: nn.Module, prefix: str, gather: Gather | None, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(module, find_tuner()) or is_quantized(module):
        parameters = list(module.parameters())
        with nullcontext() if gather is None else gather(parameters):
            weight, bias = fold(module)
            if gather is not None:
                weight, bias = weight.clone(), None if bias is None else bias.clone()
        yield f"{prefix}weight", weight
        if bias is not None:
            yield f"{prefix}bias", bias
        return
    if isinstance(module, VirtualTokens):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield f"{prefix}{name}", _read(parameter, gather)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", gather, seen)


def _read(parameter: nn.Parameter, gather: Gather | None) -> torch.Tensor:
    if gather is None:
        return parameter.detach()
    with gather([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def fold(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the plain matrix that computes what an adapted one does, without dropout,
    the weight as the plain module has it.

    float32 where base or adapter are. DoRA: every row of W + delta is scaled to its learned length
    (Liu et al., 2024, equation 5).
    """
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight, bias = read_weight(base), base.bias
    if base is not module:
        name = module.active_adapters[0]
        weight = weight + module.get_delta_weight(name)
        if name in getattr(module, "lora_magnitude_vector", {}):
            outputs = 1 if is_transposed(base) and not is_quantized(base) else 0
            lengths = torch.linalg.norm(weight, dim=1 - outputs, keepdim=True)
            learned = module.lora_magnitude_vector[name].weight
            weight = weight * (learned.unsqueeze(1 - outputs) / lengths)
    if is_quantized(base):
        weight = orient(base, weight)
    return weight, None if bias is None else bias.detach()


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter in peft's form."""
    return (path / CONFIG_FILE).is_file()


def require_plain(path: Path) -> None:
    """Raises `UserError` for a directory that holds an adapter in place of a model."""
    if is_adapter(path) and not (path / "config.json").is_file():
        kind = read_form(path)["peft_type"].partition("_")[0].lower()
        remedy = (
            "only the transformers backend can serve it"
            if kind in ("prefix", "prompt")
            else "fold it into its base with `python -m jobs.merge`"
        )
        raise UserError(f"{path} holds a {kind} adapter, not a model; {remedy}")


def locate_base(path: Path, base: str | None = None, key: str = "merge.model") -> Path:
    """Where the model is that the adapter in `path` was trained on, or `base` where it is given.

    Raises `UserError` when it is not where the adapter says.
    """
    named = base or read_form(path).get("base_model_name_or_path")
    if not named:
        raise UserError(f"adapter {path} does not say which model it adapts; name it in {key}")
    try:
        return locate_model(str(named), key)
    except UserError as error:
        if base is not None:
            raise
        raise UserError(
            f"adapter {path} was trained on {named}, which is not there ({error}); say where it is "
            f"in base_model_name_or_path of its {CONFIG_FILE}, or in {key}"
        ) from None


def read_form(path: Path) -> dict[str, Any]:
    """The adapter's configuration; raises `UserError` when there is none, or it is damaged."""
    try:
        form: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no adapter: {CONFIG_FILE} is missing") from None
    except ValueError as error:
        raise UserError(f"{path / CONFIG_FILE} is not valid JSON: {error}") from None
    if not (path / WEIGHTS_FILE).is_file():
        raise UserError(f"adapter {path} has no {WEIGHTS_FILE}; save it in safetensors format")
    return form


def read_quantization(path: Path) -> dict[str, str] | None:
    """How the base of the adapter in `path` was quantised while it was trained."""
    file = path / QUANTIZATION_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def attach_adapter(lm: PreTrainedModel, path: Path) -> PreTrainedModel:
    """`lm`, the base, with the adapter in `path` on top: the model that was trained, frozen.

    A base that was quantised for training is quantised again. Raises `UserError` when the adapter
    does not fit.
    """
    form = read_form(path)
    quieten()
    quantization = read_quantization(path)
    if quantization is not None:
        narrow(lm, getattr(torch, quantization["dtype"]))
        quantize(lm, quantization["type"])  # type: ignore[arg-type]
    if form["peft_type"] in ("PREFIX_TUNING", "PROMPT_TUNING"):
        return _attach_tokens(lm, path, form)
    from peft import PeftModel

    try:
        tuner = PeftModel.from_pretrained(lm, str(path), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"adapter {path} does not fit its base: {reason}") from None
    assert tuner.get_base_model() is lm
    for name in form.get("modules_to_save") or ():
        setattr(lm, name, getattr(lm, name).modules_to_save["default"])  # a trained head
    return lm.requires_grad_(False).eval()


def fold_into(lm: PreTrainedModel) -> PreTrainedModel:
    """`lm` itself, every adapted or quantised matrix replaced by a plain one. Raises `UserError`
    for virtual tokens."""
    require_foldable(lm)
    tuner = find_tuner()
    for name, module in list(lm.named_modules()):
        if isinstance(module, tuner):
            weight, bias = fold(module)
            base = module.get_base_layer()
            if is_quantized(base):
                base = build_plain(base, weight, bias)
            base.weight = nn.Parameter(weight)
            place, _, child = name.rpartition(".")
            setattr(lm.get_submodule(place), child, base)
    dequantize(lm)
    for mark in ("peft_config", "adaptation"):
        lm.__dict__.pop(mark, None)
    return lm


def require_foldable(lm: nn.Module) -> None:
    """Raises `UserError` for a model with virtual tokens."""
    tokens = getattr(lm, NAME, None)
    if isinstance(tokens, VirtualTokens):
        raise UserError(
            f"a {tokens.kind} adapter is text in front, not a change of weights, and cannot be "
            "folded into a model; use its directory, adapter/, with transformers and peft"
        )


def load_adapted(path: Path, load: Callable[[Path], PreTrainedModel]) -> PreTrainedModel:
    """The base that the adapter in `path` names, read by `load`, with the adapter folded in; or,
    where that cannot be, on top."""
    task = read_form(path).get("task_type")
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        raise UserError(f"{path} is the adapter of a reward model; give its stage's model/ instead")
    lm = attach_adapter(load(locate_base(path)), path)
    return lm if hasattr(lm, NAME) else fold_into(lm)


def rebuild(
    lm: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    device: torch.device,
) -> PreTrainedModel:
    """A whole model that computes what `lm`, of which every rank holds a part, does; of
    `plain_weights` and, where there are virtual tokens, `trained_weights`. It is made of their
    memory, and on `device` where that has room."""
    with no_init_weights():  # memory that is never touched, and buffers as they should be
        whole: PreTrainedModel = type(lm)._from_config(lm.config)
    whole.load_state_dict(dict(weights), strict=False, assign=True)
    whole.tie_weights()
    tokens = getattr(lm, NAME, None)
    if isinstance(tokens, VirtualTokens):
        copy = VirtualTokens(whole, tokens.kind, tokens.count)
        copy.embedding.load_state_dict({"weight": trained[f"{NAME}.embedding.weight"]})
        copy.attach(whole)
    return whole.to(device) if _fits(whole, device) else whole


def _fits(lm: PreTrainedModel, device: torch.device) -> bool:
    """Whether `device` has room for `lm`, and half as much for its use: one of a model that is
    shared out may have none."""
    if device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in lm.parameters())
    return torch.cuda.mem_get_info(device)[0] > 1.5 * size


def _attach_tokens(lm: PreTrainedModel, path: Path, form: dict[str, Any]) -> PreTrainedModel:
    from safetensors.torch import load_file

    kind = "prefix" if form["peft_type"] == "PREFIX_TUNING" else "prompt"
    learned = load_file(path / WEIGHTS_FILE).get("prompt_embeddings")
    tokens = VirtualTokens(lm, kind, form["num_virtual_tokens"])  # type: ignore[arg-type]
    if learned is None or learned.shape != tokens.embedding.weight.shape:
        raise UserError(f"adapter {path} does not fit its base: its {kind} has another shape")
    with torch.no_grad():
        tokens.embedding.weight.copy_(learned)
    tokens.attach(lm)
    lm.requires_grad_(False)
    return lm.eval()
