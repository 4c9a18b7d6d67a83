"""What the engine asks of an objective, and what it answers the loop.

An objective is a module: its parameters are what is trained beside the encoder, such as a
temperature or a decoder. There are two kinds, each exact on any number of ranks with uneven parts:

- An `EmbeddingObjective` is a function of the embeddings of a global batch. It runs through the
  cached step (gradcache.py).
- A `TokenObjective` is a sum over the tokens of chunks, such as masked language modelling. It needs
  no gather (tokens.py).

A new one is a subclass in a file of `largebatch/objectives/`. Nothing else names it.

Shapes: b pairs and n negatives of this rank, m rows of all ranks, d embedding width.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from largebatch.batch import Int64Array, IntArray, RankBatch, Texts
from largebatch.config import LossOptions
from largebatch.model.chunks import TokenChunk
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs
from largebatch.step.memory import StepMemory

if TYPE_CHECKING:
    from largebatch.config import TrainConfig
Side = Literal["query", "document", "negative"]


class Work(NamedTuple):
    """What the encoder had to do for a step, on this rank."""

    num_tokens: int
    """Tokens of the texts that this rank embeds."""
    num_encoded_tokens: int
    """Those that went through the encoder: of identical texts only the first's."""
    num_padded_tokens: int
    """The same, padding included."""
    num_chunks: int
    """Chunks of this rank."""
    forwards: float
    """Work of the step's encoder passes: a forward pass is 1, a backward pass 2. So 4 with nothing
    kept, 3 with everything."""


class StepReport(NamedTuple):
    """What a step found out on the way; tensors have not been waited for."""

    loss: Tensor
    """Scalar, the mean over the global batch, the same on all ranks, without a graph."""
    metrics: Mapping[str, Tensor]
    """Scalars by name, over the global batch and so the same on all ranks."""
    is_finite: Tensor
    """Bool scalar, whether all that this rank's encoder gave is finite."""
    work: Work
    """What it took."""


class Step(Protocol):
    """Puts the gradient of a global batch into `.grad` of all modules, on all ranks."""

    memory: StepMemory
    """How much a step takes: what was chosen, measured or halved. A run that is resumed sets it
    again, so that it goes on with the same numbers."""

    def accumulate(self, batch: RankBatch) -> StepReport:
        """Add the gradient of the global batch to `.grad`; all ranks must call it."""

    def choose_tokens_per_chunk(self, batch: RankBatch) -> int:
        """Set the tokens per chunk to the fastest for such a batch, and return them.

        All ranks must call it.
        """


class SourceNote(NamedTuple):
    """What a warning says of a source that a batch is from."""

    name: str
    """Its name in the config."""
    mask_same_id: bool
    """Whether its records with the same id answer the same query."""


class Objective(nn.Module, ABC):
    """What is optimized.

    Its parameters stay whole on every rank, so they should be few beside the encoder's. A weight of
    the encoder that it uses too must not be registered in it a second time.
    """

    fields: ClassVar[tuple[str, ...]] = ("query", "document")
    """Fields of a record that it needs; of query, document, negatives."""
    source_options: ClassVar[tuple[str, ...]] = ()
    """Entries of `data.sources.NAME.loss` that it heeds."""
    options: ClassVar[tuple[str, ...]] = ()
    """Entries of `objective` that it heeds, of those that stand in no mapping of one objective."""

    def needs(self, options: LossOptions) -> Sequence[str]:  # noqa: ARG002
        """Return which fields it needs of the records of a source with these options."""
        return self.fields

    def meet(self, encoder: Encoder) -> None:
        """Look at the encoder that is trained, once, before the first step.

        Raises:
            UserError: The two don't fit together.
        """

    def fingerprints(self) -> Mapping[str, str]:
        """Return hashes of what it has read beside the data, by option.

        A run that is resumed must find the same.
        """
        return {}

    def after_step(self) -> None:
        """Do what follows an optimizer step, such as clamping a temperature."""

    def warning(self, metrics: Mapping[str, float], sources: Sequence[SourceNote]) -> str | None:
        """Return what a person should be told of a step's metrics, once in a run; else None.

        Args:
            metrics: What the step reported.
            sources: Those that the batch is from.
        """

    def why_not_finite(self, config: "TrainConfig") -> str | None:
        """Return what to change where the loss is not finite though the encoder's outputs are."""


class Facts(NamedTuple):
    """What a rank tells all others of its part before it is embedded."""

    num_pairs: int
    num_negatives: int
    known: Mapping[str, Int64Array]
    """What the objective asked for, by name."""

    def count(self, sides: Collection[str]) -> int:
        """Return how many texts some sides of the rank have together."""
        sizes = {
            "query": self.num_pairs,
            "document": self.num_pairs,
            "negative": self.num_negatives,
        }
        return sum(sizes[side] for side in sides)


