"""Every knob of Raylign: typed, frozen, one line of documentation each."""

from raylign.config.algorithm import AlgorithmConfig, ImportanceConfig, ValueConfig
from raylign.config.alignment import (
    AlignConfig,
    CriticConfig,
    GuardConfig,
    LearnerConfig,
    SinksConfig,
)
from raylign.config.comparing import CompareConfig, VerdictsConfig
from raylign.config.corpus import PrepareConfig
from raylign.config.decontamination import DecontaminateConfig, EvaluationSetConfig
from raylign.config.dedup import DedupConfig, LinesConfig, SubstringConfig
from raylign.config.evaluation import EvaluateConfig
from raylign.config.loading import ConfigError, change, load_recipe
from raylign.config.model import ModelConfig, RopeScalingConfig
from raylign.config.preference import ComparisonConfig, PreferenceConfig, RewardModelConfig
from raylign.config.quality import PiiConfig, QualityConfig, SignalsConfig
from raylign.config.recipe import RayConfig, Recipe, ReportConfig
from raylign.config.rewarding import (
    JudgeConfig,
    RewardConfig,
    RewardPartConfig,
    SandboxConfig,
    ShapingConfig,
)
from raylign.config.rollouts import (
    EnvironmentConfig,
    RolloutConfig,
    SamplingConfig,
    ScalingConfig,
    TransferConfig,
)
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
    "CompareConfig",
    "ComparisonConfig",
    "ConfigError",
    "CriticConfig",
    "DecontaminateConfig",
    "DedupConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluateConfig",
    "EvaluationSetConfig",
    "GuardConfig",
    "ImportanceConfig",
    "JudgeConfig",
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
    "ReportConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RewardPartConfig",
    "RolloutConfig",
    "RopeScalingConfig",
    "SamplingConfig",
    "SandboxConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "Section",
    "SftConfig",
    "ShapingConfig",
    "SignalsConfig",
    "SinksConfig",
    "SourceConfig",
    "SubstringConfig",
    "SynthesiseConfig",
    "TextbookConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TransferConfig",
    "TuneConfig",
    "UserError",
    "ValueConfig",
    "VerdictsConfig",
    "WorkersConfig",
    "change",
    "check_warmup",
    "load_recipe",
]
