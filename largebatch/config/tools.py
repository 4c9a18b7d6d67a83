"""Options of the commands around training."""

from collections.abc import Callable
from dataclasses import dataclass, field

from largebatch.config.checks import Faults, least_of
from largebatch.config.train import DEVICES, TrainConfig
from largebatch.errors import UserError

AVERAGES = ("mean", "slerp")
LAYOUTS = ("packed", "samples")


@dataclass(kw_only=True)
class PairsConfig:
    """Write pairs from text that is on this machine, as shards with a held-out retrieval set."""

    output_dir: str = "data/code"
    """Gets train/ (shards), dev/ and test/ (BEIR layout). Kept for the next run."""
    paths: list[str] = field(default_factory=list)
    """Folders with Python packages. Unset: the standard library and site-packages."""
    workers: int = 0
    """Processes. 0: one per core."""
    max_pairs: int = 200_000
    """Upper bound of training pairs."""
    dev_documents: int = 1000
    """Documents of the development set, from packages that are not trained on."""
    test_documents: int = 2500
    """Documents of the test set, from packages that are neither trained on nor in dev."""
    records_per_shard: int = 10_000
    """Records in one tar file."""
    overwrite: bool = False
    """Whether to write anew what is there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("output_dir", self.output_dir, "name a folder")
        if self.paths:
            faults.not_empty("paths", self.paths, "name folders with Python packages")
        faults.at_least("workers", self.workers, 0)
        faults.at_least("max_pairs", self.max_pairs, 1)
        faults.at_least("dev_documents", self.dev_documents, 1)
        faults.at_least("test_documents", self.test_documents, 1)
        faults.at_least("records_per_shard", self.records_per_shard, 1)
        faults.finish()


@dataclass(kw_only=True)
class ShardConfig:
    """Turn jsonl, csv, tsv, parquet or a Hugging Face dataset into numbered tar shards."""

    input: list[str] = field(default_factory=list)
    """Files (globs allowed; .jsonl, .json, .csv, .tsv, also .gz or .zst, .parquet), a folder saved
    by `datasets` or in BEIR layout, or hf:NAME or hf:NAME:SUBSET for a data set of the hub."""
    output_dir: str = "shards"
    """Gets shard-000000.tar, ... and index.json."""
    source: str = ""
    """Name of the source, written into each record. Unset: the row's own, else the input's name."""
    split: str = "train"
    """Split of a Hugging Face data set, or qrels/SPLIT.tsv of a BEIR folder."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field is what, as {query: title, document: body}. Unset: recognized by name. With
    {grade: none} all rows are positive pairs, even if a label or a score beside them says no.
    {scores: NAME} keeps a teacher's scores, and {label: NAME} (or auto) the number that a pair's
    similarity is to follow; rows with a low one are kept too."""
    positives: dict[str, str] = field(default_factory=dict)
    """Which rows are positive pairs, by their label or score, as {label: 1}, {label: entailment}
    or {score: '>=0.8'}; the others are dropped and counted. Unset: all, and one whose label or
    score is no yes (1, true, ...) ends the command."""
    texts: bool = False
    """Whether rows are texts without queries, for objectives that need none (mlm, retromae). The
    field of the text is recognized, or fields.document names it; a .txt file has a text a line."""
    piece_words: int = 180
    """texts=true only: a text with more words is cut into pieces of about the same length, each a
    record, so that none of it is lost where training cuts at text.document_max_tokens (180 English
    words are some 250 tokens). 0: texts stay whole."""
    records_per_shard: int = 10_000
    """Records in one tar file."""
    layout: str = "packed"
    """packed (a member holds up to 1,000 records as compressed JSON lines: small and quick to
    read) or samples (a member a record, as plain webdataset pipelines expect)."""
    min_chars: int = 1
    """A record with a shorter query or document is dropped and counted."""
    max_chars: int = 200_000
    """A record with a longer text is dropped and counted; training would refuse it."""
    deduplicate: bool = True
    """Whether a pair that was already written is dropped and counted."""
    overwrite: bool = False
    """Whether to replace shards that are there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("input", self.input, "name files, for example input=[pairs.jsonl]")
        faults.not_empty("output_dir", self.output_dir, "name a folder")
        faults.fields("fields", self.fields)
        faults.check(
            not self.positives or self.fields.get("grade", "none") == "none",
            f"fields.grade={self.fields.get('grade')} is not looked at beside positives, which "
            "says itself which rows are positive pairs; leave out one of them",
        )
        for name, value in self.positives.items():
            try:
                least_of(value)
            except ValueError:
                faults.found.append(f"positives.{name}={value!r} must end with a number after >=")
        self._check_texts(faults)
        faults.at_least("records_per_shard", self.records_per_shard, 1)
        faults.one_of("layout", self.layout, LAYOUTS)
        faults.at_least("min_chars", self.min_chars, 1)
        faults.at_least("max_chars", self.max_chars, self.min_chars)
        faults.finish()

    def _check_texts(self, faults: Faults) -> None:
        faults.at_least("piece_words", self.piece_words, 0)
        if not self.texts:
            faults.check(
                self.piece_words == ShardConfig.piece_words,
                f"piece_words={self.piece_words} is for texts=true; leave it out, or set that",
            )
            return
        faults.check(
            not self.positives,
            "positives says which pairs are positive ones, and texts=true has no pairs; leave out "
            "one of them",
        )
        for role in ("query", "negatives", "grade"):
            faults.check(
                role not in self.fields,
                f"fields.{role} means nothing with texts=true; fields.document names the text",
            )


