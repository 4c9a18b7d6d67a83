"""The presets in `conf/`, opened for Hydra together with the schemas that check them."""

import dataclasses
import importlib.util
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import largebatch
from largebatch.cli.table import Command

CONF_PACKAGE = "largebatch.conf"


class Presets(NamedTuple):
    """What one command can be composed from."""

    command: Command
    """The command."""
    folders: tuple[Path, ...]
    """Our `conf/`, then the user's own folder if there is one."""
    groups: dict[str, list[str]]
    """The config groups of the command, each with its choices."""
    lists_preset_group: bool
    """Whether the primary config's defaults list has a place for the preset."""

    @property
    def hydra_overrides(self) -> list[str]:
        """What tells Hydra of the user's own folder."""
        own = ",".join(f"'file://{folder.resolve()}'" for folder in self.folders[1:])
        return [f"hydra.searchpath=[{own}]"] if own else []

    def describe(self, group: str, choice: str) -> str:
        """Return the comment that a preset's file opens with."""
        for folder in self.folders:
            file = folder / group / f"{choice}.yaml"
            if file.is_file():
                for line in file.read_text(encoding="utf-8").splitlines():
                    if line.startswith("# ") and not line.startswith("# @package"):
                        return line[2:]
        return ""


@contextmanager
def open_presets(command: Command, config_dir: Path | None = None) -> Iterator[Presets]:
    """Make the presets and schemas known to Hydra for the duration of a `with` block."""
    # Where several commands share a primary config, its schema is the class of the one that runs.
    schema_name = f"{command.primary_config}_schema"
    ConfigStore.instance().store(name=schema_name, node=command.config_class)
    GlobalHydra.instance().clear()
    folders = (conf_folder(), *([config_dir] if config_dir else []))
    opened = (
        hydra.initialize_config_module(CONF_PACKAGE, job_name="largebatch", version_base="1.3")
        if importlib.util.find_spec(CONF_PACKAGE)
        else hydra.initialize_config_dir(str(folders[0]), job_name="largebatch", version_base="1.3")
    )
    with opened:
        yield Presets(command, folders, _find_groups(command, folders), _lists_preset(command))


def conf_folder() -> Path:
    """Return the folder with the presets: the installed package, or `conf/` of a checkout."""
    spec = importlib.util.find_spec(CONF_PACKAGE)
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    # `python -m largebatch` inside a checkout finds the package there, and the presets beside it.
    assert largebatch.__file__ is not None
    return Path(largebatch.__file__).resolve().parents[1] / "conf"


def _find_groups(command: Command, folders: tuple[Path, ...]) -> dict[str, list[str]]:
    # The folders are read here because Hydra takes a tenth of a second to list its groups.
    hints = typing.get_type_hints(command.config_class)
    names = {name for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    names |= {command.preset_group} | ({"debug"} if command.primary_config == "train" else set())
    found = {
        name: sorted({file.stem for folder in folders for file in folder.glob(f"{name}/*.yaml")})
        for name in sorted(names)
    }
    return {name: choices for name, choices in found.items() if choices}


def _lists_preset(command: Command) -> bool:
    primary = OmegaConf.load(conf_folder() / f"{command.primary_config}.yaml")
    assert isinstance(primary, DictConfig)
    defaults = primary.get("defaults") or []
    return any(
        isinstance(entry, DictConfig) and command.preset_group in entry for entry in defaults
    )
