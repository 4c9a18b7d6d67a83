import pytest

from largebatch.cli import app
from largebatch.config import HardwareConfig, StrategyConfig
from largebatch.config.bench import BenchConfig, Case
from largebatch.config.data import DataConfig, SourceConfig
from largebatch.errors import UserError

DATA = DataConfig(sources={"mine": SourceConfig(urls=["shards"])})


def test_an_empty_sweep_is_the_runs_own_case():
    config = BenchConfig(data=DATA, global_batch=64, tokens_per_chunk=100, keep="all")
    assert config.cases() == [Case(64, 100, "all", "ddp")]


def test_deepspeed_is_named_by_its_stage():
    config = BenchConfig(data=DATA, strategy=StrategyConfig(name="deepspeed", zero_stage=3))
    assert config.cases()[0].strategy == "zero3"


def test_the_sweep_is_a_product_without_repetitions():
    config = BenchConfig(data=DATA, batches=[64, 32, 64], keeps=["none", "all"])
    assert [(case.global_batch, case.keep) for case in config.cases()] == [
        (64, "none"), (64, "all"), (32, "none"), (32, "all"),
    ]  # fmt: skip


def test_the_config_of_a_case_is_the_runs_with_the_cases_values():
    config = BenchConfig(
        data=DATA,
        strategies=["zero3", "ddp"],
        batches=[48],
        strategy=StrategyConfig(name="deepspeed", config={"a": 1}),
        seed=7,
        steps=2,
        repeats=4,
        warmup=3,
        profile=True,
    )
    zero, ddp = (config.config_of(case) for case in config.cases())
    assert (zero.strategy.name, zero.strategy.zero_stage) == ("deepspeed", 3)
    assert zero.strategy.config == {"a": 1}
    assert (ddp.strategy.name, ddp.strategy.config) == ("ddp", {})
    assert (zero.global_batch, zero.seed, zero.max_steps) == (48, 7, 3 + 2 * 4 + 1)


def test_without_sources_texts_are_made_up():
    config = BenchConfig()
    assert config.synthetic
    assert list(config.data.sources) == ["synthetic"]
    assert not BenchConfig(data=DATA).synthetic


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keeps": ["much"]}, "keep='much' is not one of none, all, auto"),
        ({"strategies": ["zero4"]}, "strategies='zero4' is not one of ddp, fsdp"),
        ({"batches": [1]}, "batches=1 must be at least 2"),
        ({"batches": [3], "hardware": HardwareConfig(ranks=4)}, "smaller than hardware.ranks, 4"),
        ({"chunks": ["big"]}, "chunks='big' is neither a number from 1 on nor auto"),
        ({"chunks": [0]}, "chunks=0 is neither"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"warmup": 0}, "warmup=0 must be at least 1"),
        ({"bench_dir": ""}, "bench_dir is empty"),
        ({"keeps": ["auto"], "hardware": HardwareConfig(device="cpu")}, "keep=auto needs keep_gib"),
    ],
)
def test_faults_are_told_in_one_line(options, said):
    with pytest.raises(UserError, match=said) as error:
        BenchConfig(data=DATA, **options)
    assert "\n" not in str(error.value)


def test_a_fault_that_all_cases_share_is_told_once():
    with pytest.raises(UserError) as error:
        BenchConfig(data=DATA, batches=[8, 16, 32], keep="much")
    assert str(error.value).count("much") == 1


def test_the_command_line_tells_a_fault(capsys):
    assert app.main(["bench", "keeps=[much]"]) == 1
    assert capsys.readouterr().err.startswith("error: keep='much' is not one of")


def test_help_tells_its_own_options_first(capsys):
    assert app.main(["bench", "--help"]) == 0
    own = capsys.readouterr().out.partition("Options of its own")[2].partition("Presets")[0]
    for option in ("batches", "chunks", "keeps", "strategies", "steps", "profile", "bench_dir"):
        assert f"\n  {option}  " in own
