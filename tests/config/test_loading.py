"""Recipes and overrides: what is accepted, and how a mistake is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import raylign.config
from raylign.config import AlignConfig, ConfigError, ModelConfig, Recipe, Section, load_recipe
from raylign.config.loading import SYNONYMS, flatten_keys
from raylign.config.presets import PRESETS


@pytest.fixture
def refuse(tmp_path: Path):
    """The complaint about a recipe's text and overrides, its path shortened to `r.yaml`."""

    def complain(text: str, *overrides: str) -> str:
        file = tmp_path / "r.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_recipe(file, overrides)
        message = str(caught.value).replace(str(file), "r.yaml")
        assert "\n" not in message
        return message

    return complain


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def test_an_empty_recipe_has_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Recipe()


def test_overrides_apply_in_order_and_make_sections(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "seed: 1\nalign:\n  steps: 3\n",
        "align.steps=5",
        "align.optimizer.lr=1e-3",
        "sft.sample_prompts=[a, b]",
        "align.steps=7",
        "run=/tmp/elsewhere",
    )
    assert recipe.seed == 1
    assert recipe.align is not None and recipe.sft is not None
    assert (recipe.align.steps, recipe.align.optimizer.lr) == (7, 1e-3)
    assert recipe.sft.sample_prompts == ("a", "b")
    assert recipe.run == Path("/tmp/elsewhere")


def test_a_sections_own_defaults_hold_for_keys_left_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, "align:\n  schedule: {warmup_steps: 5}\n", "align.optimizer.lr=1e-3")
    assert recipe.align is not None
    defaults = AlignConfig()
    assert recipe.align.schedule.shape == defaults.schedule.shape == "constant"
    assert recipe.align.schedule.warmup_steps == 5
    assert recipe.align.optimizer.weight_decay == defaults.optimizer.weight_decay == 0.0
    assert recipe.align.optimizer.lr == 1e-3


def test_a_canary_is_as_exact_as_both_can_be(tmp_path: Path) -> None:
    def read(*overrides: str) -> float:
        recipe = load(tmp_path, "align: {}\n", *overrides)
        assert recipe.align is not None
        return recipe.align.canary_tolerance

    assert read() == 0.01
    assert read("align.engine.dtype=bfloat16") == read("align.rollout.dtype=bfloat16") == 0.1
    given = "align.rollout.canary_tolerance=0.02"
    assert read(given, "align.engine.dtype=bfloat16") == 0.02


def test_own_defaults_reach_through_nested_sections() -> None:
    class Inner(Section):
        a: int = 0
        b: int = 0

    class Middle(Section):
        inner: Inner = Inner()
        c: int = 0

    class Outer(Section):
        middle: Middle = Middle(inner=Inner(a=1, b=1), c=1)

    outer = Outer.model_validate({"middle": {"inner": {"a": 2}}})
    assert (outer.middle.inner.a, outer.middle.inner.b, outer.middle.c) == (2, 1, 1)


def test_a_model_is_a_shape_or_a_directory(tmp_path: Path) -> None:
    shaped = load(tmp_path, "pretrain: {model: {layers: 2}}")
    named = load(tmp_path, "pretrain: {model: runs/a/pretrain}")
    assert shaped.pretrain is not None and named.pretrain is not None
    assert getattr(shaped.pretrain.model, "layers", None) == 2
    assert named.pretrain.model == "runs/a/pretrain"


def test_a_preset_holds_where_the_recipe_is_silent(tmp_path: Path) -> None:
    text = "pretrain: {model: {preset: gpt2-125m, layers: 2}}"
    recipe = load(tmp_path, text, "pretrain.model.context=64")
    assert recipe.pretrain is not None and isinstance(recipe.pretrain.model, ModelConfig)
    shape = recipe.pretrain.model
    assert (shape.layers, shape.context, shape.hidden_size, shape.kv_heads) == (2, 64, 768, 4)
    again = ModelConfig.model_validate(shape.model_dump(exclude_unset=True))
    assert again == shape


