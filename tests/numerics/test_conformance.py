"""The table of benchmarks/peers for what is installed: ours exact, peers as it says."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))

import conformance
import installed
from contenders import CONTENDERS, full_batch_gradient

BY_NAME = {contender.name: contender for contender in CONTENDERS}
OURS = [contender.name for contender in CONTENDERS if contender.peer == "largebatch"]
# The peers' known factors, of weights and of the temperature, on two ranks.
PEERS = {
    "sentence-transformers, cached, gather_across_devices": (1, None),
    "GradCache, DistributedContrastiveLoss": (1 / 2, None),
    "open_clip, local_loss=0, gather_with_grad=0": (1 / 2, 1),
    "open_clip, local_loss=1, gather_with_grad=1": (1, 1),
    "FlagEmbedding, negatives_cross_device": (1 / 2, None),
    "Inf-CL, ring loss (float32)": (1, 2),
    "pylate, Contrastive": (2, None),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", OURS)
def test_ours_is_the_full_batch(name, ranks):
    cell = conformance.measure(BY_NAME[name], ranks, debug=True)
    assert cell.weights_ratio == pytest.approx(1, abs=1e-6)
    assert cell.weights_cosine == pytest.approx(1, abs=1e-9)
    assert cell.temperature_ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("name", PEERS)
def test_peers_are_as_the_table_says(name):
    """So that a harness that reports 1 for everything is found out."""
    contender = BY_NAME[name]
    try:
        contender.load()
    except installed.MissingPeerError as error:
        pytest.skip(str(error))
    weights, temperature = PEERS[name]
    cell = conformance.measure(contender, 2, debug=True)
    assert cell.weights_ratio == pytest.approx(weights, abs=1e-5)
    assert cell.weights_cosine == pytest.approx(1, abs=1e-9)
    if temperature is not None:
        assert cell.temperature_ratio == pytest.approx(temperature, abs=1e-5)


def test_what_is_off_is_seen():
    ours = BY_NAME["largebatch"]

    def without_other_ranks(task):
        """Return the gradient of this rank's rows against its own columns, not averaged."""
        return full_batch_gradient(task, ours)

    cell = conformance.measure(ours._replace(run=without_other_ranks), 2, debug=True)
    assert cell.weights_cosine < 0.99
    assert abs(cell.weights_ratio - 1) > 0.01
    assert cell.temperature_ratio is not None
    assert abs(cell.temperature_ratio - 1) > 0.01
