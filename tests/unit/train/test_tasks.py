"""Prompts with a place for a task: the published strings, and who fills them with what."""

import json
import shutil

import pytest
from dist import run_ranks
from numerics.reference import tiny_encoder
from numerics.tiny_run import STEPS, tensors, tiny_config, write_data

from largebatch.cli.compose import build, compose
from largebatch.cli.presets import open_presets
from largebatch.cli.table import COMMANDS
from largebatch.config import CurriculumConfig, DataConfig, SourceConfig, TextConfig
from largebatch.data.text import TextSettings
from largebatch.errors import UserError
from largebatch.shards.records import Record
from largebatch.train import trainer
from largebatch.train.build import build_sources

WEB = "Given a web search query, retrieve relevant passages that answer the query"
# What stands before a query and before a document, to the character.
PUBLISHED = {
    "plain": ("", ""),
    "e5": ("query: ", "passage: "),
    "denseon": ("query: ", "document: "),
    "nemotron": ("query:", "passage:"),
    "nomic": ("search_query: ", "search_document: "),
    "bge_en": ("Represent this sentence for searching relevant passages: ", ""),
    "bge_zh": ("为这个句子生成表示以用于检索相关文章：", ""),  # noqa: RUF001
    "bge_gemma2": (f"<instruct>{WEB}\n<query>", ""),
    "e5_mistral": (f"Instruct: {WEB}\nQuery: ", ""),
    "qwen3": (f"Instruct: {WEB}\nQuery:", ""),
    "kalm": (f"Instruct: {WEB} \n Query: ", ""),
    "embeddinggemma": ("task: search result | query: ", "title: none | text: "),
}


def composed(*overrides):
    source = "data.sources.mine.urls=[shards/]"
    with open_presets(COMMANDS["train"]) as presets:
        return build(COMMANDS["train"].config_class, compose(presets, [source, *overrides]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_strings(name):
    settings = composed(f"text={name}").text.settings()
    assert (settings["query_prompt"], settings["document_prompt"]) == PUBLISHED[name]


def test_every_preset_is_compared():
    with open_presets(COMMANDS["train"]) as presets:
        assert set(presets.groups["text"]) == {"auto", *PUBLISHED}
    assert composed().text.settings()["query_prompt"] is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    shutil.copytree(folder / "shards", folder / "others")
    return folder


def config_of(data, output, *, text, **sources):
    made = tiny_config(data, output, text=text)
    made.data = DataConfig(
        sources={
            name: SourceConfig(urls=[str(data / where)], weight=1.0, **options)
            for (name, options), where in zip(sources.items(), ("shards", "others"), strict=False)
        },
        workers=0,
        lanes=4,
    )
    made.__post_init__()
    return made


INSTRUCT = TextConfig(
    query_prompt="Do {task}: ", task="find", query_max_tokens=12, document_max_tokens=16
)


def test_each_source_fills_in_its_own_task(data, tmp_path):
    config = config_of(data, tmp_path, text=INSTRUCT, mine={}, theirs={"task": "match {x}"})
    mine, theirs = build_sources(config)
    model = TextSettings(**{k: v for k, v in INSTRUCT.settings().items() if v is not None})
    record = Record("q", "d", ["n"], "mine", "1")
    assert mine.used_texts(record, model)[:3] == ("Do find: q", "d", ["n"])
    assert theirs.used_texts(record, model)[:3] == ("Do match {x}: q", "d", ["n"])
    own = {"query_prompt": "", "document_prompt": "As {task}: "}
    config = config_of(data, tmp_path, text=INSTRUCT, mine=own, theirs={**own, "task": "b"})
    mine, theirs = build_sources(config)
    assert mine.used_texts(record, model)[:3] == ("q", "As find: d", ["As find: n"])
    assert theirs.used_texts(record, model)[:3] == ("q", "As b: d", ["As b: n"])


def test_a_run_with_tasks(data, tmp_path):
    """The export asks for the general task, and the run goes on with the same config."""
    folder = tmp_path / "run"
    config = config_of(data, folder, text=INSTRUCT, mine={}, theirs={"task": "match"})
    run_ranks(trainer.train, 2, config, init_group=False)
    exported = json.loads((folder / "model/config_sentence_transformers.json").read_text())
    assert exported["prompts"] == {"query": "Do find: ", "document": ""}
    assert "Do {task}: " in (folder / "config.yaml").read_text()
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08d}")
    (folder / "evaluation.json").unlink()
    run_ranks(trainer.train, 2, config, init_group=False)
    assert tensors(folder)
    # Another task is another run.
    config.data.sources["theirs"].task = "other"
    with pytest.raises(UserError, match=r"data\.sources\.theirs\.task: 'match' -> 'other'"):
        run_ranks(trainer.train, 2, config, init_group=False)


@pytest.mark.parametrize(
    ("text", "source", "told"),
    [
        ({"task": "find"}, {}, r"text\.task='find' has no place in a prompt"),
        ({}, {"task": "find"}, r"data\.sources\.mine\.task='find' has no place in a prompt"),
        ({}, {"query_prompt": "{task}: "}, r"data\.sources\.mine has \{task\} .*, and no task"),
        ({}, {"task": ""}, r"data\.sources\.mine\.task is empty"),
        ({"query_prompt": "{task}: "}, {}, r"text\.query_prompt='\{task\}: ' has \{task\} in it"),
    ],
)
def test_tasks_and_places_go_together(data, tmp_path, text, source, told):
    with pytest.raises(UserError, match=told):
        config_of(data, tmp_path, text=TextConfig(**text), mine=source)


def test_a_prompt_longer_than_the_length(data, tmp_path):
    long = "number " * 11
    config = config_of(
        data, tmp_path / "a", text=TextConfig(query_max_tokens=12), mine={"query_prompt": long}
    )
    told = r"data\.sources\.mine: the query prompt 'number .* takes \d+ tokens.*text\.query_max_to"
    with pytest.raises(UserError, match=told + r"kens=12 leaves none for the text"):
        run_ranks(trainer.train, 2, config, init_group=False)
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_a_curriculum_that_leaves_no_room(data, tmp_path):
    config = config_of(data, tmp_path / "a", text=INSTRUCT, mine={})
    config.data.curriculum = [CurriculumConfig(from_step=2, query_max_tokens=4)]
    with pytest.raises(UserError, match=r"data\.curriculum\.\*\.query_max_tokens=4 leaves none"):
        run_ranks(trainer.train, 1, config, init_group=False)
    assert tiny_encoder().text.query_prompt == ""
