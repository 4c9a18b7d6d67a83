"""Overrides: what each way of writing sets, and that the cures of messages work when typed."""

import re
import shlex

import pytest

from largebatch.cli import app
from largebatch.cli.overrides import expand_preset
from largebatch.cli.presets import open_presets
from largebatch.cli.table import COMMANDS
from largebatch.errors import UserError

SOURCE = "data.sources.mine.urls=[shards/]"
URLS = "data/sources/a/urls"
CURE = re.compile(
    r"(?:write a list: |in quotes: |takes no value: |have no dashes: |write )(\"[^\"]*\"|'.*'|\S+)$"
)


def config_of(command, *overrides):
    """Return the config that a command line would run with."""
    with open_presets(COMMANDS[command]) as presets:
        (job,) = app.plan_jobs(presets, expand_preset(presets, overrides), multirun=False)
    return job.config


def value_at(config, key):
    for part in key.split("/"):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(
    ("command", "others", "option", "value", "expected"),
    [
        ("train", [SOURCE], "backbone.config", "{hidden_size: 48}", {"hidden_size": 48}),
        ("train", [SOURCE], "backbone.config", "{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
        ("train", [SOURCE], "eval.dev", "{x: beir, y-1: z}", {"x": "beir", "y-1": "z"}),
        ("train", [SOURCE], "eval.test", "{2024: a, true: b}", {"2024": "a", "true": "b"}),
        ("train", [SOURCE], "eval.dev", "{v1.0: a}", {"v1.0": "a"}),
        ("train", [SOURCE, "strategy=deepspeed"], "strategy.config", "{a: 1}", {"a": 1}),
        ("train", [SOURCE], "data.sources.mine.fields", "{query: t}", {"query": "t"}),
        ("shard", ["input=[a.jsonl]"], "fields", "{query: t}", {"query": "t"}),
        ("verify", [], "fields", "{query: t}", {"query": "t"}),
        ("dedup", [], "sources", "{a: x, b: [y, z]}", {"a": ["x"], "b": ["y", "z"]}),
        ("dedup", ["sources.a=x"], "evaluation_sets", "{t: y}", {"t": "y"}),
        ("evaluate", ["model=m"], "sets", "{t: y}", {"t": "y"}),
    ],
)
def test_a_mapping_can_be_set_whole(prefix, command, others, option, value, expected):
    config = config_of(command, *others, f"{prefix}{option}={value}")
    assert value_at(config, option.replace(".", "/")) == expected


def test_set_whole_replaces_and_with_a_plus_adds():
    own = ["quickstart", "data.sources.mine.urls=[sh]"]
    replaced = config_of("train", *own, "data.sources={a: {urls: x, weight: 2}}")
    assert list(replaced.data.sources) == ["a"]
    assert (replaced.data.sources["a"].urls, replaced.data.sources["a"].weight) == (["x"], 2.0)
    added = config_of("train", *own, "+data.sources={a: {urls: [x]}}", "eval.dev={t: y}")
    assert list(added.data.sources) == ["code", "mine", "a"]
    assert added.eval.dev == {"t": "y"}
    nested = config_of("train", *own, "data={sources: {a: {urls: [x]}}, lanes: 3}")
    assert (list(nested.data.sources), nested.data.lanes) == (["a"], 3)
    # The entry of a mapping is a group of options: it keeps those that are not given.
    kept = config_of("train", *own, "data.sources.mine={max_negatives: 2}")
    assert (kept.data.sources["mine"].urls, kept.data.sources["mine"].max_negatives) == (["sh"], 2)
    config = config_of("train", *own, "backbone.config.rope.a=1", "backbone.config.rope={b: 2}")
    assert config.backbone.config["rope"] == {"b": 2}
    config = config_of("train", *own, "backbone.config.rope.a=1", "+backbone.config.rope={b: 2}")
    assert config.backbone.config["rope"] == {"a": 1, "b": 2}


def test_what_a_reference_stands_for_stays_as_it_is():
    own = [SOURCE, "eval.dev={a: x}", "eval.test=${eval.dev}"]
    assert config_of("train", *own).eval.test == {"a": "x"}
    for change, expected in {
        "+eval.test={b: y}": {"a": "x", "b": "y"},
        "eval.test.b=y": {"a": "x", "b": "y"},
        "eval.test={b: y}": {"b": "y"},
        "~eval.test.a": {},
    }.items():
        config = config_of("train", *own, change)
        assert (config.eval.dev, config.eval.test) == ({"a": "x"}, expected)
    own = [SOURCE, "data.sources.mine.weight=1", "data.sources.b=${data.sources.mine}"]
    for change in (
        "data.sources.b.weight=3",
        "data.sources.b={weight: 3}",
        "+data.sources={b: {weight: 3}}",
    ):
        sources = config_of("train", *own, change).data.sources
        assert [(one.urls, one.weight) for one in sources.values()] == [
            (["shards/"], 1),
            (["shards/"], 3),
        ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["eval.test=${name}"], "eval.test must be a mapping, such as {name: value}, and what it"),
        (["data.sources.b=${name}"], "data.sources.b must be a group of options"),
        (["checkpoint=${optim}"], "checkpoint must be a group of options"),
        (["optim.lr=${name}"], "optim.lr must be a number, and what it refers to is run"),
        (["data.curriculum=${optim}"], "data.curriculum must be a group of options (from_step, "),
        (["eval.test=${name}", "eval.test.a=x"], "eval.test=run must be a mapping"),
        (["eval.test=${name}", "+eval.test={a: x}"], "eval.test=run must be a mapping"),
        (
            ["checkpoint=${name}", "checkpoint.keep_last=2"],
            "checkpoint=run must be a group of options",
        ),
        (["eval.test=${its}", "eval.test.a=x"], "eval.test.a=x: Interpolation key 'its' not found"),
    ],
)
def test_a_reference_to_something_else_is_told(line, told):
    with pytest.raises(UserError) as caught:
        config_of("train", SOURCE, *line)
    assert str(caught.value).startswith(told)


