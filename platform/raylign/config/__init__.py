"""Every knob of Raylign: typed, frozen, one line of documentation each."""

from raylign.config.alignment import (
    AlgorithmConfig,
    AlignConfig,
    LearnerConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from raylign.config.corpus import (
    DecontaminateConfig,
    DedupConfig,
    PrepareConfig,
    QualityConfig,
    SourceConfig,
    TextbookConfig,
    TokenizerConfig,
)
from raylign.config.evaluation import EvaluateConfig
from raylign.config.loading import ConfigError, load_recipe
from raylign.config.recipe import RayConfig, Recipe
from raylign.config.section import Section, UserError
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
    "ConfigError",
    "DecontaminateConfig",
    "DedupConfig",
    "EngineConfig",
    "EvaluateConfig",
    "LearnerConfig",
    "ModelConfig",
    "OptimizerConfig",
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
    "SourceConfig",
    "TextbookConfig",
    "TokenizerConfig",
    "UserError",
    "WorkersConfig",
    "load_recipe",
]
