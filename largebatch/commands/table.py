"""The list of commands: what each is configured by, where its code is, and examples of its use."""

import importlib
from typing import Any, NamedTuple

from largebatch import config as schema


class Command(NamedTuple):
    """One word after `largebatch`."""

    name: str
    """The word itself; also the name of its primary config and of its module in `commands/`."""
    config_class: type[Any]
    """The dataclass that the composed config becomes, and the argument of `run`."""
    examples: tuple[str, ...]
    """Command lines for `--help`, without the leading `largebatch NAME`."""

    @property
    def summary(self) -> str:
        """One sentence: the first line of the config class's documentation."""
        return (self.config_class.__doc__ or "").partition("\n")[0]

    @property
    def preset_group(self) -> str:
        """The config group that a bare word after the command chooses from."""
        return "experiment" if self.name == "train" else self.name

    @property
    def starts_ranks(self) -> bool:
        """Whether it runs as several processes when `hardware.ranks` says so."""
        return self.name == "train"

    def run(self, config: Any) -> None:
        """Import the command's module and run it; imports nothing heavy before that."""
        importlib.import_module(f"largebatch.commands.{self.name}").run(config)


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
    )
}
