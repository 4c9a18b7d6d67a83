"""What a sentence-transformers folder says of itself: pooling, prompts, lengths and so on.

All of it is the default of whoever goes on with the folder. What is asked for instead is told, and
what can't be done as the folder says is refused: nothing of it is passed over.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largebatch.config import POOLINGS, PoolingConfig
from largebatch.data.text import TextSettings
from largebatch.errors import UserError
from largebatch.model.head import head_options
from largebatch.model.pooling import pooling_class

log = logging.getLogger(__name__)

SETTINGS_FILE = "largebatch.json"
"""Holds what a sentence-transformers folder has no place for: the maximum length of each side, and
whether texts were made to end in a fixed token."""


def _short(folder_name: str) -> str:
    return folder_name.removesuffix("_tokens").removesuffix("_token")


POOLING_NAMES = {
    _short(folder_name): name
    for name in POOLINGS
    if (folder_name := pooling_class(name).folder_name)
}
"""Poolings by the name that sentence-transformers gives them."""

LENGTHS = ("query_max_tokens", "document_max_tokens")

NO_LIMIT = 10**6
"""A tokenizer's maximum length from here on means that it has none (transformers writes 1e30)."""

OPTIONS = {
    "pooling": "pooling.mode",
    "normalize": "pooling.normalize",
    "latents": "pooling.latents",
    "heads": "pooling.heads",
    "dense": "pooling.dense",
    "dense_activations": "pooling.dense_activations",
    "dense_bias": "pooling.dense_bias",
    "layer_norm": "pooling.layer_norm",
    "query_prompt": "text.query_prompt",
    "document_prompt": "text.document_prompt",
    "query_max_tokens": "text.query_max_tokens",
    "document_max_tokens": "text.document_max_tokens",
    "append_eos": "text.append_eos",
}
"""The option that overrides each setting."""

SIDES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""The prompts of each side, by the names that sentence-transformers knows, the first one first."""

TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Where sentence-transformers keeps the settings of its Transformer, by version."""

_MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize")
_HARMLESS_ARGUMENTS = {
    "attn_implementation",
    "device_map",
    "dtype",
    "model_max_length",
    "padding_side",
    "torch_dtype",
    "trust_remote_code",
    "use_cache",
    "use_safetensors",
}
"""Arguments for loading that don't change an embedding, and the length, which is read."""


def read_settings(name: str) -> dict[str, Any]:
    """Return what a sentence-transformers folder says, as keyword arguments of `Encoder`.

    Only what the folder tells is in the result; a plain transformers folder gives an empty one.

    Raises:
        UserError: It says something that can't be done here.
    """
    modules = _read_json(name, "modules.json")
    if modules is None:
        return {}
    own = _read_object(name, SETTINGS_FILE)
    settings = _settings_of_modules(
        name, modules, own.pop("pooling", None), own.pop("pooling_options", {})
    )
    settings |= _settings_of_transformer(name)
    settings |= _settings_of_model(name, normalize=settings["normalize"])
    if "append_eos" in own:
        append_eos = own.pop("append_eos")
        if not isinstance(append_eos, bool):
            raise UserError(f"{name!r}: append_eos in {SETTINGS_FILE} is neither true nor false")
        settings["append_eos"] = append_eos
    return settings | _own_lengths(name, own, settings)


def merged_settings(name: str, **given: Any) -> dict[str, Any]:
    """Return a folder's settings, overridden by those that are given (None: not given).

    Each that is given and differs from what the folder says is told in a warning.
    """
    settings = read_settings(name)
    if given.get("pooling") not in (None, settings.get("pooling")):
        for key in ("latents", "heads"):  # They belong to the folder's own pooling,
            settings.pop(key, None)
    if given.get("dense") is not None and given["dense"] != settings.get("dense"):
        for key in ("dense_activations", "dense_bias"):  # and these to its own layers.
            settings.pop(key, None)
    for key, value in given.items():
        if value is not None and key in settings and value != settings[key]:
            log.warning(
                "%s=%s overrides what the checkpoint %s says: %s",
                OPTIONS[key], _shown(value), name, _shown(settings[key]),
            )  # fmt: skip
    return settings | {key: value for key, value in given.items() if value is not None}


def cut_lengths(
    settings: dict[str, Any], given: Mapping[str, Any], *, most: int | None, reason: str
) -> None:
    """Lower, in place, lengths that nobody asked for to what is possible.

    Args:
        settings: What `merged_settings` returned.
        given: What was asked for; a length that is None there is not.
        most: The longest that is possible; None: no limit.
        reason: Where the limit is from, for the warning that the folder's own word is not kept.
    """
    for key in LENGTHS:
        if given[key] is None and most is not None:
            said = settings.get(key)
            length = getattr(TextSettings, key) if said is None else said
            if length > most:
                settings[key] = most
                if said is not None:
                    log.warning(
                        "%s=%d, not the checkpoint's %d: %s", OPTIONS[key], most, said, reason
                    )


