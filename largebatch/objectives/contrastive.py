"""Contrastive learning: each query is told from the documents of the whole global batch (InfoNCE).

Each rank computes its own rows of the loss against the columns of all ranks: the documents, and
the records' negatives where every query is contrasted with them; for some losses queries as well.
Every loss is, for pair i and s(a, b) the similarity over the temperature,

    L_i = -s(q_i, d_i) + log Z_i

and they differ in what Z_i sums, beside e^s(q_i, d_i) once. The presets of conf/objective:

    infonce     e^s(q_i, d_j), j != i, and all negatives n: e^s(q_i, n)         (arXiv 1807.03748)
    symmetric   half of that, and half with sum_j e^s(q_j, d_i) for Z           (arXiv 2103.00020)
    gte         infonce + sum_{j != i} (e^s(q_i, q_j) + e^s(d_j, d_i)) + sum_j e^s(q_j, d_i),
                where j = i is the pair a second time                           (arXiv 2308.03281)
    simlm       as gte, but j != i in the last sum, too     (of SimLM's code; arXiv 2207.02578)
    qwen3       e^s(q_i, d_j) + e^s(q_i, q_j) + e^s(d_i, d_j), j != i, + the record's own negatives;
                what scores above the own document's cosine + 0.1 is left out   (arXiv 2506.05176)
    f2llm       infonce without negatives, and a second loss of which Z sums the record's own
                negatives only; both are added                                  (arXiv 2510.02294)
    gist        infonce; what a guide scores above the own document is left out (arXiv 2402.16829)
    own_negatives   the record's own negatives, and nothing else of the batch

In all of them false negatives by text are left out, which these sources don't do, but where they
look for equal documents; `objective.mask_duplicates=false` is the formula as it stands. GTE has no
hard negatives at this stage; where records have some, they are compared with queries only, as in
SimLM, while sentence-transformers compares them with documents too. Qwen3's mask looks, for d_i
with d_j, at the score of these two, as it does for two queries: that is our reading of it.
(ms-swift masks no score of two documents, compares a document with the batch's hard negatives as
well, and has all of this off by default.) Where GISTEmbed compares queries with queries and
documents with documents, name them in `objective.candidates`.

Shapes: b queries of this rank, n negatives of this rank, m columns, d embedding width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Int64Array
from largebatch.config import QUERY_DOCUMENT, LossOptions, ObjectiveConfig
from largebatch.errors import UserError
from largebatch.losses.candidates import (
    Candidates,
    log_sum_exp,
    log_sum_exps,
    losses_of_rows,
    own_log_sum_exps,
)
from largebatch.losses.infonce import Combine, InfoNCE, OwnNegatives, info_nce
from largebatch.losses.masks import FalseNegatives, ScoreLimits, score_limits
from largebatch.losses.temperature import Temperature
from largebatch.model.encoder import Encoder
from largebatch.step.balance import Pairs
from largebatch.step.false_negatives import TextMasks, hashes_of
from largebatch.step.guide import Guide, GuideEmbeddings
from largebatch.step.matryoshka import Matryoshka, truncated
from largebatch.step.objective import (
    EmbeddedBatch,
    EmbeddingObjective,
    ObjectiveValue,
    Side,
    SourceNote,
)
from largebatch.transfer import to_device

if TYPE_CHECKING:
    from largebatch.config import TrainConfig

SMALL_TEMPERATURE = 1e-4
"""Below this, products of unit vectors over the temperature are beyond what training is for."""
MUCH_MASKED = 0.1
"""Share of a batch's negatives that a person is told of when it is left out."""
MUCH_MASKED_BY_SCORE = 0.5
"""The same for those that are left out by their scores, which is what the mask is for."""


