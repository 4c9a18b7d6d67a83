"""Options of the contrastive objective: each wrong value or combination has its line."""

import pytest

from largebatch.config import (
    DataConfig,
    LossOptions,
    ObjectiveConfig,
    SourceConfig,
    TemperatureConfig,
    TrainConfig,
)
from largebatch.errors import UserError
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.train.build import build_objective

ALL = ["query_document", "query_query", "document_query", "document_document"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["query_documents"]}, "did you mean 'query_document'"),
        ({"candidates": ["query_query"]}, "lacks query_document; add it"),
        ({"candidates": ["query_document", "query_query", "query_query"]}, "names one twice"),
        ({"repeat_positive": True}, "needs document_query in objective.candidates"),
        ({"symmetric": True, "candidates": ALL}, "set symmetric=false, or leave candidates out"),
        ({"in_batch": False}, "set objective.negatives=own"),
        ({"in_batch": False, "negatives": "own", "symmetric": True}, "change one of the two"),
        ({"negatives": "mine"}, "all, own, apart"),
        ({"mask_share": 0.0}, "objective.mask_share=0.0 must be above 0"),
        ({"mask_margin": float("nan")}, "objective.mask_margin=nan must be a finite number"),
        ({"mask_guide": "folder"}, "needs a limit for its scores; set objective.mask_margin"),
        ({"mask_guide": "", "mask_margin": 0.0}, "objective.mask_guide is empty"),
        ({"mask_guide_tokens_per_chunk": 5}, "is for objective.mask_guide, which is unset"),
        (
            {"mask_guide": "a", "mask_margin": 0.0, "mask_guide_tokens_per_chunk": 0},
            "tokens_per_chunk=0 must be at least 1",
        ),
        ({"hardness": -1.0}, "objective.hardness=-1.0 must be at least 0"),
        ({"own_hardness": 5.0}, "set negatives=own, or use hardness"),
        ({"matryoshka_dims": [8, 0]}, "objective.matryoshka_dims=0 must be at least 1"),
        ({"matryoshka_dims": [8, 8]}, "names a width twice"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 2.0]}, "must be as many as"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [0.0]}, "matryoshka_weights=0.0 must be"),
        ({"matryoshka_dims": [8], "matryoshka_reduction": "max"}, "is not one of sum, mean"),
        ({"matryoshka_reduction": "mean"}, "is for objective.matryoshka_dims without"),
    ],
)
def test_what_is_wrong_has_its_line(options, message):
    with pytest.raises(UserError) as raised:
        ObjectiveConfig(**options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "need temperature.final_value"),
        ({"schedule": "cosine"}, "need temperature.final_value"),
        ({"schedule": "cubic"}, "is not one of linear, cosine"),
        ({"final_value": 0.02}, "needs temperature.steps, at least 1"),
        ({"final_value": 0.0, "steps": 3}, "temperature.final_value=0.0 must be above 0"),
        ({"final_value": 0.02, "steps": 3, "learned": True}, "set temperature.learned=false"),
    ],
)
def test_what_is_wrong_with_a_temperature_has_its_line(options, message):
    with pytest.raises(UserError, match=message):
        TemperatureConfig(**options)


def config(loss=None, temperature=None, **options):
    sources = {
        "mine": SourceConfig(urls=["shards"], loss=loss or LossOptions()),
        "other": SourceConfig(urls=["shards"]),
    }
    return TrainConfig(
        data=DataConfig(sources=sources),
        objective=ObjectiveConfig(**options),
        temperature=temperature or TemperatureConfig(),
    )


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ({"in_batch": False}, {}, "data.sources.mine.loss: in_batch=false .* set negatives=own"),
        (
            {"in_batch": False, "negatives": "own"},
            {"symmetric": True},
            "data.sources.mine.loss: .* set symmetric=false",
        ),
        ({"symmetric": True}, {"candidates": ALL}, "data.sources.mine.loss: .* leave one of them"),
        (
            {},
            {"in_batch": False, "negatives": "own", "candidates": ALL},
            "leaves them out for every source",
        ),
        (
            {"negatives": "all"},
            {"in_batch": False, "negatives": "own"},
            "data.sources.mine.loss: .* set negatives=own",
        ),
    ],
)
def test_what_a_source_may_not_ask_for(loss, options, message):
    with pytest.raises(UserError, match=message):
        build_objective(config(LossOptions(**loss), **options))


def test_a_library_call_gets_the_same_lines():
    with pytest.raises(UserError, match=r"set objective\.negatives=own"):
        ContrastiveLoss(in_batch=False)
    with pytest.raises(UserError, match="own_apart=True needs own_negatives=True"):
        ContrastiveLoss(own_apart=True)
    with pytest.raises(UserError, match=r"a source's loss options: in_batch=false"):
        ContrastiveLoss().gathered_sides(LossOptions(in_batch=False))


def test_it_is_built_as_the_config_says():
    made = build_objective(
        config(
            LossOptions(in_batch=False),
            TemperatureConfig(value=0.05, final_value=0.02, steps=10, schedule="cosine"),
            candidates=ALL,
            repeat_positive=True,
            negatives="apart",
            mask_margin=0.1,
            mask_share=0.9,
            hardness=2.0,
            own_hardness=3.0,
            matryoshka_dims=[8, 4],
            matryoshka_reduction="mean",
        )
    )
    assert made.candidates == tuple(ALL)
    assert made.repeat_positive
    assert made.in_batch
    assert (made.own_negatives, made.own_apart) == (True, True)
    assert (made.mask_margin, made.mask_share) == (0.1, 0.9)
    assert (made.hardness, made.own_hardness) == (2, 3)
    assert made.matryoshka == ((8, 4), (0.5, 0.5))
    assert made.temperature.at(10) == pytest.approx(0.02)
    assert made.temperature.at(2) > 0.05 - 0.03 * 2 / 10
    assert made.needs(LossOptions()) == ("query", "document")
    assert made.needs(LossOptions(in_batch=False)) == ("query", "document", "negatives")
    assert "query" not in made.gathered_sides(LossOptions(in_batch=False))


def test_options_that_are_set():
    assert ObjectiveConfig().shared_options() == {}
    given = ObjectiveConfig(symmetric=True, matryoshka_dims=[4])
    assert given.shared_options() == {"symmetric": True, "matryoshka_dims": [4]}