def tokenizer_limit(tokenizer: Any) -> int | None:
    """Return the longest text that a tokenizer says its model takes, None if it has no limit."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < NO_LIMIT else None


def cut_at_tokenizer(
    settings: dict[str, Any], given: Mapping[str, Any], tokenizer: Any, name: str
) -> None:
    """Lower, in place, lengths to what the tokenizer says; tell where more is asked for."""
    most = tokenizer_limit(tokenizer)
    cut_lengths(settings, given, most=most, reason=f"the tokenizer of {name} says so")
    for key in LENGTHS:
        if most is not None and given[key] is not None and given[key] > most:
            log.warning(
                "%s=%d overrides what the tokenizer of %s says: model_max_length is %d",
                OPTIONS[key], given[key], name, most,
            )  # fmt: skip


def _settings_of_modules(
    name: str, modules: Any, own_pooling: Any, own_options: Any
) -> dict[str, Any]:
    """Return pooling, its options and normalize.

    Args:
        name: Of the model.
        modules: What modules.json holds.
        own_pooling: The pooling that largebatch.json names, which sentence-transformers has no
            name for; None: it names none.
        own_options: Its options.
    """
    try:
        parts = [(str(module["type"]), str(module["path"])) for module in modules]
    except (TypeError, KeyError):
        raise UserError(
            f"{name!r}: modules.json is no list of modules with type and path"
        ) from None
    kinds = []
    for kind, path in parts:
        package, _, short = kind.rpartition(".")
        known = own_pooling is not None or (
            package.partition(".")[0] == "sentence_transformers" and short in _MODULES
        )
        if not known or (short == "Transformer" and path):
            raise UserError(
                f"{name!r} has the module {kind} at {path!r}, which can't be trained here; a "
                "Transformer in the folder itself, a Pooling, a Dense, a LayerNorm and a Normalize "
                "can"
            )
        kinds.append(short)
    normalize = kinds[-1:] == ["Normalize"]
    if own_pooling is not None:
        return _own_pooling(name, own_pooling, own_options) | {"normalize": normalize}
    body = kinds[1:-1] if normalize else kinds[1:]
    if kinds[:1] != ["Transformer"] or body[:1] != ["Pooling"] or "Normalize" in body:
        raise UserError(
            f"{name!r} has the modules {', '.join(kinds)}; a Transformer, a Pooling and, if "
            "embeddings have unit length, a Normalize are needed, in this order"
        )
    if normalize:
        config = _read_object(name, f"{parts[-1][1]}/config.json")
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                raise UserError(
                    f"{name!r} normalizes {config[key]} ({parts[-1][1]}/config.json), which is not "
                    "supported; only embeddings of texts are normalized here"
                )
    configs = [_read_object(name, f"{path}/config.json") for _, path in parts[1 : 1 + len(body)]]
    head = head_options(name, list(zip(body[1:], configs[1:], strict=True)))
    return {"pooling": _pooling_of(name, configs[0]), "normalize": normalize, **head}


def _own_pooling(name: str, pooling: Any, options: Any) -> dict[str, Any]:
    """Return the pooling that largebatch.json names, and its options."""
    if pooling not in POOLINGS:
        raise UserError(
            f"{name!r}: pooling={pooling!r} in {SETTINGS_FILE} is not one of {', '.join(POOLINGS)}"
        )
    try:
        PoolingConfig(mode=pooling, **options)
    except (TypeError, UserError) as error:
        raise UserError(f"{name!r}: pooling_options in {SETTINGS_FILE}: {error}") from error
    return {"pooling": pooling, **options}


def _pooling_of(name: str, config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:  # The older form: one boolean for each mode.
        prefix = "pooling_mode_"
        modes = [key[len(prefix) :] for key, on in config.items() if key.startswith(prefix) and on]
        modes = modes or ["mean"]  # As sentence-transformers takes it.
    modes = [modes] if isinstance(modes, str) else list(modes)
    short = [_short(mode) for mode in modes]
    if len(short) != 1 or short[0] not in POOLING_NAMES:
        raise UserError(
            f"{name!r} pools by {', '.join(modes)}; one of {', '.join(POOLING_NAMES)} is understood"
        )
    if not config.get("include_prompt", True):
        raise UserError(f"{name!r} leaves its prompt out of the pooling, which is not supported")
    return POOLING_NAMES[short[0]]


def _settings_of_transformer(name: str) -> dict[str, Any]:
    """Return lengths and lower case."""
    file, config = next(
        ((file, found) for file in TRANSFORMER_FILES if (found := _read_object(name, file))),
        (TRANSFORMER_FILES[0], {}),
    )
    for key, allowed in (
        ("transformer_task", (None, "feature-extraction")),
        ("module_output_name", (None, "token_embeddings")),
        ("query_length", (None,)),
        ("document_length", (None,)),
        ("query_expansion", (None, False)),
        ("processing_kwargs", (None, {})),
    ):
        if config.get(key) not in allowed:
            raise UserError(f"{name!r}: {key}={config[key]!r} in {file} is not supported")
    way = (config.get("modality_config") or {}).get("text")
    if way is not None and way.get("method_output_name") not in ("last_hidden_state", None):
        raise UserError(
            f"{name!r}: embeddings are made of {way['method_output_name']} ({file}), which is not "
            "supported; last_hidden_state is"
        )
    arguments: dict[str, Any] = {}
    for kind in ("model", "tokenizer", "processor", "config"):
        for suffix in ("args", "kwargs"):
            arguments |= config.get(f"{kind}_{suffix}") or {}
    if unknown := sorted(set(arguments) - _HARMLESS_ARGUMENTS):
        raise UserError(f"{name!r}: {', '.join(unknown)} in {file} can't be passed on to the model")
    tokenizer = _read_object(name, "tokenizer_config.json")
    settings: dict[str, Any] = {}
    for length in (
        config.get("max_seq_length"),
        arguments.get("model_max_length"),
        tokenizer.get("model_max_length"),  # Its only place since sentence-transformers 6.
    ):
        if isinstance(length, int) and length < NO_LIMIT:
            settings |= dict.fromkeys(LENGTHS, length)
            break
    if config.get("do_lower_case"):
        settings["lower_case"] = True
    return settings


def _settings_of_model(name: str, *, normalize: bool) -> dict[str, Any]:
    """Return prompts; refuse what the whole model does and an `Encoder` doesn't."""
    file = "config_sentence_transformers.json"
    config = _read_object(name, file)
    if (kind := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise UserError(f"{name!r} is a {kind} ({file}); a SentenceTransformer is needed")
    if (dim := config.get("truncate_dim")) is not None:
        raise UserError(
            f"{name!r}: truncate_dim={dim} in {file} is not supported; take the line out to train "
            "and to encode with whole embeddings"
        )
    similarity = config.get("similarity_fn_name")
    # Of vectors of unit length, dot product, cosine and distance give one order.
    if similarity not in (None, "dot", "cosine") and not (normalize and similarity == "euclidean"):
        raise UserError(
            f"{name!r}: similarity_fn_name={similarity} in {file} is not supported; "
            "embeddings are compared by dot product or cosine"
        )
    if similarity == "cosine" and not normalize:
        log.warning(
            "the checkpoint %s has no Normalize: embeddings are compared by dot product, not by "
            "the cosine that its similarity_fn_name says; pooling.normalize=true gives the cosine",
            name,
        )
    return _prompts_of(name, config, file)


def _prompts_of(name: str, config: dict[str, Any], file: str) -> dict[str, Any]:
    prompts = {key: text for key, text in (config.get("prompts") or {}).items() if text is not None}
    settings: dict[str, Any] = {}
    for side, names in SIDES.items():
        if (found := next((key for key in names if key in prompts), None)) is not None:
            settings[f"{side}_prompt"] = prompts[found]
    if (default := config.get("default_prompt_name")) is not None:
        if default not in prompts:
            raise UserError(
                f"{name!r}: default_prompt_name={default!r} in {file} is no prompt of it"
            )
        for side, names in SIDES.items():
            if default in names:
                settings["default_side"] = side
        if "default_side" not in settings:
            # A text of whichever side gets it, unless its side has a prompt of its own.
            settings = {f"{side}_prompt": prompts[default] for side in SIDES} | settings
    if not settings and any(prompts.values()):
        log.warning(
            "the checkpoint %s has prompts, but none is named after a side (%s): none is used; "
            "set text.query_prompt and text.document_prompt", name, ", ".join(prompts),
        )  # fmt: skip
    return settings


def _own_lengths(name: str, own: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the lengths that largebatch.json holds, at most what the folder says elsewhere."""
    for key, value in own.items():
        if key not in LENGTHS or not isinstance(value, int) or value < 1:
            raise UserError(f"{name!r}: {key}={value!r} in {SETTINGS_FILE} is no maximum length")
    return {key: min(value, theirs.get(key, value)) for key, value in own.items()}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and (not value or " " in value) else str(value)


def _read_object(name: str, file: str) -> dict[str, Any]:
    value = _read_json(name, file)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name!r}: {file} is no JSON object")
    return value or {}


def find_file(name: str, file: str) -> Path | None:
    """Return where a file of a model folder or of the hub's cache is; None if there is none."""
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
    return None if path is None or not Path(path).is_file() else Path(path)


def _read_json(name: str, file: str) -> Any:
    path = find_file(name, file)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
