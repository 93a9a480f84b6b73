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
from raylign.config.loading import ConfigError, change, load_recipe
from raylign.config.model import ModelConfig, RopeScalingConfig
from raylign.config.preference import ComparisonConfig, PreferenceConfig, RewardModelConfig
from raylign.config.quality import PiiConfig, QualityConfig, SignalsConfig
from raylign.config.recipe import RayConfig, Recipe
from raylign.config.section import Section, UserError
from raylign.config.shards import MixtureConfig
from raylign.config.sources import SourceConfig
from raylign.config.synthesis import ClassifierConfig, SynthesiseConfig
from raylign.config.textbook import TextbookConfig
from raylign.config.tokenizer import TokenizerConfig
from raylign.config.training import (
    AdapterConfig,
    CheckpointConfig,
    EngineConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    SftConfig,
    TrainingConfig,
    WorkersConfig,
    check_warmup,
)
from raylign.config.tuning import MergeConfig, RangeConfig, TuneConfig

__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "AlignConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "ComparisonConfig",
    "ConfigError",
    "DecontaminateConfig",
    "DedupConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationSetConfig",
    "LearnerConfig",
    "LinesConfig",
    "MergeConfig",
    "MixtureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PiiConfig",
    "PreferenceConfig",
    "PrepareConfig",
    "PretrainConfig",
    "QualityConfig",
    "RangeConfig",
    "RayConfig",
    "Recipe",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RopeScalingConfig",
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
    "TrainingConfig",
    "TuneConfig",
    "UserError",
    "WorkersConfig",
    "change",
    "check_warmup",
    "load_recipe",
]