def build(config: "TrainConfig") -> "ContrastiveLoss":
    """Return the objective of a run.

    Raises:
        UserError: Options of a source don't fit those of the objective, or the guide can't be used.
    """
    given, objective = config.temperature, config.objective
    temperature = Temperature(
        given.value,
        learned=given.learned,
        min=given.min,
        max=given.max,
        final_value=given.final_value,
        steps=given.steps,
        schedule=given.schedule,
    )
    _check_sources(config)
    guide = None
    if objective.mask_guide is not None:
        guide = Guide.from_pretrained(
            objective.mask_guide, tokens_per_chunk=objective.mask_guide_tokens_per_chunk
        )
    matryoshka = None
    if objective.matryoshka_dims:
        matryoshka = Matryoshka.of(
            objective.matryoshka_dims,
            weights=objective.matryoshka_weights,
            reduction=objective.matryoshka_reduction,
        )
    return ContrastiveLoss(
        temperature,
        symmetric=objective.symmetric,
        mask_duplicates=objective.mask_duplicates,
        own_negatives=objective.negatives != "all",
        own_apart=objective.negatives == "apart",
        candidates=objective.candidates,
        repeat_positive=objective.repeat_positive,
        in_batch=objective.in_batch,
        mask_margin=objective.mask_margin,
        mask_share=objective.mask_share,
        hardness=objective.hardness,
        own_hardness=objective.own_hardness,
        guide=guide,
        matryoshka=matryoshka,
    )


def _check_sources(config: "TrainConfig") -> None:
    """Check what sources ask for together with the objective's options.

    Raises:
        UserError: Something would be ignored or contradicts itself.
    """
    objective, faults, in_batch = config.objective, [], []
    for name, source in config.data.sources.items():
        key, loss = f"data.sources.{name}.loss", source.loss
        asked = _Asked.of(
            loss,
            symmetric=objective.symmetric,
            negatives=objective.negatives,
            in_batch=objective.in_batch,
        )
        in_batch.append(asked.in_batch)
        if fault := asked.fault(objective.candidates):
            faults.append(f"{key}: {fault}")
    if objective.candidates != [QUERY_DOCUMENT] and not any(in_batch):
        faults.append(
            f"objective.candidates={objective.candidates} are pairs of the batch, and in_batch="
            "false leaves them out for every source; leave objective.candidates out"
        )
    if faults:
        raise UserError("; ".join(faults))


class _Asked(NamedTuple):
    """What holds for a batch: its source's options, else the objective's."""

    symmetric: bool
    negatives: str
    """all, own or apart."""
    in_batch: bool

    @classmethod
    def of(
        cls, options: LossOptions, *, symmetric: bool, negatives: str, in_batch: bool
    ) -> "_Asked":
        return cls(
            symmetric if options.symmetric is None else options.symmetric,
            negatives if options.negatives is None else options.negatives,
            in_batch if options.in_batch is None else options.in_batch,
        )

    def fault(self, candidates: Sequence[str]) -> str | None:
        """Return what doesn't fit together; None: nothing."""
        if not self.in_batch and self.negatives == "all":
            return (
                "in_batch=false leaves a query its own record's negatives, and negatives=all gives "
                "them to all queries; set negatives=own"
            )
        if self.symmetric and not self.in_batch:
            return (
                "symmetric=true needs the queries of the batch, and in_batch=false leaves them "
                "out; set symmetric=false"
            )
        if self.symmetric and tuple(candidates) != (QUERY_DOCUMENT,):
            return (
                "symmetric=true gives each direction a softmax of its own, and "
                f"objective.candidates={list(candidates)} asks for one; leave one of them out"
            )
        return None


