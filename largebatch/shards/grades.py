"""Fields that grade a pair: what says of itself that it is no positive one must not become one.

Names and values are those of published sets of pairs: `label` 0 or 1, `is_duplicate`, `gold_label`
(`entailment`, `neutral`, `contradiction`), `score`, `similarity_score`, `relevance`. A number says
nothing of its scale (4 may be a poor grade of 5, or 4 votes), so that only 1 is a yes.
"""

import re
from collections.abc import Mapping
from typing import Any

_OF_WHAT = (
    "gold|true|human|final|binary|majority|annotator|pair|nli|sts|esci|qrels?|relevance|relevancy|"
    "rel|similarity|sim|relatedness|entailment|duplicate|paraphrase|match|matching|semantic|"
    "cosine|cos_sim|cross_encoder|ce|reranker|rerank"
)
_GRADE = re.compile(
    rf"(?:(?:{_OF_WHAT})_)?(?:labels?|score|grade|judgment|judgement)(?:_(?:text|str|name|id|int))?"
    r"|(?:\w+_)?(?:similarity|relevance|relevancy|relatedness|entailment|duplicate|paraphrase)"
    r"|relevant|related|similar|sim|cos_sim|rel|qrel|match|correct|answerable|has_answer"
    r"|is_(?:positive|pos|relevant|related|similar|match|matching|correct|entailed|answer|"
    r"answerable|selected|accepted|equivalent|same)"
)
_GRADE_OF_NEGATIVES = re.compile(
    r"is_(?:hard_)?negative|(?:is_)?irrelevant|is_(?:impossible|unanswerable)|not_(?:duplicate|relevant|similar|match)"
)

KEPT_ASIDE = "input_"
"""What `largebatch shard` puts before the name of a field that readers are not to look at."""

_YES = frozenset(
    {"1", "true", "yes", "y", "t", "positive", "pos", "correct", "exact", "match", "same"}
    | {"entailment", "entailed", "entails", "supports", "supported"}
    | {"duplicate", "paraphrase", "relevant", "similar", "equivalent"}
)
_NO = frozenset({"0", "false", "no", "n", "f"})


def is_grade(name: str) -> bool:
    """Whether a field of this name says how well the pair beside it fits.

    >>> [is_grade(name) for name in ("label", "is_duplicate", "goldLabel", "relevance score")]
    [True, True, True, True]
    >>> [is_grade(name) for name in ("scores", "language", "votes", "input_is_duplicate")]
    [False, False, False, False]
    """
    if name.startswith(KEPT_ASIDE):
        return False
    plain = _plain(name)
    return bool(_GRADE.fullmatch(plain) or _GRADE_OF_NEGATIVES.fullmatch(plain))


def says_positive(name: str, value: Any) -> bool:
    """Whether the field's value leaves the pair a positive one: a yes, or nothing at all.

    A list grades something else: candidates, or answers of several people.

    >>> [says_positive("label", value) for value in (1, "1.0", True, "Entailment", None, [0, 1])]
    [True, True, True, True, True, True]
    >>> [says_positive("label", value) for value in (0, "0", False, "neutral", 0.99, -1)]
    [False, False, False, False, False, False]
    """
    if value is None or isinstance(value, list | tuple | Mapping) or value != value:
        return True
    word = _word(value)
    if word in ("", "nan", "null"):
        return True
    return word in (_NO if _GRADE_OF_NEGATIVES.fullmatch(_plain(name)) else _YES)


def same_value(value: Any, wanted: str) -> bool:
    """Whether a field's value is what a user wrote: numbers as numbers, words in any case.

    >>> [same_value(value, "1") for value in (1, 1.0, "1", True, False)]
    [True, True, True, True, False]
    >>> same_value(True, "true"), same_value("Entailment", "entailment")
    (True, True)
    """
    if isinstance(value, bool) and _word(wanted) in ("0", "1"):
        value = int(value)
    return value is not None and _word(value) == _word(wanted)


def _word(value: Any) -> str:
    """Return a value as a word: 1.0 is "1"."""
    word = str(value).strip().casefold()
    try:
        number = float(word)
    except ValueError:
        return word
    return str(int(number)) if number.is_integer() else str(number)


def _plain(name: str) -> str:
    """Return a name as lower-case words: `goldLabel` and `Gold Label` are `gold_label`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
