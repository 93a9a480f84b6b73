"""Every knob of Raylign: typed, frozen, one line of documentation each."""

from raylign.config.alignment import (
    AlgorithmConfig,
    AlignConfig,
    LearnerConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from raylign.config.corpus import PrepareConfig
from raylign.config.decontamination import DecontaminateConfig, EvaluationSetConfig
from raylign.config.dedup import DedupConfig, LinesConfig, SubstringConfig
from raylign.config.evaluation import EvaluateConfig
from raylign.config.loading import ConfigError, load_recipe
from raylign.config.quality import PiiConfig, QualityConfig, SignalsConfig
from raylign.config.recipe import RayConfig, Recipe
from raylign.config.section import Section, UserError
from raylign.config.shards import MixtureConfig
from raylign.config.sources import SourceConfig
from raylign.config.synthesis import ClassifierConfig, SynthesiseConfig
from raylign.config.textbook import TextbookConfig
from raylign.config.tokenizer import TokenizerConfig
from raylign.config.training import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    SftConfig,
    WorkersConfig,
)

__all__ = [
    "AlgorithmConfig",
    "AlignConfig",
    "ClassifierConfig",
    "ConfigError",
    "DecontaminateConfig",
    "DedupConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationSetConfig",
    "LearnerConfig",
    "LinesConfig",
    "MixtureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PiiConfig",
    "PrepareConfig",
    "PretrainConfig",
    "QualityConfig",
    "RayConfig",
    "Recipe",
    "RewardConfig",
    "RolloutConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "SftConfig",
    "SignalsConfig",
    "SourceConfig",
    "SubstringConfig",
    "SynthesiseConfig",
    "TextbookConfig",
    "TokenizerConfig",
    "UserError",
    "WorkersConfig",
    "load_recipe",
]
