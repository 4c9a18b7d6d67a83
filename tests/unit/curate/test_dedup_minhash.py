import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import example, given
from hypothesis import strategies as st

from largebatch.curate import minhash
from largebatch.curate.duplicates import MAX_LINKS, exact_duplicates, near_candidates

NUM_HASHES = 256


def sets_of(texts, size=3):
    return minhash.ngrams(minhash.hash_words([minhash.normalize(t) for t in texts]), size)


def planted_texts():
    """Return texts of random words, and copies of them with more and more words replaced."""
    rng = random.Random(5)
    words = [f"w{n}" for n in range(5000)]
    texts = []
    for _ in range(30):
        base = [rng.choice(words) for _ in range(120)]
        texts.append(" ".join(base))
        for num_changed in (1, 3, 6, 12, 30):
            copy = list(base)
            for place in rng.sample(range(len(copy)), num_changed):
                copy[place] = rng.choice(words)
            texts.append(" ".join(copy))
    return texts


def datasketches(texts, size=3):
    sketches = []
    for text in texts:
        sketch = MinHash(NUM_HASHES, seed=7)
        for gram in minhash._set_of(text, size):
            sketch.update(" ".join(gram).encode())
        sketches.append(sketch)
    return sketches


def test_signatures_estimate_the_similarity_as_datasketch_does():
    texts = planted_texts()
    ours = minhash.sign(sets_of(texts), NUM_HASHES)
    theirs = datasketches(texts)
    errors, differences, deviations = [], [], []
    for base in range(0, len(texts), 6):
        for copy in range(base + 1, base + 6):
            true = minhash.similarity(texts[base], texts[copy], 3)
            estimate = float((ours[base] == ours[copy]).mean())
            deviation = (true * (1 - true) / NUM_HASHES) ** 0.5
            errors.append((estimate - true) / deviation)
            differences.append(estimate - theirs[base].jaccard(theirs[copy]))
            deviations.append(deviation)
    assert max(map(abs, errors)) < 5
    assert abs(np.mean(errors)) < 0.4
    assert 0.5 < np.std(errors) < 1.3
    # Two independent estimates differ by the root of two deviations.
    assert np.std(differences) < 1.3 * 2**0.5 * np.mean(deviations)
    assert max(np.abs(differences) / np.array(deviations)) < 6.5


def test_the_pairs_found_are_those_that_datasketch_finds():
    texts = planted_texts()
    threshold = 0.7
    keys = minhash.band_keys(
        minhash.sign(sets_of(texts), NUM_HASHES), minhash.choose_bands(threshold, NUM_HASHES)
    )
    candidates = near_candidates(keys.T, np.arange(len(texts))).tolist()
    lsh = MinHashLSH(threshold, NUM_HASHES, params=(36, 7))
    theirs = set()
    for number, sketch in enumerate(datasketches(texts)):
        theirs |= {(int(other), number) for other in lsh.query(sketch)}
        lsh.insert(str(number), sketch)
    near = [
        {(a, b) for a, b in pairs if minhash.similarity(texts[a], texts[b], 3) >= threshold}
        for pairs in (candidates, theirs)
    ]
    true = {
        (a, b)
        for b in range(len(texts))
        for a in range(b)
        if minhash.similarity(texts[a], texts[b], 3) >= threshold
    }
    assert len(true) > 60
    assert near[0] == near[1] == true


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("num_hashes", [64, 128, 256])
def test_bands_find_nearly_all_at_the_threshold(threshold, num_hashes):
    bands = minhash.choose_bands(threshold, num_hashes)
    assert bands.num_bands * bands.num_rows <= num_hashes
    assert bands.recall(threshold) >= minhash.MIN_RECALL
    finer = minhash.Bands(num_hashes // (bands.num_rows + 1), bands.num_rows + 1)
    assert threshold == 1 or finer.recall(threshold) < minhash.MIN_RECALL


@given(st.lists(st.text("ab,Ü 的ा", max_size=8), max_size=6), st.integers(1, 4))
def test_hashed_sets_are_the_sets_of_words(texts, size):
    normalized = [minhash.normalize(text) for text in texts]
    rows = minhash.hash_words(normalized)
    sets = minhash.ngrams(rows, size)
    counted = [
        {int(h) for h in sets.hashes[begin:end]}
        for begin, end in zip(sets.offsets[:-1], sets.offsets[1:], strict=True)
    ]
    for one, hashes in zip(normalized, counted, strict=True):
        assert len(hashes) == len(minhash._set_of(one, size))
        for other, others in zip(normalized, counted, strict=True):
            shared = minhash._set_of(one, size) & minhash._set_of(other, size)
            assert len(hashes & others) == len(shared)
    plain = minhash.without_marks(rows)
    assert plain.lengths.tolist() == [len(minhash.words_of(text)) for text in normalized]
    wholes = minhash.hash_whole(plain)
    for one, whole in zip(normalized, wholes, strict=True):
        for other, another in zip(normalized, wholes, strict=True):
            assert (whole == another) == (minhash.words_of(one) == minhash.words_of(other))


def test_words_of_scripts_without_spaces_and_with_vowel_signs():
    assert minhash.split_words("北京 is 大") == ["北", "京", "is", "大"]
    assert minhash.words_of(minhash.normalize("हिन्दी!")) == minhash.split_words("हिन्दी")


def test_a_changed_word_counts_alike_wherever_it_is():
    words = [f"w{n}" for n in range(12)]
    texts = [" ".join([*words[:place], "x", *words[place + 1 :]]) for place in range(12)]
    values = {minhash.similarity(" ".join(words), text, 3) for text in texts}
    assert values == {11 / 17}


@given(st.lists(st.integers(0, 5), max_size=60))
@example([0] * 100)
@example([0, 1] * 70)
def test_candidates_are_the_pairs_with_a_key_in_common(keys):
    column = np.array(keys, np.uint64)
    numbers = np.arange(len(keys)) * 3 + 1
    pairs = near_candidates([column, column], numbers).tolist()
    expected = []
    for b in range(len(keys)):
        earlier = [a for a in range(b) if keys[a] == keys[b]]
        linked = sorted({*earlier[:MAX_LINKS], *earlier[-MAX_LINKS:]})
        expected += [[3 * a + 1, 3 * b + 1] for a in linked]
    assert pairs == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_exact_duplicates_are_those_after_the_first(keys):
    numbers = np.arange(len(keys)) * 2 + 5
    found, kept = exact_duplicates(np.array(keys, np.uint64).reshape(-1, 2), numbers)
    firsts = {key: 2 * place + 5 for place, key in reversed(list(enumerate(keys)))}
    pairs = [(2 * place + 5, firsts[key]) for place, key in enumerate(keys)]
    assert list(zip(found.tolist(), kept.tolist(), strict=True)) == [
        (number, first) for number, first in pairs if number != first
    ]
