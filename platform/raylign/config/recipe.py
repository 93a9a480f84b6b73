"""A recipe: the whole journey in one file, each job reading its own section."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raylign.config.alignment import AlignConfig
from raylign.config.comparing import CompareConfig
from raylign.config.corpus import PrepareConfig
from raylign.config.evaluation import EvaluateConfig
from raylign.config.preference import PreferenceConfig, RewardModelConfig
from raylign.config.section import Section
from raylign.config.synthesis import ClassifierConfig, SynthesiseConfig
from raylign.config.tokenizer import TokenizerConfig
from raylign.config.training import PretrainConfig, SftConfig
from raylign.config.tuning import MergeConfig, TuneConfig


class RayConfig(Section):
    """How to reach Ray."""

    address: str | None = None
    """Cluster address; a submitted job's own cluster, else a private local one."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of a private local cluster; all of the machine when not given."""


class ReportConfig(Section):
    """`python -m jobs.report`: one page about the run, and others beside it."""

    runs: dict[str, Path] = Field(default={})
    """Name to run directory of further runs, such as other seeds: their curves and held-out results
    stand beside this run's own."""
    name: str | None = None
    """Of this run among them; that of its directory when not given."""

    @model_validator(mode="after")
    def _check_name(self) -> ReportConfig:
        if self.name is not None and not self.runs:
            raise ValueError("name has no effect without runs; leave it out")
        if self.name in self.runs:
            raise ValueError(f"name={self.name}: one of runs is called that already")
        return self


class Recipe(Section):
    """Top level of a recipe file."""

    run: Path = Path("runs/default")
    """Run directory: every stage writes a directory of its own below it."""
    seed: int = Field(default=0, ge=0)
    """The one seed of corpus, tokenizer, initial weights, data order and sampling."""
    ray: RayConfig = RayConfig()
    redo: str | None = None
    """Discard this stage and all that were made from it, and do them again."""
    synthesise: SynthesiseConfig | None = None
    classifier: ClassifierConfig | None = None
    prepare: PrepareConfig | None = None
    tokenizer: TokenizerConfig | None = None
    pretrain: PretrainConfig | None = None
    sft: SftConfig | None = None
    compare: CompareConfig | None = None
    reward_model: RewardModelConfig | None = None
    preference: PreferenceConfig | None = None
    tune: TuneConfig | None = None
    merge: MergeConfig | None = None
    align: AlignConfig | None = None
    evaluate: EvaluateConfig | None = None
    report: ReportConfig = ReportConfig()
