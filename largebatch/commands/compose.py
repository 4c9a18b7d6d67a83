"""From a command line's overrides to the dataclass that a command runs with.

Hydra's compose API does the composing; no job ever runs inside Hydra, so nothing is logged,
created or changed on its behalf. All of its complaints become one-line UserErrors.
"""

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largebatch.commands.flags import Line
from largebatch.commands.options import describe_value, find_option
from largebatch.commands.overrides import names_code, translate
from largebatch.commands.presets import Presets
from largebatch.errors import UserError


def compose(presets: Presets, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of one job; raise UserError for the first override that is wrong."""
    translated, debug = translate(presets, overrides)
    try:
        config = hydra.compose(
            presets.command.primary_config, [*translated, *presets.hydra_overrides]
        )
    except HydraException as error:
        raise UserError(_explain(presets.command.config_class, error, translated)) from error
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    if names_code(OmegaConf.to_container(config, resolve=False)):
        raise UserError("_target_ is refused: a config never names code to run")
    if debug is not None:
        config.debug = debug
    return config


def show(presets: Presets, overrides: Sequence[str], line: Line) -> None:
    """Print what `--cfg` or `--info` ask for, to the standard output."""
    if line.cfg == "job":
        config: Any = compose(presets, overrides)
        config = resolve(config) if line.resolve else config
        if line.package:
            find_option(presets.command.config_class, line.package)
            config = OmegaConf.select(config, line.package)
        print(OmegaConf.to_yaml(config) if OmegaConf.is_config(config) else config, end="")
        return
    translated = [*translate(presets, overrides).overrides, *presets.hydra_overrides]
    engine = GlobalHydra.instance().hydra
    assert engine is not None
    if line.cfg:
        engine.show_cfg(
            presets.command.primary_config, translated, line.cfg, line.package, line.resolve
        )
    elif line.info:
        engine.show_info(line.info, presets.command.primary_config, translated)


def resolve(config: DictConfig) -> DictConfig:
    """Return a copy with each reference, such as ${name}, replaced by what it stands for."""
    resolved = config.copy()
    try:
        OmegaConf.to_container(config, resolve=True)  # unlike resolve, its errors name the option
        OmegaConf.resolve(resolved)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from error
    return resolved


def build(config: DictConfig) -> Any:
    """Turn a composed config into its dataclass; raise one UserError that holds all faults."""
    resolved = resolve(config)
    if missing := sorted(OmegaConf.missing_keys(resolved)):
        raise UserError("; ".join(f"{key} is not set; add {key}=..." for key in missing))
    faults: list[str] = []
    built = _build(resolved, faults)
    if faults:
        raise UserError("; ".join(faults))
    return built


def _build(node: Any, faults: list[str]) -> Any:
    if isinstance(node, ListConfig):
        # By number: what iterates over a list of unions gives their nodes, not their values.
        return [_build(node[number], faults) for number in range(len(node))]
    if not isinstance(node, DictConfig):
        return node
    kind = OmegaConf.get_type(node)
    entries = {str(name): _build(value, faults) for name, value in node.items()}
    if not dataclasses.is_dataclass(kind):
        return entries
    # Made by hand, because __init__ would stop at the first fault of the innermost part.
    built = object.__new__(typing.cast("type[Any]", kind))
    vars(built).update(entries)
    if hasattr(built, "__post_init__"):
        try:
            built.__post_init__()
        except UserError as error:
            faults.append(str(error))
    return built


def _explain(
    config_class: type[Any], error: HydraException, translated: dict[str, Override]
) -> str:
    """Say what is wrong with a config whose overrides exist but do not fit."""
    for text, override in translated.items():
        if str(error).rstrip().endswith(f"override {text}"):
            annotation = find_option(config_class, override.key_or_group).annotation
            given = override.get_value_element_as_str()
            return f"{override.key_or_group}={given} must be {describe_value(annotation)}"
    # A preset of the user's own: "In 'experiment/mine': ... raised while composing config:", then
    # what was raised, then the option's key.
    first, *others = str(error).strip().splitlines()
    where, reason = first.partition(": ")[0], " ".join(line.strip() for line in others[:1])
    if key := re.search(r"full_key: (\S+)", str(error)):
        try:
            find_option(config_class, key[1])
        except UserError as unknown:
            reason = str(unknown)
        else:
            reason = f"{key[1]}: {reason}"
    return f"{where}: {reason}" if reason else first


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
