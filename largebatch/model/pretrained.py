"""Models and tokenizers from folders, the hub or a config, with errors that one can act on."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.config import suggest
from largebatch.errors import UserError

log = logging.getLogger(__name__)

SETTINGS_FILE = "largebatch.json"
"""Holds what a sentence-transformers folder has no place for: the maximum length of each side."""

POOLING_NAMES = {
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
}
"""Poolings by the name that sentence-transformers gives them."""


def load_backbone(name: str, *, attention: str) -> nn.Module:
    """Load a pre-trained transformers model in float32.

    Raises:
        UserError: There is no such model, or it has no safetensors that can be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    check_model_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _prepare(config)
        with quiet_transformers():
            model = AutoModel.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation=attention,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _model_error(name, error) from error
    return _freeze_pooler(model)


def backbone_from_config(folder: Path, *, attention: str) -> nn.Module:
    """Return an untrained model, in float32, by the config.json of a folder."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _prepare(config)
    model: nn.Module = AutoModel.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    return _freeze_pooler(model)


def new_backbone(
    model_type: str, tokenizer: Any, *, config: Mapping[str, Any], attention: str
) -> nn.Module:
    """Return an untrained model of a transformers architecture, in float32.

    Raises:
        UserError: transformers has no such architecture, or its config no such entry.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"backbone.model_type={model_type!r} is no architecture of transformers"
            f"{suggest(model_type, CONFIG_MAPPING.keys())}"
        )
    known = AutoConfig.for_model(model_type).to_dict()
    for key in config:
        if key not in known:
            raise UserError(
                f"backbone.config.{key} is no entry of {model_type}'s config{suggest(key, known)}"
            )
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if name in known
    }
    entries: dict[str, Any] = {"vocab_size": len(tokenizer), **ids, **config}
    full = AutoConfig.for_model(model_type, **entries)
    _prepare(full)
    try:
        model = AutoModel.from_config(full, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, ImportError) as error:
        raise UserError(f"backbone.config: {_first_line(error)}") from error
    return _freeze_pooler(model)


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder or by hub name.

    Raises:
        UserError: There is none.
    """
    from transformers import AutoTokenizer

    check_model_folder(name, weights=False)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _model_error(name, error) from error


def tokenizer_of(name: str, other: str | Path | None) -> Any:
    """Load a checkpoint's tokenizer, or another one, with a warning if its tokens differ."""
    if other is None:
        return load_tokenizer(name)
    tokenizer = load_tokenizer(str(other))
    if tokenizer.get_vocab() != load_tokenizer(name).get_vocab():
        log.warning(
            "the tokenizer %s differs from that of the checkpoint %s: its token ids will mean "
            "other words than those that the weights were trained on", other, name,
        )  # fmt: skip
    return tokenizer


def check_model_folder(name: str, *, weights: bool = True) -> None:
    """Raise a UserError if `name` is a folder that can't be used, or nothing that can be loaded."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name
        if looks_like_path or folder.exists():
            raise UserError(f"model folder {name!r} does not exist or is no folder")
        _check_hub(name)
        return
    if not weights:
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {name!r} has no config.json: it is no transformers model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise UserError(
                f"model folder {name!r} has its weights as a pickle only ({pickles[0]}), which can "
                "run code when loaded; convert it to safetensors"
            )
        raise UserError(f"model folder {name!r} has no *.safetensors")


def _check_hub(name: str) -> None:
    """Ask once whether the hub can be reached: transformers tries for a minute, many lines long."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except HfHubHTTPError:
        return  # The hub answers; what is missing there, transformers says in better words.
    except Exception as error:  # Its class is that of the HTTP library, which changed twice.
        raise _model_error(name, error) from error


def read_settings(name: str) -> dict[str, Any]:
    """Return pooling, normalize, prompts and lengths of a sentence-transformers folder.

    Only what the folder tells is in the result; a plain transformers folder gives an empty one.

    Raises:
        UserError: It has modules or a pooling that are not known here.
    """
    modules = _read_json(name, "modules.json")
    if modules is None:
        return {}
    settings: dict[str, Any] = {"normalize": False}
    for module in modules:
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind == "Pooling":
            config = _read_json(name, f"{module['path']}/config.json")
            settings["pooling"] = _pooling_of(name, config)
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Transformer" or module["path"]:
            raise UserError(
                f"{name!r} has the module {module['type']} at {module['path']!r}; a transformer, "
                "a Pooling and a Normalize are understood"
            )
    length = (_read_json(name, "sentence_bert_config.json") or {}).get("max_seq_length")
    if length is None:  # sentence-transformers 6 keeps it in the tokenizer's config only.
        length = (_read_json(name, "tokenizer_config.json") or {}).get("model_max_length")
    if isinstance(length, int) and length < 10**6:  # transformers writes 1e30 for "no limit".
        settings |= {"query_max_tokens": length, "document_max_tokens": length}
    prompts = (_read_json(name, "config_sentence_transformers.json") or {}).get("prompts") or {}
    for side in ("query", "document"):
        if isinstance(prompt := prompts.get(side), str):
            settings[f"{side}_prompt"] = prompt
    return settings | (_read_json(name, SETTINGS_FILE) or {})


def merged_settings(name: str, **given: Any) -> dict[str, Any]:
    """Return a folder's settings, overridden by those that are given (None: not given)."""
    settings = read_settings(name)
    for key in ("query_prompt", "document_prompt"):
        if given[key] is not None and key in settings and given[key] != settings[key]:
            log.warning(
                "%s=%r differs from %r, which the checkpoint %s was trained with",
                key, given[key], settings[key], name,
            )  # fmt: skip
    return settings | {key: value for key, value in given.items() if value is not None}


def _pooling_of(name: str, config: dict[str, Any] | None) -> str:
    config = config or {}
    modes = config.get("pooling_mode")
    if modes is None:  # The older form: one boolean for each mode.
        prefix = "pooling_mode_"
        modes = [key[len(prefix) :] for key, on in config.items() if key.startswith(prefix) and on]
    modes = [modes] if isinstance(modes, str) else list(modes)
    short = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes]
    if len(short) != 1 or short[0] not in POOLING_NAMES:
        raise UserError(
            f"{name!r} pools by {', '.join(modes)}; one of {', '.join(POOLING_NAMES)} is understood"
        )
    if not config.get("include_prompt", True):
        raise UserError(f"{name!r} leaves its prompt out of the pooling, which is not supported")
    return POOLING_NAMES[short[0]]


def _read_json(name: str, file: str) -> Any:
    """Read a JSON file of a model folder or of the hub's cache; None if there is none."""
    from transformers.utils.hub import cached_file

    folder = Path(name).expanduser()
    if folder.is_dir():
        path: str | Path | None = folder / file
    else:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None or not Path(path).is_file():
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _prepare(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{config.model_type} is an encoder-decoder; an encoder or a decoder is needed"
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False  # Keys and values of earlier tokens are only for generation.


def _freeze_pooler(model: nn.Module) -> nn.Module:
    # No pooling here uses the pooler of BERT's kind. It stays, untrained, so that whoever loads the
    # exported model is not warned of missing weights.
    if isinstance(pooler := getattr(model, "pooler", None), nn.Module):
        pooler.requires_grad_(False)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its report of unused weights while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _model_error(name: str, error: Exception) -> UserError:
    reason = _first_line(error)
    if Path(name).expanduser().is_dir():
        return UserError(f"model folder {name!r} can't be loaded: {reason}")
    return UserError(
        f"model {name!r} is no folder here, and as a hub name it can't be loaded: {reason}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