def test_a_literal_dollar_and_brace_stay_so():
    prompt = "text.query_prompt='a \\${ b'"
    assert config_of("train", SOURCE, prompt).text.query_prompt == "a ${ b"
    with pytest.raises(UserError, match=r"=a \$\{ b: .* write \\\$\{ for a literal"):
        config_of("train", SOURCE, "text.query_prompt='a ${ b'")


def test_entries_and_whole_mappings_are_removed():
    config = config_of("train", "quickstart", SOURCE, "~data.sources.code", "~eval.dev")
    assert list(config.data.sources) == ["mine"]
    assert config.eval.dev == {}
    assert list(config.eval.test) == ["code-test"]
    config = config_of("train", "quickstart", "~backbone.config.hidden_size")
    assert "hidden_size" not in config.backbone.config
    assert config.backbone.config["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    "name", ["1", "007", "1e5", "null", "true", "a-b", "a/b", "müller", "a b", "$x", "a:b", "{a}"]
)
def test_an_entry_may_have_any_name(name):
    config = config_of("train", f"data.sources.{name}.urls=[sh]", f"eval.dev.{name}=folder")
    assert list(config.data.sources) == [name]
    assert config.eval.dev == {name: "folder"}


@pytest.mark.parametrize(
    "value", ["1", "007", "1e5", "true", "null/x", "a b", "C:\\x", "a:b", "1_0"]
)
def test_a_text_is_what_was_written(value):
    config = config_of("train", SOURCE, f"output_dir={value}", f"data.sources.mine.urls={value}")
    assert config.output_dir == value
    assert config.data.sources["mine"].urls == [value]