@dataclass(kw_only=True)
class IndexConfig:
    """Write index.json for tar shards that others made."""

    shards: list[str] = field(default_factory=list)
    """A folder with tar files, or tar files (braces and globs allowed), all in one folder, which
    gets index.json."""
    texts: bool = False
    """Whether the records are texts without queries; see `shard`."""
    workers: int = 0
    """Processes that read shards. 0: one per core."""
    overwrite: bool = False
    """Whether to replace an index.json that is there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("shards", self.shards, "name a folder with tar files: shards=FOLDER")
        faults.at_least("workers", self.workers, 0)
        faults.finish()


@dataclass(kw_only=True)
class VerifyConfig:
    """Check shards against their index: presence, size, checksum, records, decodable fields."""

    shards: list[str] = field(default_factory=lambda: ["shards"])
    """Folders with index.json (braces and globs allowed), each of which is checked; a tar file
    stands for its folder."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field is what. Unset: recognized by name."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("shards", self.shards, "name a folder with index.json: shards=FOLDER")
        faults.fields("fields", self.fields)
        faults.finish()


@dataclass(kw_only=True)
class DedupConfig:
    """Leave out duplicates and what evaluation sets contain, and write the rest as new shards."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    """Folders with shards, one or a list, by the source's name; an earlier source keeps what a
    later one has."""
    output_dir: str = "deduplicated"
    """Gets a folder of shards for each source, and report.json."""
    near: bool = True
    """Whether near duplicates go too, by MinHash (Broder 1997)."""
    threshold: float = 0.8
    """Jaccard similarity of the sets of word n-grams, of the queries and of the documents, from
    which two pairs are near duplicates."""
    ngram_words: int = 3
    """Words in a row that make one element of a text's set."""
    num_hashes: int = 128
    """Length of a pair's MinHash signature, half of it the query's; more needs fewer comparisons
    of texts, and more time and disk for hashes."""
    evaluation_sets: dict[str, str] = field(default_factory=dict)
    """BEIR folders, by name; pairs that hold one of their queries or passages are left out."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field of a record is what. Unset: recognized by name."""
    workers: int = 0
    """Processes. 0: one per core."""
    records_per_shard: int = 10_000
    """Records in one tar file."""
    overwrite: bool = False
    """Whether to replace what is there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.check(
            bool(self.sources), "sources is empty; name folders, for example sources.mine=shards"
        )
        for name, folders in self.sources.items():
            faults.not_empty(f"sources.{name}", folders, "name a folder with shards")
        faults.not_empty("output_dir", self.output_dir, "name a folder")
        faults.folders("evaluation_sets", self.evaluation_sets)
        faults.check(
            0 < self.threshold <= 1, f"threshold={self.threshold} must be above 0 and at most 1"
        )
        faults.fields("fields", self.fields)
        faults.at_least("ngram_words", self.ngram_words, 1)
        faults.at_least("num_hashes", self.num_hashes, 16)
        faults.at_least("workers", self.workers, 0)
        faults.at_least("records_per_shard", self.records_per_shard, 1)
        faults.finish()


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a model on retrieval sets in BEIR layout."""

    model: str = ""
    """Exported model (a sentence-transformers folder) or hub name."""
    sets: dict[str, str] = field(default_factory=dict)
    """Retrieval sets by name: folders with corpus.jsonl, queries.jsonl, qrels/."""
    split: str = "test"
    """Which qrels/SPLIT.tsv is used."""
    bm25: bool = False
    """Whether BM25 is scored too, for comparison."""
    output: str | None = None
    """JSON file for the scores."""
    truncate_dim: int | None = None
    """How many of an embedding's first numbers are used, for models that were trained so
    (objective.matryoshka_dims). Unset: all."""
    batch_tokens: int = 16384
    """Padded tokens per chunk."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("model", self.model, "name a folder, for example model=runs/x/model")
        faults.check(bool(self.sets), "sets is empty; for example sets.test=data/code/test")
        faults.folders("sets", self.sets)
        if self.truncate_dim is not None:
            faults.at_least("truncate_dim", self.truncate_dim, 1)
        faults.at_least("batch_tokens", self.batch_tokens, 1)
        faults.one_of("device", self.device, DEVICES)
        faults.finish()


@dataclass(kw_only=True)
class EncodeConfig:
    """Embed the texts of a file, of any format that `shard` reads, and write a .npy matrix."""

    model: str = ""
    """Exported model (a sentence-transformers folder) or hub name."""
    input: list[str] = field(default_factory=list)
    """One or a list of .txt files (a text a line; also .gz or .zst; globs allowed), or of what
    `shard` takes."""
    output: str = "embeddings.npy"
    """Gets float32 [number of texts, width], in the order of the input, as NumPy's .npy."""
    side: str = "document"
    """query or document: whose prompt is put before each text."""
    field: str = "text"
    """Field of a row that holds the text, where the input is no .txt file."""
    truncate_dim: int | None = None
    """How many of an embedding's first numbers are used, for models that were trained so
    (objective.matryoshka_dims). Unset: all."""
    batch_tokens: int = 16384
    """Padded tokens per chunk."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("model", self.model, "name a folder, for example model=runs/x/model")
        faults.not_empty("input", self.input, "name a file, for example input=texts.jsonl")
        faults.one_of("side", self.side, ("query", "document"))
        if self.truncate_dim is not None:
            faults.at_least("truncate_dim", self.truncate_dim, 1)
        faults.at_least("batch_tokens", self.batch_tokens, 1)
        faults.one_of("device", self.device, DEVICES)
        faults.finish()


@dataclass(kw_only=True)
class ExportConfig:
    """Write a checkpoint of a run as a sentence-transformers folder."""

    run: str = ""
    """Run folder of `largebatch train`."""
    checkpoint: str = "best"
    """best, last, or a step number."""
    output_dir: str | None = None
    """Where to. Unset: model/ in the run folder."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.not_empty("run", self.run, "name a run folder, for example run=runs/quickstart")
        if self.output_dir is not None:
            faults.not_empty("output_dir", self.output_dir, "name a folder")
        faults.finish()


