"""All fast paths together, under every strategy, give the gradient of the plain full batch.

One life of the ranks takes a step on each of many paths, since starting ranks costs more than a
step; what is wrong is told path by path. Mistakes are planted in the ranks' own processes, and
vanish with them.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from all_pairs import by_first
from dist import run_ranks
from numerics.on_strategies import TOLERANCES
from numerics.reference import relative_error, tiny_encoder
from numerics.uneven import (
    CASES,
    KEEPS,
    Found,
    Paths,
    gradients_on_rank,
    plain_gradient,
)

import largebatch.model.encoder as encoder_module
import largebatch.objectives.contrastive as objective_module
import largebatch.parallel.deepspeed as deepspeed_module
import largebatch.step.false_negatives as masks_module
import largebatch.step.passes as passes_module
from largebatch.batch import LengthGroup
from largebatch.model import attention
from largebatch.parallel import fsdp
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.step.dropout import RandomState

MEAN = "longer, symmetric, mean"
CLS_DROPOUT = "longer, one way, cls, dropout"
LAST_DROPOUT = "empty, symmetric, last, dropout"
LAST = "negatives only, one way, last"
COMPILING = [name for name in TOLERANCES if name != "zero3"]
PATHS = by_first(TOLERANCES, CASES, KEEPS, ("padded", "packed"))
# Compiling takes longer than all else, so each strategy compiles one case, and keeps in each way;
# stages 0 and 1 only when all combinations are asked for, for their passes are those of stage 2.
COMPILED_PATHS = [
    pytest.param(
        name,
        [(case, keep, "compiled") for keep in KEEPS],
        id=f"{name}-{case}",
        marks=()
        if place % len(CASES) == number and name not in ("zero0", "zero1")
        else pytest.mark.exhaustive,
    )
    for place, name in enumerate(COMPILING)
    for number, case in enumerate(CASES)
]
SENDING_EARLY = ("ddp", "zero0", "zero1", "zero2")
UNITS = {"none": (4, 4), "all": (3, 3), "auto": (3, 4)}


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import and build here what each rank would after its fork."""
    tiny_encoder()
    prepare(torch.device("cpu"))


@pytest.fixture(scope="module")
def dynamo():
    """Compile something here, which imports a lot."""
    torch.compile(torch.nn.Linear(2, 2), backend="aot_eager", dynamic=True)(torch.ones(2, 2))


def errors(name: str, paths: list[Paths], plant=None) -> dict[Paths, float]:
    """Return the largest relative error of loss and gradients over two ranks, path by path."""
    ranks = run_ranks(planted_on_rank, 2, plant, name, paths, timeout_s=300)
    found_errors = {}
    for one in paths:
        value, expected = plain_gradient(CASES[one.case], one.how, name in SENDING_EARLY)
        found = [rank[one] for rank in ranks]
        found_errors[one] = max(
            *(abs(rank.loss / value - 1) for rank in found),
            *(relative_error(rank.gradients, expected) for rank in found),
        )
        if plant is None:
            assert_taken(one, found)
    return found_errors


def planted_on_rank(plant, name: str, paths: list[Paths]) -> dict[Paths, Found]:
    if plant is not None:
        plant()
    return gradients_on_rank(name, paths)


def assert_taken(one: Paths, ranks: list[Found]) -> None:
    """Check that the paths were really taken."""
    assert ranks[0].num_chunks != ranks[1].num_chunks, one
    assert sum(rank.num_repeated_tokens for rank in ranks) > 0, one
    assert (sum(rank.num_padding_tokens for rank in ranks) == 0) == (one.how == "packed"), one
    lowest, highest = UNITS[one.keep]
    units = [rank.units for rank in ranks if rank.num_chunks]
    assert all(lowest <= number <= highest for number in units), one
    if one.how != "compiled" and one.keep == "auto":
        assert any(lowest < number < highest for number in units), one


def assert_exact(name, paths):
    found = errors(
        name, sorted((Paths(*one) for one in paths), key=lambda one: (one.case, one.how))
    )
    assert {one: error for one, error in found.items() if not error < TOLERANCES[name]} == {}


