"""Export: a folder that sentence-transformers loads without any code of ours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from largebatch.data.text import TextSettings
from largebatch.errors import UserError
from largebatch.model.lora import has_adapters, merged_state
from largebatch.model.pooling import FolderModule, Pooling
from largebatch.model.pretrained import quiet_transformers
from largebatch.model.settings import SETTINGS_FILE, find_file

WEIGHTS_FILE = "model.safetensors"


class Parts(NamedTuple):
    """What an encoder is made of."""

    backbone: Any
    """A transformers model."""
    tokenizer: Any
    pooling: Pooling
    normalize: bool
    lower_case: bool
    text: TextSettings


def save_sentence_transformer(parts: Parts, folder: Path) -> None:
    """Write backbone, tokenizer, pooling, prompts and lengths of an encoder.

    The files are those of sentence-transformers' format since its version 2, which its newer
    versions read as well. Both sides are cut at the larger of their two lengths, since the format
    has one; the two numbers themselves stand in largebatch.json for a later training.
    """
    save_settings(parts, folder)
    for path, module in _numbered(parts.pooling.folder_modules()).items():
        if module.tensors:
            tensors = {name: _savable(tensor) for name, tensor in module.tensors.items()}
            save_file(tensors, folder / path / WEIGHTS_FILE)
    with quiet_transformers():
        if has_adapters(parts.backbone):
            parts.backbone.save_pretrained(folder, state_dict=merged_state(parts.backbone))
        else:
            parts.backbone.save_pretrained(folder)


def save_settings(parts: Parts, folder: Path) -> None:
    """Write the same folder but for the weights: what `Encoder.from_settings` starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    parts.backbone.config.save_pretrained(folder)
    text, tokenizer = parts.text, parts.tokenizer
    kept = tokenizer.padding_side, tokenizer.model_max_length
    # A model with absolute positions would be wrong under left padding without position ids, which
    # sentence-transformers doesn't pass.
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = text.encode_max_tokens
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side, tokenizer.model_max_length = kept

    pooling_modules = parts.pooling.folder_modules()
    modules = [FolderModule("Transformer", {}, {}), *pooling_modules]
    if parts.normalize:
        modules.append(FolderModule("Normalize", {}, {}))
    paths = ["", *_numbered(modules[1:])]
    _write(
        folder / "modules.json",
        [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.models.{module.kind}",
            }
            for number, (path, module) in enumerate(zip(paths, modules, strict=True))
        ],
    )
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": text.encode_max_tokens, "do_lower_case": parts.lower_case},
    )
    for path, module in zip(paths[1:], modules[1:], strict=True):
        (folder / path).mkdir(exist_ok=True)
        if module.config:
            _write(folder / path / "config.json", module.config)
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": text.query_prompt, "document": text.document_prompt},
            "default_prompt_name": text.default_side,
            "similarity_fn_name": "cosine" if parts.normalize else "dot",
        },
    )
    own: dict[str, Any] = {
        "query_max_tokens": text.query_max_tokens,
        "document_max_tokens": text.document_max_tokens,
    }
    if len(pooling_modules) > 1:
        own["pooling"] = parts.pooling.name
    _write(folder / SETTINGS_FILE, own)


def load_pooling_weights(pooling: Pooling, name: str) -> None:
    """Copy the weights of a pooling, if it has any, from a folder or hub name into it.

    Raises:
        UserError: They are not there, or of another shape.
    """
    for path, module in _numbered(pooling.folder_modules()).items():
        if not module.tensors:
            continue
        file = find_file(name, f"{path}/{WEIGHTS_FILE}")
        if file is None:
            raise UserError(f"{name!r} has no {path}/{WEIGHTS_FILE}, the weights of its pooling")
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} can't be read: {error}") from error
        for name, tensor in module.tensors.items():
            if name not in found or found[name].shape != tensor.shape:
                raise UserError(f"{file} does not hold {name} of shape {list(tensor.shape)}")
            with torch.no_grad():
                tensor.copy_(found[name])


def _numbered(modules: Sequence[FolderModule]) -> dict[str, FolderModule]:
    """Return the modules behind the Transformer by the folders that they are in."""
    return {f"{number}_{module.kind}": module for number, module in enumerate(modules, start=1)}


def _savable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
