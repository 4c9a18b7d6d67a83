"""The schema of every option: typed, keyword-only dataclasses with defaults, units and checks.

The yaml files in `conf/` are presets that are checked against these classes; nothing here knows of
Hydra. The string under a field is its documentation, and what `largebatch <command> --help` prints.
"""

from largebatch.config.bench import BENCH_STRATEGIES, BenchConfig
from largebatch.config.checks import least_of, suggest
from largebatch.config.data import CurriculumConfig, DataConfig, LossOptions, SourceConfig
from largebatch.config.model import (
    ACTIVATIONS,
    PACKINGS,
    POOLINGS,
    TEMPERATURE_SCHEDULES,
    BackboneConfig,
    LoraConfig,
    PoolingConfig,
    TemperatureConfig,
    TextConfig,
    with_task,
)
from largebatch.config.objective import QUERY_DOCUMENT, ObjectiveConfig
from largebatch.config.tools import (
    AverageConfig,
    DataShowConfig,
    DataStatsConfig,
    DedupConfig,
    EncodeConfig,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    PairsConfig,
    ShardConfig,
    VerifyConfig,
)
from largebatch.config.train import (
    KEEPS,
    LR_SCALINGS,
    SCHEDULES,
    STRATEGIES,
    CheckpointConfig,
    EvalConfig,
    HardwareConfig,
    LoggerConfig,
    OptimConfig,
    ScheduleConfig,
    StrategyConfig,
    TrainConfig,
    longer_than,
)

__all__ = [
    "ACTIVATIONS",
    "BENCH_STRATEGIES",
    "KEEPS",
    "LR_SCALINGS",
    "PACKINGS",
    "POOLINGS",
    "QUERY_DOCUMENT",
    "SCHEDULES",
    "STRATEGIES",
    "TEMPERATURE_SCHEDULES",
    "AverageConfig",
    "BackboneConfig",
    "BenchConfig",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "DataShowConfig",
    "DataStatsConfig",
    "DedupConfig",
    "EncodeConfig",
    "EvalConfig",
    "EvaluateConfig",
    "ExportConfig",
    "HardwareConfig",
    "IndexConfig",
    "LoggerConfig",
    "LoraConfig",
    "LossOptions",
    "ObjectiveConfig",
    "OptimConfig",
    "PairsConfig",
    "PoolingConfig",
    "ScheduleConfig",
    "ShardConfig",
    "SourceConfig",
    "StrategyConfig",
    "TemperatureConfig",
    "TextConfig",
    "TrainConfig",
    "VerifyConfig",
    "least_of",
    "longer_than",
    "suggest",
    "with_task",
]
