"""Export: a folder that sentence-transformers loads without any code of ours."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.model.pretrained import quiet_transformers
from largebatch.model.settings import POOLING_NAMES, SETTINGS_FILE

if TYPE_CHECKING:
    from largebatch.model.encoder import Encoder


def save_sentence_transformer(encoder: "Encoder", folder: Path) -> None:
    """Write backbone, tokenizer, pooling, prompts and lengths of an encoder.

    The files are those of sentence-transformers' format since its version 2, which its newer
    versions read as well. Both sides are cut at the larger of their two lengths, since the format
    has one; the two numbers themselves stand in largebatch.json for a later training.
    """
    save_settings(encoder, folder)
    with quiet_transformers():
        encoder.backbone.save_pretrained(folder)  # type: ignore[operator]


def save_settings(encoder: "Encoder", folder: Path) -> None:
    """Write the same folder but for the weights: what `Encoder.from_settings` starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.backbone.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    text = encoder.text
    tokenizer = encoder.tokenizer
    kept = tokenizer.padding_side, tokenizer.model_max_length
    # A model with absolute positions would be wrong under left padding without position ids, which
    # sentence-transformers doesn't pass.
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = text.encode_max_tokens
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side, tokenizer.model_max_length = kept

    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if encoder.normalize:
        modules.append(("2_Normalize", "Normalize"))
    _write(
        folder / "modules.json",
        [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, (path, kind) in enumerate(modules)
        ],
    )
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": text.encode_max_tokens, "do_lower_case": encoder.lower_case},
    )
    theirs = {ours: name for name, ours in POOLING_NAMES.items()}[encoder.pooling]
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": encoder.embedding_width,
            "pooling_mode_cls_token": theirs == "cls",
            "pooling_mode_mean_tokens": theirs == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": theirs == "weightedmean",
            "pooling_mode_lasttoken": theirs == "lasttoken",
            "include_prompt": True,
        },
    )
    if encoder.normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": text.query_prompt, "document": text.document_prompt},
            "default_prompt_name": text.default_side,
            "similarity_fn_name": "cosine" if encoder.normalize else "dot",
        },
    )
    _write(
        folder / SETTINGS_FILE,
        {
            "query_max_tokens": text.query_max_tokens,
            "document_max_tokens": text.document_max_tokens,
        },
    )


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