class EmbeddedBatch(NamedTuple):
    """A global batch as an objective sees it on a rank: b pairs and n negatives of this rank."""

    queries_bd: Tensor
    documents_bd: Tensor
    """Each the positive of the query in the same row."""
    negatives_nd: Tensor
    negative_counts: Int64Array | None
    """`[b]` on the host, how many of the negatives are each query's own, in the queries' order;
    None: they are nobody's own."""
    gathered_md: Tensor | None
    """The sides that the objective gathers, of all ranks: rank after rank, and on each rank
    queries, documents, negatives. Its gradient goes back to the rows' owners. None: it gathers
    none."""
    first_gathered: int
    """Which row of `gathered_md` is this rank's first."""
    facts: Sequence[Facts]
    """Of each rank."""
    pairs: Pairs
    """This rank's texts, as the encoder saw them, in the rows' order."""
    options: LossOptions
    """What the batch's source asks for."""
    collectives: Collectives
    """How ranks reach each other."""
    step: int = 0
    """Number of the optimizer step, from 0."""

    @property
    def num_pairs(self) -> int:
        """Pairs of all ranks."""
        return sum(one.num_pairs for one in self.facts)

    def own_share(self, sum_over_rows: Tensor) -> Tensor:
        """Return what to back-propagate for a sum over this rank's rows.

        It is divided by (rows of all ranks / world size), the plain mean where ranks have equally
        many. Strategies average gradients over ranks: that average, and nothing else, is the
        gradient of the mean over the global batch, for all weights at once.
        """
        return sum_over_rows / (self.num_pairs / self.collectives.world.size)

    def mean_over_rows(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> "ObjectiveValue":
        """Return the value of an objective that is a mean over rows: one all-reduce.

        Args:
            loss: Scalar, the sum over this rank's rows.
            metrics: Scalars by name, sums over this rank's rows too.
        """
        sums = torch.stack([loss.detach(), *(one.detach().to(loss) for one in metrics.values())])
        means = self.collectives.sum(sums) / self.num_pairs
        return ObjectiveValue(
            self.own_share(loss), means[0], dict(zip(metrics, means[1:], strict=True))
        )


class ObjectiveValue(NamedTuple):
    """The loss of a global batch, as a rank sees it."""

    own_share: Tensor
    """Scalar to back-propagate: its gradients, averaged over ranks, are the global batch's."""
    loss: Tensor
    """Scalar without a graph, the same on all ranks: the mean over the global batch."""
    metrics: Mapping[str, Tensor]
    """Scalars by name, likewise."""


class EmbeddingObjective(Objective):
    """An objective that is a function of the embeddings of a global batch."""

    def knowledge(self, pairs: Pairs) -> Mapping[str, Int64Array]:  # noqa: ARG002
        """Return numbers that all ranks need of each other's pairs, such as hashes of texts.

        The names must be the same on all ranks.
        """
        return {}

    @abstractmethod
    def gathered_sides(self, options: LossOptions) -> Collection[Side]:
        """Return which embeddings every rank needs of all ranks."""

    @abstractmethod
    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss; called by all ranks, whose rows differ in number and may be none.

        Its graph must reach the embeddings, and `gathered_md` if there is one, on every rank, also
        on one without rows: their gradient is added up over ranks.
        """


class TokenTask(NamedTuple):
    """What is to be predicted of some texts."""

    texts: Texts
    """What goes through the encoder."""
    targets: Mapping[str, IntArray]
    """By name, a number for each token of the texts; `IGNORED` where nothing is predicted."""
    num_predicted: int
    """Tokens that the mean runs over."""


class TokenSums(NamedTuple):
    """What a chunk adds to the loss."""

    loss: Tensor
    """Scalar, the sum over predicted tokens."""
    metrics: Mapping[str, Tensor]
    """Scalars by name, likewise: those of `metric_names`."""


class TokenObjective(Objective):
    """An objective that is a sum over tokens of chunks, each of which is done with at once."""

    metric_names: ClassVar[tuple[str, ...]] = ()
    """Of the metrics that `chunk_sums` returns."""

    @abstractmethod
    def make_task(self, pairs: Pairs, encoder: Encoder, *, step: int) -> TokenTask:
        """Return what to predict of a rank's pairs, on the host.

        Args:
            pairs: This rank's; which rank has a pair must not matter.
            encoder: Has the tokenizer.
            step: Of the run, from 0.
        """

    @abstractmethod
    def chunk_sums(self, encoder: Encoder, chunk: TokenChunk) -> TokenSums:
        """Return the sums over a chunk; this is one forward pass, with a graph."""