@pytest.mark.parametrize(
    ("command", "line", "key", "expected"),
    [
        ("train", ["data.sources.a.urls=sh"], URLS, ["sh"]),
        ("train", [SOURCE, "data.sources.a.urls=${oc.env:HOME}/x"], URLS, ["/home/mine/x"]),
        ("train", [SOURCE, "data.sources.a.urls=${data.sources.mine.urls}"], URLS, ["shards/"]),
        ("train", [SOURCE, "name=x", "data.sources.a.urls=${name}"], URLS, ["x"]),
        ("shard", ["input=a.jsonl"], "input", ["a.jsonl"]),
        ("index", ["shards=folder"], "shards", ["folder"]),
        ("verify", ["shards=folder"], "shards", ["folder"]),
        ("verify", ["shards=[a,b]"], "shards", ["a", "b"]),
        ("verify", [], "shards", ["shards"]),
        ("dedup", ["sources.a=x", "sources.b=[y,z]"], "sources", {"a": ["x"], "b": ["y", "z"]}),
        ("encode", ["model=m", "input=a.txt"], "input", ["a.txt"]),
        ("encode", ["model=m", "input=[a.txt,b.txt]"], "input", ["a.txt", "b.txt"]),
        ("pairs", ["paths=folder"], "paths", ["folder"]),
        ("bench", [SOURCE, "batches=64"], "batches", [64]),
    ],
)
def test_a_list_takes_one_or_several(monkeypatch, command, line, key, expected):
    monkeypatch.setenv("HOME", "/home/mine")
    assert value_at(config_of(command, *line), key) == expected


def test_a_list_of_groups_takes_one():
    config = config_of("train", SOURCE, "data.curriculum={from_step: 4, query_max_tokens: 8}")
    assert [(p.from_step, p.query_max_tokens) for p in config.data.curriculum] == [(4, 8)]


def test_another_choice_of_a_group_wins_and_null_takes_it_back():
    config = config_of("train", SOURCE, "pooling=cls", "pooling=last", "pooling=cls")
    assert config.pooling.mode == "cls"
    assert config_of("train", SOURCE, "experiment=quickstart", "experiment=null").name == "run"