class ContrastiveLoss(EmbeddingObjective):
    """InfoNCE with in-batch negatives and a temperature.

    Each query's softmax runs over its own document and all other candidates; `log_sum_exps` (see
    candidates.py) and `info_nce` say how.

    Args:
        temperature: Default: fixed at 0.05.
        symmetric: Whether documents are matched to queries too, both directions weighing half.
        mask_duplicates: Whether false negatives, known by their texts, are left out: see masks.py.
        own_negatives: Whether the negatives of a record are contrasted with its own query only, not
            with those of the whole global batch.
        own_apart: Whether these have a softmax of their own, whose loss is added (arXiv
            2510.02294). Needs own_negatives.
        candidates: What the softmax runs over; for pair i, s the similarity over the temperature:
            query_document: s(q_i, d_j), negatives included; query_query: s(q_i, q_j), j != i;
            document_query: s(q_j, d_i), j != i; document_document: s(d_i, d_j), j != i, where
            d_j are positives.
        repeat_positive: Whether document_query takes j = i too, so that the positive stands twice
            in the sum (arXiv 2308.03281).
        in_batch: Whether other pairs of the batch are candidates at all. False: a record's own
            negatives are the only ones. Needs own_negatives.
        mask_margin: Candidates that score above the positive's score plus this are left out.
        mask_share: Candidates that score above this share of the positive's score are left out.
        hardness: Documents of other pairs weigh e^(hardness * score) times as much in the softmax
            of a query, without a gradient of that (arXiv 2503.04812).
        own_hardness: The same for a record's own negatives (arXiv 2509.20354). Needs own_negatives.
        guide: Whose scores the two masks judge by. None: the scores of the model that is trained.
        matryoshka: At which widths of the embeddings the loss is taken. None: the whole.

    Raises:
        UserError: The options don't fit together.
    """

    source_options = ("symmetric", "negatives", "in_batch")
    has_temperature = True
    used_options = (
        "symmetric", "candidates", "repeat_positive", "in_batch", "mask_duplicates", "mask_margin",
        "mask_share", "mask_guide", "mask_guide_tokens_per_chunk", "negatives", "hardness",
        "own_hardness", "matryoshka_dims", "matryoshka_weights", "matryoshka_reduction",
    )  # fmt: skip

    def __init__(
        self,
        temperature: Temperature | None = None,
        *,
        symmetric: bool = False,
        mask_duplicates: bool = True,
        own_negatives: bool = False,
        own_apart: bool = False,
        candidates: Sequence[str] = (QUERY_DOCUMENT,),
        repeat_positive: bool = False,
        in_batch: bool = True,
        mask_margin: float | None = None,
        mask_share: float | None = None,
        hardness: float = 0.0,
        own_hardness: float = 0.0,
        guide: Guide | None = None,
        matryoshka: Matryoshka | None = None,
    ) -> None:
        super().__init__()
        # The same checks as of a run's options, and the same words.
        ObjectiveConfig(
            symmetric=symmetric,
            candidates=list(candidates),
            repeat_positive=repeat_positive,
            in_batch=in_batch,
            mask_margin=mask_margin,
            mask_share=mask_share,
            hardness=hardness,
            own_hardness=own_hardness,
            mask_guide=None if guide is None else guide.name,
            negatives=("apart" if own_apart else "own") if own_negatives else "all",
        )
        if own_apart and not own_negatives:
            raise UserError("own_apart=True needs own_negatives=True")
        self.temperature = temperature if temperature is not None else Temperature()
        self.symmetric = symmetric
        self.mask_duplicates = mask_duplicates
        self.own_negatives = own_negatives
        self.own_apart = own_apart
        self.candidates = tuple(candidates)
        self.repeat_positive = repeat_positive
        self.in_batch = in_batch
        self.mask_margin = mask_margin
        self.mask_share = mask_share
        self.hardness = hardness
        self.own_hardness = own_hardness
        self.guide = guide
        self.matryoshka = matryoshka
        self._has_unit_length = True

    def forward(self, queries_bd: Tensor, documents_md: Tensor) -> Tensor:
        """Return the mean loss of b queries whose documents are the first b of m documents.

        Nothing is known of texts here, so every other document is a negative. For one-way and
        symmetric InfoNCE; what takes more than two tensors goes through `GradCache`.
        """
        if not self._is_plain(_Asked(self.symmetric, "all", self.in_batch)):
            raise UserError(
                "queries and documents alone are enough for one-way and symmetric InfoNCE; "
                "candidates, in_batch=False, masks by score and Matryoshka need GradCache"
            )
        if len(documents_md) < len(queries_bd):
            raise UserError(
                f"{len(queries_bd)} queries need a document each, got {len(documents_md)}"
            )
        positives_b = torch.arange(len(queries_bd), device=queries_bd.device)
        result = self.sum_over_rows(queries_bd, documents_md, positives_b)
        return result.loss_sum / len(queries_bd)

    def sum_over_rows(
        self,
        queries_bd: Tensor,
        documents_md: Tensor,
        positives_b: Tensor,
        *,
        symmetric: bool | None = None,
        false_negatives: FalseNegatives | None = None,
        own_negatives: OwnNegatives | None = None,
        combine: Combine | None = None,
        step: int = 0,
    ) -> InfoNCE:
        """Return the loss summed over this rank's rows: `info_nce` with this object's settings.

        `symmetric` is for this call only; None: as the object says. `step` is what a scheduled
        temperature depends on.
        """
        return info_nce(
            queries_bd,
            documents_md,
            positives_b,
            self.temperature(step),
            symmetric=self.symmetric if symmetric is None else symmetric,
            false_negatives=false_negatives,
            own_negatives=own_negatives,
            combine=combine,
        )

    def knowledge(self, pairs: Pairs) -> Mapping[str, Int64Array]:
        """Return hashes of the texts, and of the records' ids if they are known."""
        return hashes_of(pairs) if self.mask_duplicates else {}

    def needs(self, options: LossOptions) -> Sequence[str]:
        """Return the fields: negatives too where queries are contrasted with nothing else."""
        return self.fields if self._asked(options).in_batch else (*self.fields, "negatives")

    def attach(self, encoder: Encoder, *, weights: str | None = None) -> None:  # noqa: ARG002
        """Check the widths of Matryoshka, and tell the guide whose tokens it gets."""
        self._has_unit_length = encoder.normalize
        if self.matryoshka is not None:
            self.matryoshka.check(encoder)
        if self.guide is not None:
            self.guide.meet(encoder)

    def fingerprints(self) -> Mapping[str, str]:
        """Return a hash of the guide's weights."""
        return {} if self.guide is None else {"objective.mask_guide": self.guide.fingerprint}

    def gathered_sides(self, options: LossOptions) -> Sequence[Side]:
        """Return what this rank's pairs are contrasted with on all ranks."""
        asked = self._asked(options)
        if not asked.in_batch:
            return ()
        sides: list[Side] = ["document"]
        if asked.negatives == "all":
            sides.append("negative")
        # The plain symmetric loss gets its second direction from the same products.
        kinds = self._kinds(asked)
        if not self._is_plain(asked) and any(_KINDS[kind].columns == "query" for kind in kinds):
            sides.insert(0, "query")
        return tuple(sides)

    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss, and how well queries find their documents among all columns."""
        asked = self._asked(batch.options)
        if (
            asked.negatives != "all"
            and batch.negative_counts is None
            and any(one.num_negatives for one in batch.facts)
        ):
            raise UserError(
                f"negatives={asked.negatives} needs to know whose each negative is: pass "
                "negative_counts"
            )
        if self._is_plain(asked):
            return self._plain_value(batch, asked)
        guided = None
        if self.guide is not None:
            guided = self.guide.embed(batch, self.gathered_sides(batch.options))
        scale = self.temperature(batch.step)
        masks = TextMasks(batch) if self.mask_duplicates else None
        if self.matryoshka is None:
            sums = self._sums(batch, asked, scale, masks, guided)
            loss, metrics = sums.loss, {}
        else:
            parts = {
                dim: self._sums(
                    truncated(batch, dim, normalize=self._has_unit_length),
                    asked,
                    scale,
                    masks,
                    guided,
                )
                for dim in self.matryoshka.dims
            }
            weights = dict(zip(*self.matryoshka, strict=True))
            loss = torch.stack([weights[dim] * part.loss for dim, part in parts.items()]).sum()
            metrics = {f"loss_of_{dim}": part.loss for dim, part in parts.items()}
            sums = parts[max(parts)]
        per_possible = batch.num_pairs / max(sums.num_possible, 1)
        value = batch.mean_over_rows(
            loss,
            {
                "accuracy": sums.correct,
                "masked_share": sums.masked.sum() * per_possible,
                "masked_by_score": sums.masked[1] * per_possible,
                "without_negatives": sums.without_negatives,
                **metrics,
            },
        )
        temperature = scale.detach().reciprocal()
        return value._replace(metrics={**value.metrics, "temperature": temperature})

    def _plain_value(self, batch: EmbeddedBatch, asked: "_Asked") -> ObjectiveValue:
        """Return the value of one-way or symmetric InfoNCE over documents and negatives."""
        assert batch.gathered_md is not None
        device, b = batch.queries_bd.device, len(batch.queries_bd)
        has_own = asked.negatives == "own"
        false_negatives = None
        if self.mask_duplicates:
            false_negatives = TextMasks(batch).of_documents(with_negatives=not has_own)
        own_negatives = self._own_negatives(batch, false_negatives) if has_own else None
        first = batch.first_gathered
        result = self.sum_over_rows(
            batch.queries_bd,
            batch.gathered_md,
            torch.arange(first, first + b, device=device),
            symmetric=asked.symmetric,
            false_negatives=false_negatives,
            own_negatives=own_negatives,
            combine=batch.collectives.combine,
            step=batch.step,
        )
        num_negatives = sum(one.num_negatives for one in batch.facts)
        if has_own:
            num_possible = batch.num_pairs * (batch.num_pairs - 1) + num_negatives
        else:
            num_possible = batch.num_pairs * (batch.num_pairs + num_negatives - 1)
        loss, accuracy, _, without_negatives = result.totals / batch.num_pairs
        metrics = {
            "accuracy": accuracy,
            "masked_share": result.totals[2] / max(num_possible, 1),
            "without_negatives": without_negatives,
            "temperature": self.temperature(batch.step).detach().reciprocal(),
        }
        return ObjectiveValue(batch.own_share(result.loss_sum), loss, metrics)

    def _sums(
        self,
        batch: EmbeddedBatch,
        asked: "_Asked",
        scale: Tensor,
        masks: "TextMasks | None",
        guided: GuideEmbeddings | None,
    ) -> "_Sums":
        """Return the sums over this rank's rows for whatever is asked for."""
        sides = [batch.queries_bd, batch.documents_bd]
        dtype = torch.promote_types(batch.queries_bd.dtype, torch.float32)
        scores_b = (sides[0].to(dtype) * sides[1].to(dtype)).sum(1)
        positive_b = scale.to(dtype) * scores_b
        limits = self._limits(scores_b, guided)

        # Candidates of all ranks.
        kinds = self._kinds(asked)
        made = [self._candidates(kind, batch, asked, masks) for kind in kinds]
        masked, num_possible = positive_b.new_zeros(2), 0
        others: dict[str, Tensor] = {}
        highest_b = torch.full_like(positive_b.detach(), -torch.inf)
        if made:
            assert batch.gathered_md is not None
            values = log_sum_exps(sides, batch.gathered_md, scale, made, limits=limits)
            others = dict(zip(kinds, values.values_kb.unbind(), strict=True))
            highest_b = values.highest_kb[kinds.index(QUERY_DOCUMENT)]
            masked = masked + values.masked
            num_possible += batch.num_pairs * sum(one.number - 1 for one in made)

        # The negatives of the rows' own records.
        of_own_b = torch.full_like(highest_b, -torch.inf)
        if asked.negatives != "all":
            own = self._own_negatives(
                batch, None if masks is None else masks.of_documents(with_negatives=False)
            )
            if own is not None:
                if limits is not None and guided is not None:
                    limits = limits._replace(columns_mg=guided.negatives_ng)
                found = own_log_sum_exps(
                    sides[0], scale, own, limits=limits, hardness=self.own_hardness
                )
                of_own_b, masked = found.values_kb[0], masked + found.masked
                highest_b = torch.maximum(highest_b, found.highest_kb[0])
                num_possible += sum(one.num_negatives for one in batch.facts)

        losses_b, is_empty_b = self._losses(positive_b, others, of_own_b, asked)
        return _Sums(
            losses_b.sum(),
            (positive_b.detach() >= highest_b).sum(),
            is_empty_b.sum(),
            masked,
            num_possible,
        )

    def _losses(
        self, positive_b: Tensor, others: Mapping[str, Tensor], of_own_b: Tensor, asked: "_Asked"
    ) -> tuple[Tensor, Tensor]:
        """Return each row's loss, and whether it has nothing to be told from.

        Args:
            positive_b: Logits of the rows' own documents.
            others: Log-sum-exps over each kind of other candidates.
            of_own_b: Those over the rows' own negatives; -inf where they have none.
            asked: What holds for the batch.
        """
        if asked.symmetric:
            queries, documents = others[QUERY_DOCUMENT], others["document_query"]
            if asked.negatives == "own":
                queries = log_sum_exp(torch.stack([queries, of_own_b]))
            losses_b = (
                losses_of_rows(positive_b, queries) + losses_of_rows(positive_b, documents)
            ) / 2
            all_b = queries
        else:
            in_batch = list(others.values())
            if asked.negatives != "apart" or not in_batch:
                in_batch.append(of_own_b)
            all_b = log_sum_exp(torch.stack(in_batch))
            is_twice = self.repeat_positive and "document_query" in others
            losses_b = losses_of_rows(positive_b, all_b, times=2 if is_twice else 1)
        if asked.negatives == "apart" and others:
            losses_b = losses_b + losses_of_rows(positive_b, of_own_b)
            all_b = torch.maximum(all_b, of_own_b)
        return losses_b, all_b.detach().isneginf()

    def _candidates(
        self, kind: str, batch: EmbeddedBatch, asked: "_Asked", masks: "TextMasks | None"
    ) -> Candidates:
        """Return one kind of candidates of all ranks, by its place among the gathered rows."""
        side, of = _KINDS[kind]
        with_negatives = kind == QUERY_DOCUMENT and asked.negatives == "all"
        wanted = (of, "negative") if with_negatives else (of,)
        gathered = self.gathered_sides(batch.options)
        ranges: list[slice] = []
        start = 0
        for one in batch.facts:
            for name in gathered:
                stop = start + one.count([name])
                if name in wanted and stop > start:
                    if ranges and ranges[-1].stop == start:
                        ranges[-1] = slice(ranges[-1].start, stop)
                    else:
                        ranges.append(slice(start, stop))
                start = stop
        first = sum(one.count(wanted) for one in batch.facts[: batch.collectives.world.rank])
        own_b = torch.arange(first, first + len(batch.queries_bd), device=batch.queries_bd.device)
        false_negatives = None
        if masks is not None:
            false_negatives = (
                masks.of_queries()
                if of == "query"
                else masks.of_documents(with_negatives=with_negatives)
            )
        hardness = self.hardness if kind == QUERY_DOCUMENT else 0.0
        return Candidates(side, tuple(ranges), own_b, false_negatives, hardness)

    def _limits(self, scores_b: Tensor, guided: GuideEmbeddings | None) -> ScoreLimits | None:
        """Return which scores are too high for a negative's; None: none is.

        Args:
            scores_b: The model's, of the rows' own documents.
            guided: What the guide says of all texts; None: there is none.
        """
        if self.mask_margin is None and self.mask_share is None:
            return None
        if guided is not None:
            scores_b = (guided.queries_bg * guided.documents_bg).sum(1)
        highest_b = score_limits(scores_b, margin=self.mask_margin, share=self.mask_share)
        if guided is None:
            return ScoreLimits(highest_b)
        return ScoreLimits(highest_b, [guided.queries_bg, guided.documents_bg], guided.gathered_mg)

    def _asked(self, options: LossOptions) -> "_Asked":
        negatives = ("apart" if self.own_apart else "own") if self.own_negatives else "all"
        asked = _Asked.of(
            options, symmetric=self.symmetric, negatives=negatives, in_batch=self.in_batch
        )
        if fault := asked.fault(self.candidates):
            raise UserError(f"a source's loss options: {fault}")
        return asked

    def _kinds(self, asked: "_Asked") -> list[str]:
        """Return the kinds of candidates that are of all ranks."""
        if not asked.in_batch:
            return []
        return [QUERY_DOCUMENT, "document_query"] if asked.symmetric else list(self.candidates)

    def _is_plain(self, asked: "_Asked") -> bool:
        """Whether `info_nce` is all that is needed."""
        return (
            asked.in_batch
            and asked.negatives != "apart"
            and self.candidates == (QUERY_DOCUMENT,)
            and self.mask_margin is None
            and self.mask_share is None
            and self.matryoshka is None
            and self.hardness == 0
            and self.own_hardness == 0
        )

    def after_step(self) -> None:
        """Bring a learned temperature back into its bounds."""
        self.temperature.clamp_()

    def warning(self, metrics: Mapping[str, float], sources: Sequence[SourceNote]) -> str | None:
        """Say that a batch has lost many negatives, and what can be done."""
        by_score, none_left = metrics.get("masked_by_score", 0.0), metrics["without_negatives"]
        if by_score >= MUCH_MASKED_BY_SCORE:
            return (
                f"{by_score:.1%} of the negatives in its batch "
                f"(source {', '.join(source.name for source in sources)}) score above the limit "
                "of false ones and are left out; raise objective.mask_margin or "
                "objective.mask_share; train/masked_by_score is logged for every step"
            )
        share = metrics["masked_share"] - by_score
        # A single pair has no negatives either, and nothing was left out.
        if share < MUCH_MASKED and not (share > 0 and none_left > 0):
            return None
        by_id = [source.name for source in sources if source.mask_same_id]
        cures = [
            f"set data.sources.{name}.mask_same_id=false if its ids repeat without a meaning, "
            for name in by_id
        ]
        return (
            f"{share:.1%} of the negatives in its batch "
            f"(source {', '.join(source.name for source in sources)}) are left out as false ones, "
            f"and {none_left:.1%} of its queries have none left: many of its "
            f"records have the same query, document{' or id' if by_id else ''}; {''.join(cures)}"
            "leave out what repeats (`largebatch data stats` counts it, `largebatch dedup` finds "
            "it), or give such a source less weight; train/masked_share is logged for every step"
        )

    def why_not_finite(self, config: "TrainConfig") -> str | None:
        """Say what makes logits or gradient overflow where embeddings are finite."""
        temperature = self.temperature.lowest
        if temperature < SMALL_TEMPERATURE:
            given = config.temperature
            if given.final_value is not None and given.final_value < given.value:
                return (
                    f"temperature.final_value={given.final_value:g} is too low; raise it, for "
                    "example to 0.02"
                )
            if given.learned:
                return (
                    f"the learned temperature has come down to {temperature:g}; raise "
                    f"temperature.min={given.min:g}, for example to 0.01"
                )
            return f"temperature.value={given.value:g} is too low; raise it, for example to 0.05"
        if config.pooling.normalize is False:
            return (
                "the embeddings have no unit length, and their products overflow; set "
                "pooling.normalize=true, or raise temperature.value"
            )
        return None

    @staticmethod
    def _own_negatives(
        batch: EmbeddedBatch, false_negatives: FalseNegatives | None
    ) -> OwnNegatives | None:
        """Return this rank's negatives with their owners; None: no rank has any."""
        counts = batch.negative_counts
        if counts is None or not any(one.num_negatives for one in batch.facts):
            return None
        device = batch.queries_bd.device
        owners_n = np.repeat(np.arange(len(counts)), counts)
        places_n = np.arange(len(owners_n)) - np.repeat(np.cumsum(counts) - counts, counts)
        masked_n = None if false_negatives is None else false_negatives.of_own(owners_n)
        return OwnNegatives(
            batch.negatives_nd,
            to_device(owners_n, device),
            to_device(places_n, device),
            int(counts.max(initial=0)),
            None if masked_n is None else to_device(masked_n, device),
        )


class _Kind(NamedTuple):
    """What a kind of candidates is."""

    side: int
    """What is compared with them: 0 for the query of a pair, 1 for its document."""
    columns: Side
    """What they are."""


_KINDS = {
    QUERY_DOCUMENT: _Kind(0, "document"),
    "query_query": _Kind(0, "query"),
    "document_query": _Kind(1, "query"),
    "document_document": _Kind(1, "document"),
}


class _Sums(NamedTuple):
    """Sums over this rank's rows."""

    loss: Tensor
    correct: Tensor
    """Rows whose own document no document scores above."""
    without_negatives: Tensor
    masked: Tensor
    """`[2]`, candidates that are left out by texts, and by scores."""
    num_possible: int
    """Candidates of all ranks' rows, their own documents not counted."""