@pytest.mark.parametrize(("name", "paths"), PATHS)
def test_gradient_is_that_of_the_full_batch(name, paths):
    assert_exact(name, paths)


@pytest.mark.parametrize(("name", "paths"), COMPILED_PATHS)
# Dynamo looks at the attribute of every tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("dynamo")
def test_gradient_of_compiled_layers_is_that_of_the_full_batch(name, paths):
    assert_exact(name, paths)


def replay_without_its_random_state():
    """Chunks that kept nothing draw other dropout masks when they are embedded again."""

    @contextmanager
    def not_replayed(_):
        yield

    RandomState.replayed = not_replayed


def kept_graphs_are_pushed_again():
    """What kept its graph is embedded again all the same, and counts twice."""
    plain = passes_module.Passes._push

    def push(self, passes, *arguments):
        kept = [one._replace(embeddings_nd=None) for one in passes if one.kept_tokens]
        plain(self, [*passes, *kept], *arguments)

    passes_module.Passes._push = push


def packed_texts_see_each_other():
    """Attention in a packed row knows no boundaries."""
    plain = attention.packed_attention

    def attend(*arguments, packing=None, **options):
        if packing is not None:
            packing = packing._replace(groups=(LengthGroup(1, packing.position_ids.numel()),))
        return plain(*arguments, packing=packing, **options)

    attention.packed_attention = attend


def packed_positions_go_on():
    """A packed text's positions are counted from the beginning of the row."""
    plain = encoder_module.run_packed

    def run(backbone, input_ids, packing, **options):
        going_on = torch.arange(input_ids.numel())[None] % 48
        return plain(backbone, input_ids, packing._replace(position_ids=going_on), **options)

    encoder_module.run_packed = run


def padding_is_attended_to():
    """The mask is of ones, whatever is padded."""
    plain = encoder_module.pad_chunks

    def pad(*arguments, **options):
        return [
            chunk._replace(attention_mask=torch.ones_like(chunk.attention_mask))
            for chunk in plain(*arguments, **options)
        ]

    encoder_module.pad_chunks = pad


def last_layer_at_another_token():
    """What is pooled is the token before the right one, or behind it."""
    plain = encoder_module.pooled_tokens

    def tokens(token, chunk):
        step = 1 if token == "first" else -1
        return (plain(token, chunk) + step).clamp(0, chunk.input_ids.numel() - 1)

    encoder_module.pooled_tokens = tokens


def last_layer_pools_the_text_before():
    """Each text gets the pooled token of its neighbour in the chunk."""
    plain = encoder_module.pooled_tokens
    encoder_module.pooled_tokens = lambda token, chunk: plain(token, chunk).roll(1)


def fillers_have_a_gradient():
    """Chunks that only make counts equal push something into the weights."""
    plain = passes_module._gradient_of

    def gradient(one, *arguments):
        found = plain(one, *arguments)
        return found if len(one.rows_n) else torch.ones_like(found)

    passes_module._gradient_of = gradient


def duplicates_count_once():
    """A text that occurs several times gets the gradient of its first occurrence only."""
    gather_rows = Collectives.gather_rows
    evaluate = objective_module.ContrastiveLoss.compute

    def first_only(rows):
        same = (rows[:, None] == rows).all(2)
        return torch.where(~same.tril(-1).any(1, keepdim=True), rows, rows.detach())

    def gather(self, own, *arguments, **options):
        return gather_rows(self, first_only(own), *arguments, **options)

    def evaluate_first(self, batch):
        return evaluate(self, batch._replace(queries_bd=first_only(batch.queries_bd)))

    Collectives.gather_rows = gather
    objective_module.ContrastiveLoss.compute = evaluate_first


def rows_stay_in_the_order_of_chunks():
    """Embeddings are not brought back into the order of the texts."""
    plain = encoder_module.Encoder.make_chunks

    def make(self, texts, tokens_per_chunk):
        plan, chunks = plain(self, texts, tokens_per_chunk)
        starts = [sum(len(rows) for rows in plan[:number]) for number in range(len(plan))]
        return [
            rows * 0 + start + range(len(rows)) for rows, start in zip(plan, starts, strict=True)
        ], chunks

    encoder_module.Encoder.make_chunks = make


