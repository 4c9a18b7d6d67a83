"""Tokens per second of MLM and RetroMAE, beside transformers' BertForMaskedLM of the same size.

    python benchmarks/token_objectives.py

One step each on one process, in float32 on the CPU: the better of two after a first one. The texts
are random tokens of one length, so that nobody pads; transformers gets the same masked batch, cut
into the same chunks, and takes the loss of all logits of a chunk. Its rows are the plain passes
only; ours are the whole step, drawing of masks included.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

HIDDEN, LAYERS, LENGTH, VOCABULARY = 128, 2, 64, 8000


def main() -> None:
    """Print a row for each way, or, as `--head`, a JSON line of the head's memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens-per-chunk", type=int, default=4096)
    parser.add_argument("--head", type=int, nargs=2, metavar=("TOKENS", "VOCABULARY"))
    options = parser.parse_args()
    if options.head is not None:
        print(json.dumps(head_peak(*options.head)))
        return
    print("| way | tokens/s | seconds |")
    print("|---|---:|---:|")
    tokens = options.texts * LENGTH
    for name, step in ways(options.texts, options.tokens_per_chunk):
        step()
        seconds = min(timed(step) for _ in range(2))
        print(f"| {name} | {tokens / seconds:,.0f} | {seconds:.2f} |", flush=True)


def timed(step: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ways(num_texts: int, tokens_per_chunk: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each way's name and one step of it."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from largebatch.batch import RankBatch, Texts
    from largebatch.config.objective import MlmConfig, RetroMaeConfig
    from largebatch.data.text import train_tokenizer
    from largebatch.model.chunks import IGNORED
    from largebatch.model.encoder import Encoder
    from largebatch.objectives.mlm import MaskedLanguageModel
    from largebatch.objectives.retromae import RetroMae
    from largebatch.parallel.collectives import Collectives
    from largebatch.parallel.ddp import Replicas
    from largebatch.step.balance import Pairs
    from largebatch.step.tokens import TokenStep

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 4 * HIDDEN,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    words = [f"word{number}" for number in range(VOCABULARY)]
    tokenizer = train_tokenizer(words, vocab_size=VOCABULARY, marks_words=True)
    generator = np.random.default_rng(0)
    ids = generator.integers(5, len(tokenizer), (num_texts, LENGTH))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    documents, none = Texts.from_lists(ids.tolist()), Texts.from_lists([[]] * num_texts)
    batch = RankBatch(none, documents, none.take(np.array([], np.int64)))

    def encoder() -> Encoder:
        torch.manual_seed(0)
        return Encoder.from_scratch("bert", tokenizer, config=sizes, pooling="cls").train()

    objectives = {
        "MLM": MaskedLanguageModel(MlmConfig()),
        "RetroMAE": RetroMae(RetroMaeConfig()),
        "DupMAE": RetroMae(RetroMaeConfig(queries="embedded", bag_of_words_weight=0.1)),
    }
    for name, objective in objectives.items():
        own = encoder()
        objective.attach(own, weights=None)
        strategy = Replicas([own, objective], Collectives())
        step = TokenStep(own, objective, tokens_per_chunk=tokens_per_chunk, strategy=strategy)
        yield name, lambda step=step: step.accumulate(batch)

    task = objectives["MLM"].make_task(Pairs.of(batch), encoder(), step=0)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**sizes)).train()
    inputs = torch.from_numpy(task.texts.tokens.astype(np.int64)).view(num_texts, LENGTH)
    labels = torch.from_numpy(task.targets["masked"].astype(np.int64)).view(num_texts, LENGTH)
    assert IGNORED == -100
    rows = tokens_per_chunk // LENGTH

    def plain() -> None:
        for first in range(0, num_texts, rows):
            part = slice(first, first + rows)
            model(input_ids=inputs[part], labels=labels[part]).loss.backward()

    yield "transformers' BertForMaskedLM", plain


def head_peak_apart(tokens: int, vocabulary: int) -> dict[str, float]:
    """Measure the head's memory in a process of its own."""
    command = [sys.executable, __file__, "--head", str(tokens), str(vocabulary)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def head_peak(tokens: int, vocabulary: int) -> dict[str, float]:
    """Return how far the peak rises over what is there before, MiB: forward and backward."""
    import torch

    from largebatch.losses.vocabulary import token_cross_entropy
    from largebatch.train.memory import bound_kernel_cache, peak_memory_gib

    bound_kernel_cache()
    cpu = torch.device("cpu")
    states = torch.randn(tokens, 32, requires_grad=True)
    weight = torch.randn(vocabulary, 32, requires_grad=True)
    bias = torch.zeros(vocabulary, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    before = peak_memory_gib(cpu)
    token_cross_entropy(states, weight, bias, targets).loss.backward()
    return {"extra_mib": (peak_memory_gib(cpu) - before) * 1024}


if __name__ == "__main__":
    main()