@dataclass(kw_only=True)
class AverageConfig:
    """Average the weights of several models of one architecture (model soup, slerp)."""

    models: list[str] = field(default_factory=list)
    """Two or more: exported folders, or checkpoints of runs, as in
    runs/x/checkpoints/step_00001000. Prompts and lengths are the first one's."""
    method: str = "mean"
    """mean (of each weight), or slerp (each tensor along the arc from one model to the next, as
    Qwen3-Embedding does)."""
    weights: list[float] = field(default_factory=list)
    """What each model weighs. Unset: all alike."""
    output_dir: str = "averaged"
    """Gets a sentence-transformers folder."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.check(
            len(self.models) >= 2,
            f"models={self.models} must name two or more folders, for example "
            "models=[runs/a/model,runs/b/model]",
        )
        faults.one_of("method", self.method, AVERAGES)
        faults.check(
            len(self.weights) in (0, len(self.models)),
            f"weights has {len(self.weights)} numbers and models {len(self.models)}; give each "
            "model one, or leave it out",
        )
        for weight in self.weights:
            faults.at_least("weights", weight, 0)
        faults.check(
            not self.weights or sum(self.weights) > 0, "weights are all 0; raise one of them"
        )
        faults.not_empty("output_dir", self.output_dir, "name a folder")
        faults.finish()


@dataclass(kw_only=True)
class DataShowConfig(TrainConfig):
    """Print the global batch that an optimizer step of a run trains on."""

    step: int = 1
    """The step, counted from 1 as the console and metrics.jsonl of a run count: step=1 is the
    first batch, step=123 what the line `step 123` was trained on."""
    rows: int | str = 10
    """How many rows are printed, spread evenly over the batch. 0 or all: every row."""
    format: str = "text"
    """text (for people) or jsonl (for programs: one row of the batch a line, nothing else)."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.at_least("step", self.step, 1)
        faults.check(
            self.step <= max(self.max_steps, 1),
            f"step={self.step} is never trained on: max_steps={self.max_steps} is the last one",
        )
        faults.check(
            self.rows == "all" or (isinstance(self.rows, int) and self.rows >= 0),
            f"rows={self.rows} must be a number from 0 on, or all",
        )
        faults.one_of("format", self.format, ("text", "jsonl"))
        _finish_with(faults, super().__post_init__)


@dataclass(kw_only=True)
class DataStatsConfig(TrainConfig):
    """Count and plot what the sources of a run hold, good and bad."""

    sample: int = 10_000
    """Records per source that are looked into, from all over the source. 0: all of them."""
    examples: int = 3
    """Records per source that are shown."""
    stats_dir: str = "data_stats"
    """Gets stats.json, lengths_characters.png and, where a tokenizer is at hand,
    lengths_tokens.png."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.at_least("sample", self.sample, 0)
        faults.at_least("examples", self.examples, 0)
        faults.not_empty("stats_dir", self.stats_dir, "name a folder")
        _finish_with(faults, super().__post_init__)


def _finish_with(faults: Faults, check_others: Callable[[], None]) -> None:
    try:
        check_others()
    except UserError as error:
        faults.found.append(str(error))
    faults.finish()