@pytest.mark.parametrize(
    ("command", "wrong", "key", "expected"),
    [
        ("train", "data.sources.a.urls=[a=b/sh]", URLS, ["a=b/sh"]),
        ("train", "data.sources.a.urls=a=b/sh", URLS, ["a=b/sh"]),
        ("train", "data.sources.a.urls=[x, a=b, 'c=d']", URLS, ["x", "a=b", "c=d"]),
        ("train", "data.sources.a.urls=[x-{0..9}.tar]", URLS, ["x-{0..9}.tar"]),
        ("train", "data.sources.a.urls=[x-{00,01}.tar]", URLS, ["x-{00,01}.tar"]),
        ("train", "data.sources.a.urls=[x,y", URLS, ["x", "y"]),
        ("train", "data.sources.a.urls=x,y", URLS, ["x", "y"]),
        ("train", "data.sources.a.urls=[ü, it's]", URLS, ["ü", "it's"]),
        ("train", "data.sources.a={urls: [a=b]}", URLS, ["a=b"]),
        ("train", "data.sources={'a': {urls: [sh]}}", URLS, ["sh"]),
        ("train", "data.sources.a.urls=[~/sh]", URLS, ["/home/mine/sh"]),
        ("train", "data.sources.a.urls=~/sh", URLS, ["/home/mine/sh"]),
        ("train", "backbone.config={hidden_size=48}", "backbone/config", {"hidden_size": 48}),
        ("train", 'backbone.config={"hidden_size": 48}', "backbone/config", {"hidden_size": 48}),
        ("train", "backbone.config={hidden_size: 48", "backbone/config", {"hidden_size": 48}),
        ("train", "backbone.config=hidden_size: 48", "backbone/config", {"hidden_size": 48}),
        ("train", "backbone.config.x=a=b", "backbone/config/x", "a=b"),
        ("train", "backbone.config={x: a=b, y: [c=d]}", "backbone/config/y", ["c=d"]),
        ("train", "eval.dev={a: b=c}", "eval/dev", {"a": "b=c"}),
        ("train", "output_dir=a=b", "output_dir", "a=b"),
        ("train", "output_dir=a,b", "output_dir", "a,b"),
        ("train", "output_dir=[a", "output_dir", "[a"),
        ("train", "output_dir={a}", "output_dir", "{a}"),
        ("train", "output_dir=it's", "output_dir", "it's"),
        ("train", 'output_dir=a"b', "output_dir", 'a"b'),
        ("train", "output_dir='a", "output_dir", "'a"),
        ("train", "output_dir=a#b", "output_dir", "a#b"),
        ("train", "output_dir=a!$HOME`b", "output_dir", "a!$HOME`b"),
        ("train", "output_dir=a\\b=c", "output_dir", "a\\b=c"),
        ("train", "output_dir=C:\\a=b\\", "output_dir", "C:\\a=b\\"),
        ("train", "output_dir=müller", "output_dir", "müller"),
        ("train", "text.query_prompt=Query: why, then?", "text/query_prompt", "Query: why, then?"),
        ("train", "text.query_prompt=a ${ b", "text/query_prompt", "a ${ b"),
        ("train", "max_steps:5", "max_steps", 5),
        ("train", "max_steps 5", "max_steps", 5),
        ("train", "--max-steps=5", "max_steps", 5),
        ("train", "~eval.dev=x", "eval/dev", {}),
        ("shard", "input=a=b.jsonl", "input", ["a=b.jsonl"]),
        ("shard", "input=a.jsonl,b.jsonl", "input", ["a.jsonl", "b.jsonl"]),
        ("index", "shards=[x-{0..3}.tar]", "shards", ["x-{0..3}.tar"]),
        ("verify", "shards=m=1,m=2", "shards", ["m=1", "m=2"]),
    ],
)
def test_the_cure_of_a_message_works_when_typed(capsys, monkeypatch, command, wrong, key, expected):
    monkeypatch.setenv("HOME", "/home/mine")
    needed = {"train": [SOURCE]}.get(command, [])
    assert app.main([*command.split(), *needed, wrong]) == 1
    err = capsys.readouterr().err
    found = CURE.search(err.strip())
    assert found, err
    assert value_at(config_of(command, *needed, *shlex.split(found[1])), key) == expected


@pytest.mark.parametrize("wrong", ["global_batch==3", "optim.lr=a=b", "debug=a=b"])
def test_a_number_is_not_put_into_quotes(wrong):
    with pytest.raises(UserError, match=r"cannot be read as option=value; \S+ must be (a|true)"):
        config_of("train", SOURCE, wrong)


@pytest.mark.parametrize(
    ("command", "wrong", "cure"),
    [
        ("train", "data.sources=sh", "data.sources.NAME.urls=sh"),
        ("train", "eval.dev=sh", "eval.dev.NAME=sh"),
        ("evaluate", "sets=sh", "sets.NAME=sh"),
        ("dedup", "sources=sh", "sources.NAME=sh"),
    ],
)
def test_an_entry_without_a_name(command, wrong, cure):
    with pytest.raises(UserError, match=f"give the entry a name: {cure}$"):
        config_of(command, wrong)


def test_a_name_with_a_dot():
    with pytest.raises(UserError, match=r'"\+data.sources=\{v1.0: \{urls: ...\}\}"'):
        config_of("train", "data.sources.v1.0.urls=sh")
    assert list(config_of("train", "+data.sources={v1.0: {urls: sh}}").data.sources) == ["v1.0"]
    with pytest.raises(UserError, match=r'"\+eval.dev=\{v1.0: ...\}"'):
        config_of("train", SOURCE, "eval.dev.v1.0=x")
    with pytest.raises(UserError, match=r"100000.0 was read as a number; .* eval.dev.NAME"):
        config_of("train", SOURCE, "eval.dev={1e5: x}")
