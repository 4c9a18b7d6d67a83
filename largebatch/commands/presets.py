"""The presets in `conf/`, opened for Hydra together with the schemas that check them."""

import dataclasses
import importlib.util
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import largebatch
from largebatch.commands.table import COMMANDS, Command

CONF_PACKAGE = "largebatch.conf"


def conf_folder() -> Path:
    """Return the folder with the presets: the installed package, or `conf/` of a checkout."""
    spec = importlib.util.find_spec(CONF_PACKAGE)
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    # `python -m largebatch` inside a checkout finds the package there, and the presets beside it.
    assert largebatch.__file__ is not None
    return Path(largebatch.__file__).parents[1] / "conf"


@contextmanager
def open_presets(config_dir: Path | None = None) -> Iterator[None]:
    """Make the presets, the schemas and, if given, the user's own presets known to Hydra."""
    for command in COMMANDS.values():
        ConfigStore.instance().store(name=f"{command.name}_schema", node=command.config_class)
    GlobalHydra.instance().clear()
    opened = (
        hydra.initialize_config_module(CONF_PACKAGE, job_name="largebatch", version_base="1.3")
        if importlib.util.find_spec(CONF_PACKAGE)
        else hydra.initialize_config_dir(
            str(conf_folder()), job_name="largebatch", version_base="1.3"
        )
    )
    with opened:
        if config_dir:
            search_path = GlobalHydra.instance().config_loader().get_search_path()
            search_path.append("command-line", f"file://{config_dir.resolve()}")
        yield


def list_groups(command: Command) -> dict[str, list[str]]:
    """Return the config groups that a command has, each with its choices."""
    loader = GlobalHydra.instance().config_loader()
    hints = typing.get_type_hints(command.config_class)
    names = {name for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    names |= {command.preset_group} | ({"debug"} if command.name == "train" else set())
    return {
        group: sorted(loader.get_group_options(group))
        for group in sorted(names & set(loader.list_groups("")))
    }


def lists_group(config_name: str, group: str) -> bool:
    """Whether the primary config has a place for a choice of `group` in its defaults list."""
    primary = OmegaConf.load(conf_folder() / f"{config_name}.yaml")
    assert isinstance(primary, DictConfig)
    defaults = primary.get("defaults") or []
    return any(isinstance(entry, DictConfig) and group in entry for entry in defaults)
