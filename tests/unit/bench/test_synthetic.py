import numpy as np

from largebatch.bench.synthetic import lognormal_lengths, write_synthetic_shards
from largebatch.config import SourceConfig, TrainConfig
from largebatch.config.data import DataConfig
from largebatch.curate.statistics import sample_source
from largebatch.data.text import TextSettings
from largebatch.train.build import build_sources


def test_lengths_spread_as_the_documentation_says():
    lengths = lognormal_lengths(20_000, 300, np.random.default_rng(0))
    assert lengths.min() >= 4
    assert lengths.max() == 300
    assert np.median(lengths) == 100 or abs(np.median(lengths) - 100) < 3
    uncut = np.log(lengths[lengths < 100])
    # Half of a normal distribution of sigma 0.8 lies this far below its middle, on average.
    assert abs((np.log(100) - uncut).mean() - 0.8 * np.sqrt(2 / np.pi)) < 0.03


def test_shards_hold_distinct_pairs_within_the_lengths(tmp_path):
    folder = tmp_path / "shards"
    write_synthetic_shards(folder, 1500, query_max_tokens=12, document_max_tokens=30, seed=1)
    data = DataConfig(sources={"made": SourceConfig(urls=[str(folder)])})
    (source,) = build_sources(TrainConfig(data=data))
    text = TextSettings(query_max_tokens=12, document_max_tokens=30)
    sample = sample_source(source, max_records=0, text=text, tokenizer=None, num_examples=1500)
    assert sample.num_usable == 1500
    documents = [record.document.split() for record in sample.examples]
    assert max(map(len, documents)) == 30
    assert min(map(len, documents)) >= 4
    assert len({" ".join(document) for document in documents}) == len(documents) > 1000
