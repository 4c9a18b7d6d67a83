"""The list of commands: what each is configured by, where its code is, and examples of its use."""

import importlib
from typing import Any, NamedTuple

from largebatch import config as schema
from largebatch.config.tools import DataShowConfig, DataStatsConfig


class Command(NamedTuple):
    """The word after `largebatch`, or two: a command and what it is to do."""

    name: str
    """The words; also the name of its primary config and of its module in `commands/`."""
    config_class: type[Any]
    """The dataclass that the composed config becomes, and the argument of `run`."""
    examples: tuple[str, ...]
    """Command lines for `--help`, without the leading `largebatch NAME`."""
    folder_option: str | None = "output_dir"
    """The option that names the folder that it writes, which jobs of a sweep must not share."""

    @property
    def summary(self) -> str:
        """One sentence: the first line of the config class's documentation."""
        return (self.config_class.__doc__ or "").partition("\n")[0]

    @property
    def primary_config(self) -> str:
        """Name of what it is composed from: a file in `conf/`, or else its defaults alone.

        It is that of `train` for all that is configured as a run is.
        """
        return "train" if issubclass(self.config_class, schema.TrainConfig) else self.name

    @property
    def preset_group(self) -> str:
        """The config group that a bare word after the command chooses from."""
        return "experiment" if self.primary_config == "train" else self.name

    @property
    def starts_ranks(self) -> bool:
        """Whether it runs as several processes when `hardware.ranks` says so."""
        return self.name == "train"

    def run(self, config: Any) -> None:
        """Import the command's module and run it; imports nothing heavy before that."""
        module = self.name.replace(" ", "_")
        importlib.import_module(f"largebatch.commands.{module}").run(config)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            schema.TrainConfig,
            (
                "quickstart",
                "quickstart data=custom 'data.sources.mine.urls=[shards/]' eval=none",
                "quickstart_pretrained backbone.path=FOLDER",
                "quickstart -m temperature.value=0.02,0.05,0.1",
                "quickstart --cfg job",
            ),
        ),
        Command("pairs", schema.PairsConfig, ("code", "code 'paths=[my/packages]'")),
        Command(
            "shard",
            schema.ShardConfig,
            (
                "'input=[pairs.jsonl]' output_dir=shards",
                "'input=[data/*.parquet]' fields.query=title fields.document=body",
            ),
        ),
        Command("index", schema.IndexConfig, ("'shards=[data/*.tar]'",)),
        Command("verify", schema.VerifyConfig, ("shards=shards",)),
        Command(
            "dedup",
            schema.DedupConfig,
            (
                "sources.forum=forum/train sources.wiki=wiki/train",
                "sources.mine=shards evaluation_sets.test=data/code/test near=false",
            ),
        ),
        Command(
            "data show",
            DataShowConfig,
            (
                "quickstart step=123",
                "quickstart step=123 rows=all format=jsonl",
                "data.sources.mine.urls=[shards/] global_batch=64 step=1",
            ),
            folder_option=None,
        ),
        Command(
            "data stats",
            DataStatsConfig,
            (
                "quickstart",
                "quickstart sample=0 stats_dir=stats",
                "data.sources.mine.urls=[shards/] backbone.tokenizer=FOLDER",
            ),
            folder_option="stats_dir",
        ),
        Command(
            "bench",
            schema.BenchConfig,
            (
                "quickstart",
                "quickstart 'batches=[1024,4096]' 'chunks=[1024,4096,auto]'",
                "quickstart 'keeps=[none,layers,products,all]' profile=true",
                "hardware=gpu hardware.ranks=8 'strategies=[ddp,fsdp,zero2,zero3]' synthetic=true",
            ),
            folder_option="bench_dir",
        ),
        Command(
            "evaluate",
            schema.EvaluateConfig,
            ("model=runs/quickstart/model sets.test=data/code/test bm25=true",),
        ),
        Command(
            "encode",
            schema.EncodeConfig,
            ("model=runs/quickstart/model input=texts.txt output=embeddings.npy",),
        ),
        Command(
            "export",
            schema.ExportConfig,
            ("run=runs/quickstart", "run=runs/quickstart checkpoint=last output_dir=model"),
        ),
        Command(
            "average",
            schema.AverageConfig,
            (
                "'models=[runs/a/model,runs/b/model]' output_dir=averaged",
                "'models=[runs/a/model,runs/b/model]' method=slerp 'weights=[0.7,0.3]'",
            ),
        ),
    )
}


def actions_of(word: str) -> list[str]:
    """Return the second words of the commands that begin with a word: `data` has show and stats."""
    pairs = [name.partition(" ") for name in COMMANDS]
    return [action for first, _, action in pairs if first == word and action]