def duplicates_on_other_ranks_are_negatives():
    """A rank knows its own texts only."""
    plain = masks_module.FalseNegatives

    def of_own(of_ranks, *, rank, **options):
        strangers = [
            hashes._make(None if part is None else part + number + 1 for part in hashes)
            if number != rank
            else hashes
            for number, hashes in enumerate(of_ranks)
        ]
        return plain(strangers, rank=rank, **options)

    masks_module.FalseNegatives = of_own


def records_are_not_known():
    """False negatives are found by their texts, not by their records."""
    plain = objective_module.ContrastiveLoss.knowledge

    def knowledge(self, pairs):
        return plain(self, pairs._replace(id_hashes=None))

    objective_module.ContrastiveLoss.knowledge = knowledge


def columns_of_this_rank_only():
    """Documents look for their queries among those of their own rank."""
    plain = Collectives.combine

    def combine(self, logsumexps_m, highest_m, sums_k):
        _, highest_m, sums_k = plain(self, logsumexps_m, highest_m, sums_k)
        return logsumexps_m, highest_m, sums_k

    Collectives.combine = combine


def temperature_is_not_averaged():
    """Beside the sharded encoder, the temperature keeps its own rank's gradient."""
    fsdp.one_reduction = lambda *_: nullcontext()


def last_pass_is_not_announced():
    """The strategy waits for a last backward pass that never comes."""
    plain = fsdp.FullyShardedModel._backward

    def backward(self, outputs, gradients, *, last):
        plain(self, outputs, gradients, last=False)

    fsdp.FullyShardedModel._backward = backward


def last_chunk_only():
    """What DeepSpeed's stages 1 and 2 hold after a plain backward pass per chunk."""
    plain = deepspeed_module.DeepSpeedModel._backward

    def backward(self, outputs, gradients, *, last):
        if last:
            plain(self, outputs[-1:], gradients[-1:], last=last)

    deepspeed_module.DeepSpeedModel._backward = backward


MISTAKES = [
    (replay_without_its_random_state, "ddp", (CLS_DROPOUT, "none", "padded")),
    (replay_without_its_random_state, "fsdp", (LAST_DROPOUT, "auto", "packed")),
    (kept_graphs_are_pushed_again, "ddp", (MEAN, "auto", "packed")),
    (packed_texts_see_each_other, "fsdp", (MEAN, "all", "packed")),
    (packed_positions_go_on, "ddp", (LAST, "none", "packed")),
    (padding_is_attended_to, "fsdp", (MEAN, "none", "padded")),
    (last_layer_at_another_token, "ddp", (LAST, "all", "padded")),
    (last_layer_at_another_token, "ddp", (CLS_DROPOUT, "auto", "packed")),
    (last_layer_pools_the_text_before, "ddp", (LAST, "none", "packed")),
    (fillers_have_a_gradient, "fsdp", (MEAN, "all", "packed")),
    (fillers_have_a_gradient, "zero3", (LAST_DROPOUT, "none", "padded")),
    (duplicates_count_once, "ddp", (MEAN, "none", "packed")),
    (rows_stay_in_the_order_of_chunks, "ddp", (MEAN, "all", "padded")),
    (duplicates_on_other_ranks_are_negatives, "ddp", (MEAN, "none", "padded")),
    (records_are_not_known, "ddp", (MEAN, "none", "padded")),
    (columns_of_this_rank_only, "ddp", (MEAN, "none", "padded")),
    (temperature_is_not_averaged, "fsdp", (MEAN, "none", "padded")),
    (last_pass_is_not_announced, "fsdp", (MEAN, "none", "padded")),
    (last_chunk_only, "zero2", (MEAN, "none", "padded")),
]


@pytest.mark.parametrize(
    ("plant", "name", "paths"),
    MISTAKES,
    ids=[f"{plant.__name__}-{name}-{', '.join(paths)}" for plant, name, paths in MISTAKES],
)
def test_mistakes_are_seen(plant, name, paths):
    one = Paths(*paths)
    assert errors(name, [one], plant)[one] > 1e-3