def test_every_preset_is_a_shape() -> None:
    for name in PRESETS:
        assert ModelConfig(preset=name).preset == name


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path, "align: {}")
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        recipe.align.sampling.top_p = 0.5  # type: ignore[misc, union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "align:\n  optimiser:\n    lr: 1\n",
            "r.yaml:2: unknown key 'align.optimiser'; did you mean 'align.optimizer'?",
        ),
        (
            "pretrain:\n  model:\n    hiden_size: 8\n",
            "r.yaml:3: unknown key 'pretrain.model.hiden_size'; "
            "did you mean 'pretrain.model.hidden_size'?",
        ),
        (
            "align:\n  steps: 3\n  learning_rate: 1e-4\n",
            "r.yaml:3: unknown key 'align.learning_rate'; did you mean 'align.optimizer.lr'?",
        ),
        (
            "align:\n  num_generations: 4\n",
            "r.yaml:2: unknown key 'align.num_generations'; did you mean 'align.group_size'?",
        ),
        ("output_dir: x\n", "r.yaml:1: unknown key 'output_dir'; did you mean 'run'?"),
        (
            "sft: {}\nalign:\n  steps: many\n",
            "r.yaml:3: align.steps='many': input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        (
            "align:\n  steps: yes\n",
            "r.yaml:2: align.steps=True: input should be a number, not true or false",
        ),
        (
            "align:\n  algorithm: {kl_coef: off}\n",
            "r.yaml:2: align.algorithm.kl_coef=False: input should be a number, not true or false",
        ),
        (
            "align:\n  rollout: {dtype: float16}\n",
            "r.yaml:2: align.rollout.dtype='float16': input should be 'float32' or 'bfloat16'",
        ),
        (
            "align:\n  group_size: 0\n  steps: 0\n",
            "r.yaml:3: align.steps=0: input should be greater than or equal to 1 (and 1 more)",
        ),
        (
            "pretrain:\n  model: {heads: 3}\n",
            "r.yaml:2: pretrain.model={'heads': 3}: heads=3 must divide hidden_size=128",
        ),
        (
            "pretrain:\n  model:\n    layers: 2\n    preset: gpt2-124m\n",
            "r.yaml:4: pretrain.model.preset='gpt2-124m': no preset of this name; did you mean "
            "gpt2-125m?",
        ),
        (
            "pretrain:\n  model: {preset: tiny-gptj, kv_heads: 1}\n",
            "r.yaml:2: pretrain.model={'preset': 'tiny-gptj', 'kv_heads': 1}: kv_heads has no ",
        ),
        (  # the key's own line, and not all of its section
            "align:\n  steps: 4\n  adapter:\n    rank: 4\n  sampling: {max_tokens: 5, top_k: 3, "
            "temperature: 1.0, top_p: 0.5}\n",
            "r.yaml:4: align: adapter.rank has no effect with peft=none; leave it out, or choose",
        ),
        (
            "align:\n  peft: lora\n  adapter: {rank: 513}\n  sampling: {max_tokens: 5, top_k: 3, "
            "temperature: 1.0, top_p: 0.5}\n  transfer: {adapter_only: true}",
            "r.yaml:3: align: adapter.rank=513: vLLM serves adapters up to 512; lower it, or leave",
        ),
        (
            "prepare:\n  sources:\n    - kind: textbook\n    - kind: pidoc\n",
            "r.yaml:4: prepare.sources.1.kind='pidoc': input should be ",
        ),
        ("seed: 1\nseed: 2\n", "r.yaml:2: 'seed' again; it is at r.yaml:1"),
        ("seed: 1\n  run: x\n", "r.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("- seed\n", "recipe r.yaml must be a mapping of keys, not a list"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(refuse, text: str, message: str) -> None:
    assert refuse(text).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.stps=3", "override 'align.stps=3': unknown key 'align.stps'; did you mean "),
        ("align.steps=none", "override 'align.steps=none': align.steps='none': input should be "),
        ("align.steps", "override 'align.steps' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("seed.x=3", "override 'seed.x=3': seed is not a section"),
        ("align.steps=[3", "override 'align.steps=[3' has a bad value: "),
        # The file's line for this key no longer counts.
        ("align.optimizer={lr: x}", "override 'align.optimizer={lr: x}': align.optimizer.lr='x': "),
    ],
)
def test_a_mistake_in_an_override_is_named(refuse, override: str, message: str) -> None:
    assert refuse("seed: 0\nalign:\n  optimizer: {lr: 1}\n", override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prepare.sources=[{kind: jsonl, pth: x}]", "did you mean 'prepare.sources.0.path'?"),
        ("prepare.sources=[{kind: jsonl, path: 5}]", ": prepare.sources.0.path=5: input should be"),
        ("prepare.sources.0.path=x", "it is a list, give it whole: 'prepare.sources=[...]'"),
        ("prepare.quality.language.languages=[en]", "'prepare.quality.language.allowed'?"),
    ],
)
def test_a_mistake_inside_a_list_is_named(refuse, override: str, message: str) -> None:
    assert message in refuse("prepare:\n  sources: [{kind: pydoc}]\n", override)


def test_a_missing_file_suggests_its_sibling(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*/quickstart.yaml\?"):
        load_recipe(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="jobs/recipes/"):
        load_recipe(tmp_path / "nowhere" / "x.yaml")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_every_synonym_leads_to_a_key_and_hides_none() -> None:
    known = {key.rsplit(".", 1)[-1] for key in flatten_keys(Recipe)}
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


def test_every_key_is_documented_and_every_section_closed() -> None:
    undocumented = []
    sections = [value for value in vars(raylign.config).values() if is_section(value)]
    assert len(sections) > 20
    for section in sections:
        assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]
        for name, field in section.model_fields.items():
            nested = any(is_section(member) for member in members(field))
            if not field.description and not nested:
                undocumented.append(f"{section.__name__}.{name}")
    assert not undocumented


def is_section(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Section)


def members(field) -> tuple[type, ...]:
    return getattr(field.annotation, "__args__", (field.annotation,))
