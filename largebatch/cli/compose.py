"""From a command line's overrides to the dataclass that a command runs with.

1. Hydra composes the presets, checked by the schema.
2. Options are set in what it composed, as plain data.
3. References, such as ${name}, are resolved, and the dataclass is built and checks itself.
No job ever runs inside Hydra, so nothing is logged, created or changed on its behalf. All of its
complaints become one-line UserErrors.
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from largebatch.cli.assign import assign
from largebatch.cli.flags import INFOS, Line
from largebatch.cli.options import describe_value, find_option
from largebatch.cli.overrides import check
from largebatch.cli.presets import Presets
from largebatch.cli.values import Fitting
from largebatch.errors import UserError


def compose(presets: Presets, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of one job; raise UserError for the first override that is wrong."""
    checked = check(presets, overrides)
    command = presets.command
    try:
        composed = hydra.compose(
            command.primary_config, [*checked.choices, *presets.hydra_overrides]
        )
    except HydraException as error:
        raise UserError(_explain(command.config_class, error)) from error
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    config = typing.cast("dict[str, Any]", OmegaConf.to_container(composed))
    for override in checked.options:
        try:
            assign(config, command.config_class, override)
        except OmegaConfBaseException as error:
            raise UserError(f"{override.input_line}: {_explain_reference(error)}") from error
    if _names_code(config):
        raise UserError("_target_ is refused: a config never names code to run")
    try:
        return OmegaConf.create(config)
    except GrammarParseError as error:
        raise UserError(
            f"{error.full_key}={error.value}: ${{ begins a reference, such as ${{name}}; write "
            "\\${ for a literal one"
        ) from error


def _names_code(value: Any) -> bool:
    """Whether a value holds the key with which Hydra would call any function."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def show(presets: Presets, overrides: Sequence[str], line: Line) -> None:
    """Print what `--cfg` or `--info` ask for, to the standard output."""
    config: Any = compose(presets, overrides)
    if line.info:
        _show_info(presets, overrides, config, INFOS[1:] if line.info == "all" else [line.info])
        return
    if line.resolve:
        config = OmegaConf.create(resolve(config))
    if line.package:
        find_option(presets.command.config_class, line.package)
        config = OmegaConf.select(config, line.package)
    print(OmegaConf.to_yaml(config) if OmegaConf.is_config(config) else config, end="")


def _show_info(
    presets: Presets, overrides: Sequence[str], config: DictConfig, parts: Sequence[str]
) -> None:
    engine = GlobalHydra.instance().hydra
    assert engine is not None
    choices = [*check(presets, overrides).choices, *presets.hydra_overrides]
    for part in parts:
        if part == "config":  # Hydra would not know of what is set in its config
            print(OmegaConf.to_yaml(config), end="")
        else:
            logging.getLogger().handlers.clear()  # Hydra adds one for each part
            engine.show_info(part, presets.command.primary_config, choices)


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return the options with each reference, such as ${name}, replaced by what it stands for."""
    try:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_explain_reference(error)}") from error


def build(config_class: type[Any], config: DictConfig) -> Any:
    """Turn a composed config into its dataclass; raise one UserError that holds all faults."""
    options = resolve(config)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError("; ".join(f"{key} is not set; add {key}=..." for key in missing))
    return build_from(config_class, options)


def build_from(config_class: type[Any], options: Mapping[str, Any]) -> Any:
    """Turn options without references into a dataclass, as `build` does."""
    faults: list[str] = []
    fitted = Fitting(config_class, options).fit(options, config_class, "")
    built = _build(fitted, config_class, faults)
    if faults:
        raise UserError("; ".join(faults))
    return built


def _build(value: Any, annotation: Any, faults: list[str]) -> Any:
    """Make the dataclasses of a value that fits, and note what is wrong with their options."""
    arguments = typing.get_args(annotation)
    if isinstance(value, list) and arguments:
        return [_build(element, arguments[0], faults) for element in value]
    if not dataclasses.is_dataclass(annotation):
        if isinstance(value, dict) and arguments:
            return {name: _build(entry, arguments[1], faults) for name, entry in value.items()}
        return value
    hints = typing.get_type_hints(annotation)
    # Made by hand, because __init__ would stop at the first fault of the innermost part.
    built: Any = object.__new__(typing.cast("type[Any]", annotation))
    for name, option in value.items():
        setattr(built, name, _build(option, hints[name], faults))
    if hasattr(built, "__post_init__"):
        try:
            built.__post_init__()
        except UserError as error:
            faults.append(str(error))
    return built


def _explain(config_class: type[Any], error: HydraException) -> str:
    """Say what is wrong with a preset."""
    # A preset of the user's own: "In 'experiment/mine': ... raised while composing config:", then
    # what was raised, then the option's key.
    first, *others = str(error).strip().splitlines()
    where, reason = first.partition(": ")[0], " ".join(line.strip() for line in others[:1])
    if key := re.search(r"full_key: (\S+)", str(error)):
        try:
            annotation = find_option(config_class, key[1])
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
    if named := re.fullmatch(r"Interpolation key '([A-Z_][A-Z0-9_]*)' not found", line):
        return f"${{{named[1]}}} is no option; the environment variable is ${{oc.env:{named[1]}}}"
    return line.removeprefix("KeyError raised while resolving interpolation: ").strip('"')


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
