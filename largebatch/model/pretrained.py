"""Models and tokenizers from folders, the hub or a config, with errors that one can act on."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.config import suggest
from largebatch.errors import UserError

log = logging.getLogger(__name__)


NOT_IN_ITS_CONFIG = {
    "deberta-v2": (
        "attention_head_size",
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "norm_rel_ebd",
        "position_buckets",
        "share_att_key",
    )
}
"""Entries that an architecture reads, though its config doesn't list them: DeBERTa-v3's."""


def load_backbone(name: str, *, attention: str) -> nn.Module:
    """Load a pre-trained transformers model in float32.

    Raises:
        UserError: There is no such model, it has no safetensors that can be read or they lack
            weights, or it is of a kind that can't be trained here.
    """
    from transformers import AutoConfig, AutoModel

    check_model_folder(name)
    with _explained(lambda error: _model_error(name, error)):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _prepare(config)
        with quiet_transformers():
            model, loading = AutoModel.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation=_usable_attention(config, attention),
                ignore_mismatched_sizes=True,  # They are told below, with their names.
                output_loading_info=True,
            )
    backbone = _finished(model)
    _check_complete(name, backbone, loading)
    return backbone


def backbone_from_config(folder: Path, *, attention: str) -> nn.Module:
    """Return an untrained model, in float32, by the config.json of a folder.

    Raises:
        UserError: transformers can't build it.
    """
    from transformers import AutoConfig

    with _explained(lambda error: _model_error(str(folder), error)):
        model = _untrained(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), attention=attention
        )
    return _finished(model)


def new_backbone(
    model_type: str, tokenizer: Any, *, config: Mapping[str, Any], attention: str
) -> nn.Module:
    """Return an untrained model of a transformers architecture, in float32.

    Raises:
        UserError: transformers has no such architecture, its config no such entry, or it is of a
            kind that can't be trained here.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"backbone.model_type={model_type!r} is no architecture of transformers"
            f"{suggest(model_type, CONFIG_MAPPING.keys())}"
        )
    known = [
        *AutoConfig.for_model(model_type).to_dict(),
        *NOT_IN_ITS_CONFIG.get(model_type, ()),
    ]
    for key in config:
        if key not in known:
            raise UserError(
                f"backbone.config.{key} is no entry of {model_type}'s config{suggest(key, known)}"
            )
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if name in known and hasattr(tokenizer, name)
    }
    entries: dict[str, Any] = {"vocab_size": len(tokenizer), **ids, **_fewer_heads(known, config)}
    with _explained(lambda error: UserError(f"backbone.config of {model_type}: {_reason(error)}")):
        model = _untrained(AutoConfig.for_model(model_type, **entries), attention=attention)
    return _finished(model)


def _fewer_heads(known: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose heads of keys are no more than those of queries, where it says nothing.

    An architecture's own default is meant for its own number of heads.
    """
    name, heads = "num_key_value_heads", config.get("num_attention_heads")
    return {**({name: heads} if name in known and heads else {}), **config}


def outline(
    name: str | None, model_type: str, config: Mapping[str, Any], *, vocab_size: int, attention: str
) -> nn.Module:
    """Return a backbone without numbers, on the meta device: its modules and the weights' names.

    Args:
        name: Folder or hub name; None: by `model_type` and `config`.
        model_type: As `new_backbone`.
        config: As `new_backbone`.
        vocab_size: Of a tokenizer that need not be there yet.
        attention: transformers' attention implementation.

    Raises:
        UserError: As `load_backbone` and `new_backbone`, but for the weights.
    """
    from transformers import AutoConfig

    with torch.device("meta"):
        if name is None:
            return new_backbone(model_type, range(vocab_size), config=config, attention=attention)
        check_model_folder(name)
        with _explained(lambda error: _model_error(name, error)):
            found = AutoConfig.from_pretrained(name, trust_remote_code=False)
            return _finished(_untrained(found, attention=attention))


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder or by hub name.

    Raises:
        UserError: There is none.
    """
    from transformers import AutoTokenizer

    check_model_folder(name, weights=False)
    with _explained(lambda error: _model_error(name, error)):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


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


def _prepare(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{config.model_type} is an encoder-decoder; an encoder or a decoder is needed"
        )
    if config.architectures is None:
        config.architectures = []  # AutoModel looks into it where it has several classes.
    if hasattr(config, "use_cache"):
        config.use_cache = False  # Keys and values of earlier tokens are only for generation.
    if hasattr(config, "attention_type") and hasattr(config, "num_random_blocks"):
        # BigBird draws at random what long texts attend to, and counts padding in their length.
        config.attention_type = "original_full"


def _usable_attention(config: Any, attention: str) -> str:
    """Return `attention`, or eager where the architecture has no sdpa."""
    from transformers import MODEL_MAPPING

    kinds: Any = MODEL_MAPPING.get(type(config), ())
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if attention != "sdpa" or all(kind._supports_sdpa for kind in kinds):
        return attention
    log.info("attention is eager: transformers has no sdpa for %s", config.model_type)
    return "eager"


def _untrained(config: Any, *, attention: str) -> Any:
    from transformers import AutoModel

    _prepare(config)
    return AutoModel.from_config(
        config, attn_implementation=_usable_attention(config, attention), dtype=torch.float32
    )


def _finished(model: nn.Module) -> nn.Module:
    # No pooling here uses the pooler of BERT's kind. It stays, untrained, so that whoever loads the
    # exported model is not warned of missing weights.
    if isinstance(pooler := getattr(model, "pooler", None), nn.Module):
        pooler.requires_grad_(False)
    return model


def _check_complete(name: str, model: nn.Module, loading: Mapping[str, Any]) -> None:
    """Check that the files hold all weights that embeddings depend on: transformers draws others.

    Weights that the model has no place for, such as a head for masked words, are fine.
    """
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return  # It is refused for what it is (see probe.py): only its encoder may be here.
    needed = [key for key, weight in model.named_parameters() if weight.requires_grad]
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    for what, keys in (
        ("lack", loading["missing_keys"] - mismatched),
        ("have another shape for", mismatched),
    ):
        if found := [key for key in needed if key in keys]:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise UserError(
                f"the weights of {name!r} {what} {len(found)} of the {len(needed)} that its "
                f"config.json asks for ({shown}), which would be random; take a whole copy, or the "
                "config.json that belongs to them"
            )


@contextmanager
def _explained(explain: Callable[[Exception], UserError]) -> Iterator[None]:
    """Turn whatever transformers raises at a file or config of others into a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise explain(error) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its report of unused weights while loading."""
    from transformers.utils import logging

    if not torch.cuda.is_available():
        # accelerate, which peft brings, imports deepspeed whenever a model is saved; that would
        # print a line about there being no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
    reason = _reason(error)
    if Path(name).expanduser().is_dir():
        return UserError(f"model folder {name!r} can't be loaded: {reason}")
    return UserError(
        f"model {name!r} is no folder here, and as a hub name it can't be loaded: {reason}"
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error, and the second one if the first leads to it."""
    first, *others = str(error).strip().splitlines() or [""]
    reason = f"{first} {others[0].strip()}" if first.endswith(":") and others else first
    if isinstance(error, (OSError, ValueError, ImportError)):
        return reason
    return f"{type(error).__name__}: {reason}"
