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
from largebatch.model.head import Head
from largebatch.model.lora import has_adapters, merged_state
from largebatch.model.pooling import FolderModule, Pooling
from largebatch.model.pretrained import load_tokenizer, quiet_transformers
from largebatch.model.settings import SETTINGS_FILE, find_file

WEIGHTS_FILE = "model.safetensors"


class Parts(NamedTuple):
    """What an encoder is made of."""

    backbone: Any
    """A transformers model."""
    tokenizer: Any
    pooling: Pooling
    head: Head | None
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
    for path, module in _numbered(modules_of(parts.pooling, parts.head)).items():
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
    _save_tokenizer(tokenizer, folder)
    tokenizer.padding_side, tokenizer.model_max_length = kept

    pooling_modules = parts.pooling.folder_modules()
    modules = [FolderModule("Transformer", {}, {}), *modules_of(parts.pooling, parts.head)]
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
                "type": f"{module.package}.{module.kind}",
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
    if text.append_eos is not None:
        own["append_eos"] = text.append_eos
    if [module.kind for module in pooling_modules] != ["Pooling"]:
        own["pooling"] = parts.pooling.name
        own["pooling_options"] = options_of(parts.pooling, parts.head)
    _write(folder / SETTINGS_FILE, own)


def modules_of(pooling: Pooling, head: Head | None) -> list[FolderModule]:
    """Return the modules between the Transformer and the Normalize."""
    return [*pooling.folder_modules(), *(head.folder_modules() if head is not None else ())]


def options_of(pooling: Pooling, head: Head | None) -> dict[str, Any]:
    """Return the options of `pooling` that make a pooling and a head, but for its mode."""
    options = {**pooling.option_values, "dense": [], "layer_norm": False}
    if head is not None:
        settings = head.settings
        options |= {"dense": list(settings.widths), "layer_norm": settings.layer_norm}
        if settings.widths:
            options["dense_activations"] = list(settings.activations)
            options["dense_bias"] = settings.has_bias
    return options


def load_module_weights(
    pooling: Pooling, head: Head | None, name: str, *, skip_pooling: bool, skip_head: bool
) -> None:
    """Copy the weights of a pooling and a head, if they have any, from a folder or hub name.

    Args:
        pooling: As the folder's, unless it is skipped.
        head: As the folder's, unless it is skipped.
        name: Folder or hub name.
        skip_pooling: Whether the pooling keeps its weights.
        skip_head: Whether the head does.

    Raises:
        UserError: They are not there, or of another shape.
    """
    num_pooling = len(pooling.folder_modules())
    for number, (path, module) in enumerate(_numbered(modules_of(pooling, head)).items()):
        if not module.tensors or (skip_pooling if number < num_pooling else skip_head):
            continue
        file = find_file(name, f"{path}/{WEIGHTS_FILE}")
        if file is None:
            raise UserError(f"{name!r} has no {path}/{WEIGHTS_FILE}, weights that it needs")
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} can't be read: {error}") from error
        for key, tensor in module.tensors.items():
            if key not in found or found[key].shape != tensor.shape:
                raise UserError(f"{file} does not hold {key} of shape {list(tensor.shape)}")
            with torch.no_grad():
                tensor.copy_(found[key])


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer such that transformers, which may build it anew, gives the same tokens.

    Raises:
        UserError: It gives others.
    """
    tokenizer.save_pretrained(folder)
    if _comes_back(tokenizer, folder):
        return
    # Some of its classes forget what tokenizer.json says; this one does as it says.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    _write(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if not _comes_back(tokenizer, folder):
        raise UserError(
            "the tokenizer can't be exported: transformers would load it as "
            f"{type(load_tokenizer(str(folder))).__name__}, which gives other tokens; take the "
            "tokenizer that belongs to the architecture, by backbone.tokenizer"
        )


def _comes_back(tokenizer: Any, folder: Path) -> bool:
    """Return whether the tokenizer of a folder gives the same tokens."""
    again = load_tokenizer(str(folder))
    if len(again) != len(tokenizer):
        return False
    known = tokenizer.decode(list(range(min(len(tokenizer), 100))), skip_special_tokens=True)
    # In lower case: what puts texts in lower case is not the tokenizer's class alone.
    texts = ["", "the quick brown fox: 1,234 words.", known.lower()]
    return all(
        again(text, truncation=cut, max_length=6)["input_ids"]
        == tokenizer(text, truncation=cut, max_length=6)["input_ids"]
        for text in texts
        for cut in (True, False)
    )


def _numbered(modules: Sequence[FolderModule]) -> dict[str, FolderModule]:
    """Return the modules behind the Transformer by the folders that they are in."""
    return {f"{number}_{module.kind}": module for number, module in enumerate(modules, start=1)}


def _savable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
