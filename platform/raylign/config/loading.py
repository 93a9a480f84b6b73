"""Recipe files and `key=value` overrides become a `Recipe`, or one line that says what is wrong."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raylign.config.recipe import Recipe
from raylign.config.section import UserError

# What other frameworks call a knob of ours; suggestions only, never silently accepted.
SYNONYMS = {
    "learning_rate": "lr",
    "num_generations": "group_size",
    "n_samples_per_prompt": "group_size",
    "rollout_batch_size": "prompts_per_step",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "kl_loss_coef": "kl_coef",
    "init_kl_coef": "kl_coef",
    "max_grad_norm": "clip",
    "max_new_tokens": "max_tokens",
    "max_completion_length": "max_tokens",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_hidden_layers": "layers",
    "intermediate_size": "ffn_size",
    "model_name_or_path": "model",
    "output_dir": "run",
}

_LONGEST_SECTION = 80
"""Characters of a section that are shown in one line with what is wrong with it."""


class ConfigError(UserError):
    """A recipe that cannot be used; the message names the key, its place and the remedy."""


def load_recipe(file: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read `file` (YAML), apply `section.key=value` overrides in order, and validate.

    Raises `ConfigError` for a missing file, bad YAML, an unknown key or a wrong value.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"recipe {file} does not exist{_suggest_file(file)}")
    data, places = _read(file)
    for override in overrides:
        path, value = _parse_override(override)
        _set(data, path, value, override)
        # What the file said below this key has been replaced, and with it the place to look.
        places = {key: place for key, place in places.items() if key[: len(path)] != path}
        places[path] = f"override {override!r}"
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, places, str(file))) from None


def change(recipe: Recipe, values: Mapping[str, Any], origin: str) -> Recipe:
    """`recipe` with other values at dotted keys, validated like the file they stand for.

    `origin` says in messages where the values came from. Raises `ConfigError`.
    """
    data = recipe.model_dump(exclude_unset=True)
    places: dict[tuple[str, ...], str] = {}
    for key, value in values.items():
        path = tuple(key.split("."))
        _set(data, path, value, f"{key}={value}")
        places[path] = origin
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, places, origin)) from None


def _read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The mapping in a YAML file, and `file:line` of each of its keys."""
    try:
        text = file.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        places: dict[tuple[str, ...], str] = {}
        for key, line in _key_lines(yaml.compose(text), ()):
            if key in places:
                raise ConfigError(f"{file}:{line}: {'.'.join(key)!r} again; it is at {places[key]}")
            places[key] = f"{file}:{line}"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else f"{file}"
        raise ConfigError(f"{place}: not valid YAML: {_one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"recipe {file} cannot be read: {error.strerror}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {file} must be a mapping of keys, not a {type(data).__name__}")
    return data, places


def _suggest_file(file: Path) -> str:
    siblings = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
    close = difflib.get_close_matches(file.name, siblings, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {file.parent / close[0]}?"
    return "; the shipped recipes are in jobs/recipes/"


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        return tuple(key.strip().split(".")), yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r} has a bad value: {_one_line(error)}") from None


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any, override: str) -> None:
    at = data
    for depth, key in enumerate(path[:-1]):
        if at.get(key) is None:
            at[key] = {}
        at = at[key]
        if not isinstance(at, dict):
            here = ".".join(path[: depth + 1])
            remedy = f"; it is a list, give it whole: '{here}=[...]'"
            raise ConfigError(
                f"override {override!r}: {here} is not a section"
                f"{remedy if isinstance(at, list) else ''}"
            )
    at[path[-1]] = value


def _key_lines(
    node: yaml.Node | None, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _key_lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*path, str(index))
            yield here, value.start_mark.line + 1
            yield from _key_lines(value, here)


def _explain(error: ValidationError, places: dict[tuple[str, ...], str], file: str) -> str:
    """The first problem in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    # A union reports one problem for each member; an unknown key is the most telling.
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    path = _strip_union_tags(first["loc"])
    place = _place(path, places, file)
    dotted = ".".join(path) or "the recipe"
    if first["type"] == "extra_forbidden":
        message = f"{place}: unknown key {dotted!r}{_suggest_key(path)}"
    elif first["type"] == "missing":
        message = f"{place}: {dotted} is required"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        # Of a whole section, the reason begins with the key that is at fault.
        key = reason.partition(" ")[0].partition("=")[0].rstrip(":;,")
        place = places.get((*path, *key.split(".")), place)
        value = repr(first["input"])
        too_long = isinstance(first["input"], dict) and len(value) > _LONGEST_SECTION
        shown = dotted if too_long else f"{dotted}={value}"
        message = f"{place}: {shown}: {reason[:1].lower()}{reason[1:]}"
    # Of a union's members each complains about the same value; only other places count.
    places_left = {_strip_union_tags(problem["loc"]) for problem in problems}
    others = sum(path[: len(other)] != other for other in places_left)
    return f"{message} (and {others} more)" if others else message


def _strip_union_tags(location: Sequence[int | str]) -> tuple[str, ...]:
    """A pydantic error location as a key path: no names of union members."""
    parts = map(str, location)
    named = [part for part in parts if not (part.endswith("Config") or "[" in part)]
    plain = named[-1:] == ["str"] and len(named) > 1  # of `str | Path`
    return tuple(named[:-1] if plain else named)


def _place(path: tuple[str, ...], places: dict[tuple[str, ...], str], file: str) -> str:
    while path:
        if path in places:
            return places[path]
        path = path[:-1]
    return file


def _suggest_key(path: tuple[str, ...]) -> str:
    known = list(flatten_keys(Recipe))
    numbered, path = path, tuple(part for part in path if not part.isdecimal())
    wanted, parent = path[-1], ".".join(path[:-1])
    target = SYNONYMS.get(wanted, wanted)
    section = path[0] if len(path) > 1 else ""
    exact = [k for k in known if k.rsplit(".", 1)[-1] == target]
    if exact:
        # The same section first, then the shortest way there.
        exact.sort(key=lambda k: (not k.startswith(section), not k.startswith(parent), len(k)))
        return f"; did you mean {exact[0]!r}?"
    siblings = [k.rsplit(".", 1)[-1] for k in known if k.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(target, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {'.'.join((*numbered[:-1], close[0]))!r}?"
    others = [key for key in known if not parent.startswith(key)]
    close = difflib.get_close_matches(".".join(path), others, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys here: {', '.join(sorted(siblings))}" if siblings else ""


def flatten_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration model, sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in _sections(field.annotation):
            yield from flatten_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        for member in typing.get_args(annotation):
            yield from _sections(member)
