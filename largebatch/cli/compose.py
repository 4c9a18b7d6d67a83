"""From a command line's overrides to the dataclass that a command runs with.

Hydra's compose API does the composing; no job ever runs inside Hydra, so nothing is logged,
created or changed on its behalf. All of its complaints become one-line UserErrors.
"""

import dataclasses
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largebatch.cli.assign import assign
from largebatch.cli.flags import INFOS, Line
from largebatch.cli.options import describe_value, find_option
from largebatch.cli.overrides import check, names_code
from largebatch.cli.presets import Presets
from largebatch.errors import UserError


def compose(presets: Presets, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of one job; raise UserError for the first override that is wrong."""
    return _compose(presets, overrides, with_hydra=False)


def _compose(presets: Presets, overrides: Sequence[str], *, with_hydra: bool) -> DictConfig:
    checked = check(presets, overrides)
    command = presets.command
    try:
        config = hydra.compose(
            command.primary_config,
            [*checked.choices, *presets.hydra_overrides],
            return_hydra_config=with_hydra,
        )
    except HydraException as error:
        raise UserError(_explain(command.config_class, error)) from error
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    # Names were checked; entries of mappings may be new.
    OmegaConf.set_struct(config, False)
    for override in checked.options:
        try:
            assign(config, command.config_class, override)
        except OmegaConfBaseException as error:
            raise UserError(f"{override.input_line}: {_explain_reference(error)}") from error
    OmegaConf.set_struct(config, True)
    own = {name: node for name, node in config.items_ex(resolve=False) if name != "hydra"}
    if any(
        names_code(OmegaConf.to_container(node))
        for node in own.values()
        if OmegaConf.is_config(node)
    ):
        raise UserError("_target_ is refused: a config never names code to run")
    return config


def show(presets: Presets, overrides: Sequence[str], line: Line) -> None:
    """Print what `--cfg` or `--info` ask for, to the standard output."""
    if line.info:
        _show_info(presets, overrides, line.info)
        return
    config: Any = _compose(presets, overrides, with_hydra=line.cfg != "job")
    if line.cfg == "hydra":
        config = OmegaConf.masked_copy(config, "hydra")
    if line.resolve:
        config = resolve(config)
    if line.package:
        if not line.package.startswith("hydra"):
            find_option(presets.command.config_class, line.package)
        config = OmegaConf.select(config, line.package)
    print(OmegaConf.to_yaml(config) if OmegaConf.is_config(config) else config, end="")


def _show_info(presets: Presets, overrides: Sequence[str], info: str) -> None:
    engine = GlobalHydra.instance().hydra
    assert engine is not None
    config = compose(presets, overrides)
    choices = [*check(presets, overrides).choices, *presets.hydra_overrides]
    for part in INFOS[1:] if info == "all" else (info,):
        if part == "config":  # Hydra would not know of what is set in its config
            print(OmegaConf.to_yaml(config), end="")
        else:
            logging.getLogger().handlers.clear()  # Hydra adds one for each part
            engine.show_info(part, presets.command.primary_config, choices)


def resolve(config: DictConfig) -> DictConfig:
    """Return a copy with each reference, such as ${name}, replaced by what it stands for."""
    _check_references(config)
    resolved = config.copy()
    OmegaConf.resolve(resolved)
    return resolved


def _check_references(config: DictConfig) -> None:
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_explain_reference(error)}") from error


def build(config: DictConfig) -> Any:
    """Turn a composed config into its dataclass; raise one UserError that holds all faults."""
    _check_references(config)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError("; ".join(f"{key} is not set; add {key}=..." for key in missing))
    faults: list[str] = []
    # Reading an option gives what its reference stands for.
    built = _build(config, OmegaConf.get_type(config), "", faults)
    if faults:
        raise UserError("; ".join(faults))
    return built


def build_from(options: Mapping[str, Any], config_class: type[Any]) -> Any:
    """Turn the options of a config that was composed before into its dataclass."""
    merged = OmegaConf.merge(OmegaConf.structured(config_class), options)
    assert isinstance(merged, DictConfig)
    return build(merged)


def _build(node: Any, annotation: Any, key: str, faults: list[str]) -> Any:
    """Turn a node into what `annotation` says, and note what is wrong with its options."""
    _check_kind(node, annotation, key)
    of_entry = (typing.get_args(annotation) or (Any,))[-1]
    if isinstance(node, ListConfig):
        # By number: what iterates over a list of unions gives their nodes, not their values.
        numbers = range(len(node))
        return [_build(node[number], of_entry, f"{key}[{number}]", faults) for number in numbers]
    if not isinstance(node, DictConfig):
        return node
    is_group = dataclasses.is_dataclass(annotation)
    hints = typing.get_type_hints(annotation) if is_group else {}
    entries = {}
    for name, value in ((str(name), value) for name, value in node.items()):
        inner = f"{key}.{name}" if key else name
        entries[name] = _build(value, hints.get(name, of_entry), inner, faults)
    if not is_group:
        return entries
    # Made by hand, because __init__ would stop at the first fault of the innermost part.
    built = object.__new__(annotation)
    vars(built).update(entries)
    if hasattr(built, "__post_init__"):
        try:
            built.__post_init__()
        except UserError as error:
            faults.append(str(error))
    return built


def _check_kind(value: Any, annotation: Any, key: str) -> None:
    """Check that a value is a list, mapping or group where it must be: references may be anything.

    Of plain values OmegaConf sees to that itself.
    """
    if dataclasses.is_dataclass(annotation):
        is_right = OmegaConf.get_type(value) is annotation
    else:
        kinds = {list: ListConfig, dict: DictConfig}
        is_right = isinstance(value, kinds.get(typing.get_origin(annotation), object))
    if not is_right:
        raise UserError(f"{key} must be {describe_value(annotation)}, and what it refers to is not")


def _explain(config_class: type[Any], error: HydraException) -> str:
    """Say what is wrong with a preset."""
    # A preset of the user's own: "In 'experiment/mine': ... raised while composing config:", then
    # what was raised, then the option's key.
    first, *others = str(error).strip().splitlines()
    where, reason = first.partition(": ")[0], " ".join(line.strip() for line in others[:1])
    if key := re.search(r"full_key: (\S+)", str(error)):
        try:
            annotation = find_option(config_class, key[1]).annotation
        except UserError as unknown:
            reason = str(unknown)
        else:
            if "is not a ListConfig" in reason or "is not a DictConfig" in reason:
                reason = f"it must be {describe_value(annotation)}"
            elif re.match(r"Key .* is incompatible with \(str\)", reason):
                reason = "put quotes around a name that reads as a number, true, false or null"
            reason = f"{key[1]}: {reason}"
    return f"{where}: {reason}" if reason else first


def _explain_reference(error: OmegaConfBaseException) -> str:
    """Say what is wrong with a reference, such as ${name}."""
    line = _first_line(error)
    if (
        named := re.fullmatch(r"Interpolation key '([A-Z_][A-Z0-9_]*)' not found", line)
    ) is not None:
        name = named[1]
        return f"${{{name}}} is no option; the environment variable is ${{oc.env:{name}}}"
    return line.removeprefix("KeyError raised while resolving interpolation: ").strip('"')


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
