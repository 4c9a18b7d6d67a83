"""The presets in `conf/`, opened for Hydra together with the schemas that check them."""

import dataclasses
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import largebatch
from largebatch.cli.table import Command

SCALE = "scale"
"""Group that makes any experiment small; it sets options of others, and is none itself."""


class Presets(NamedTuple):
    """What one command can be composed from."""

    command: Command
    """The command."""
    folders: tuple[Path, ...]
    """Our `conf/`, then the user's own folder if there is one."""
    groups: dict[str, list[str]]
    """The config groups of the command, each with its choices."""

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
    folders = (conf_folder(), *([config_dir] if config_dir else []))
    name, store = command.primary_config, ConfigStore.instance()
    # Where several commands share a primary config, its schema is the class of the one that runs.
    store.store(name=f"{name}_schema", node=command.config_class)
    if not (folders[0] / f"{name}.yaml").is_file():
        # A command without presets of ours, which a user may have: after the schema, as in ours.
        defaults = [f"{name}_schema", "_self_", {command.preset_group: None}]
        store.store(name=name, node={"defaults": defaults})
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(folders[0]), job_name="largebatch", version_base="1.3"):
        yield Presets(command, folders, _find_groups(command, folders))


def conf_folder() -> Path:
    """Return the folder with the presets: in the installed package, or beside it in a checkout."""
    assert largebatch.__file__ is not None
    package = Path(largebatch.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _find_groups(command: Command, folders: tuple[Path, ...]) -> dict[str, list[str]]:
    # The folders are read here because Hydra takes a tenth of a second to list its groups.
    hints = typing.get_type_hints(command.config_class)
    names = {name for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    names |= {command.preset_group} | ({SCALE} if command.primary_config == "train" else set())
    found = {
        name: sorted({file.stem for folder in folders for file in folder.glob(f"{name}/*.yaml")})
        for name in sorted(names)
    }
    return {name: choices for name, choices in found.items() if choices}
