"""Pairs of docstring and code from installed Python packages (CodeSearchNet's task).

For every function or method with a docstring: the query is the docstring's first paragraph, the
document is the source without docstrings (Husain et al. 2019, https://arxiv.org/abs/1909.09436).
Nothing is imported or run: files are read and parsed.
"""

import ast
import itertools
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import decode_source
from pathlib import Path
from typing import NamedTuple

from largebatch.errors import UserError

MAX_DOCUMENT_CHARS = 4000
"""A longer function is dropped, for a model would see only its beginning."""
MIN_BODY_LINES = 2
"""As in CodeSearchNet, whose functions have three lines with the `def`."""
MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 200
FILES_PER_TASK = 32
"""Files that a process reads at a time."""

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
# Tests are named after what they check and rarely say it in words, so they teach little.
_TEST_FOLDERS = {"test", "tests", "idle_test", "testdata", "test_data"}
_VENDOR_FOLDERS = {"_vendor", "_vendored", "vendor", "vendored", "externals", "third_party"}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Holder = _Function | ast.ClassDef
# What definitions can be inside of: expressions never hold any.
_Block = ast.stmt | ast.ExceptHandler | ast.match_case


class SourceFile(NamedTuple):
    """A Python file and what it is called when imported."""

    path: Path
    """Where it is."""
    module: str
    """Dotted name."""
    package: str
    """Top-level package that the code comes from: that of the module, or the vendored one."""
    num_bytes: int
    """Its size."""


class CodePair(NamedTuple):
    """A function's description and its code."""

    id: str
    """The qualified name, numbered (`#2`) where a name occurs again."""
    name: str
    """Qualified name: module, classes, function."""
    package: str
    """Top-level package that the code comes from."""
    query: str
    """First paragraph of the docstring, on one line."""
    document: str
    """Source of the function with its decorators, without docstrings, dedented."""


class Extraction(NamedTuple):
    """Pairs, and what was left out and why."""

    pairs: list[CodePair]
    """In the order of the files, and of the code within a file."""
    dropped: Counter[str]
    """How many functions with a docstring, or files, each reason left out."""


def installed_roots() -> list[Path]:
    """Return the folders of the running interpreter's standard library and site-packages."""
    paths = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    return list(dict.fromkeys(Path(path).resolve() for path in paths))


def find_source_files(roots: Sequence[Path]) -> list[SourceFile]:
    """Return the Python files below `roots`, tests left out, in an order that is always the same.

    A root that is itself a package (has an `__init__.py`) is named from its outermost package on.

    Raises:
        UserError: a root is not a folder.
    """
    files: dict[Path, SourceFile] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"paths: {root} is not a folder; name folders with Python packages")
        base = root
        while (base / "__init__.py").exists():
            base = base.parent
        for folder, subfolders, names in os.walk(root):
            wanted = set(subfolders) - _SKIPPED_FOLDERS - _TEST_FOLDERS
            subfolders[:] = sorted(name for name in wanted if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                # Editors leave links to nowhere that end in .py.
                if name.endswith(".py") and not _is_test_file(name) and path.is_file():
                    files.setdefault(path, _source_file(path, path.relative_to(base)))
    return list(files.values())


def extract_all(
    files: Sequence[SourceFile], *, workers: int, advance: Callable[[int], None]
) -> Extraction:
    """Return the pairs of all files, read by `workers` processes; their number changes nothing.

    `advance` is called with the number of bytes that were read since the last call.
    """
    tasks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    total = Extraction([], Counter())
    for task, part in zip(tasks, _in_processes(tasks, workers), strict=True):
        total.pairs.extend(part.pairs)
        total.dropped.update(part.dropped)
        advance(sum(file.num_bytes for file in task))
    seen: Counter[str] = Counter()
    for i, pair in enumerate(total.pairs):
        seen[pair.name] += 1
        if seen[pair.name] > 1:
            total.pairs[i] = pair._replace(id=f"{pair.name}#{seen[pair.name]}")
    return total


def extract_file(file: SourceFile) -> Extraction:
    """Return the pairs of one file; one that cannot be read or parsed counts as dropped."""
    try:
        source = decode_source(file.path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like: others' business
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return Extraction([], Counter(unreadable_file=1))
    extraction = Extraction([], Counter())
    # Positions in the tree are lines and UTF-8 bytes, and lines end at \n only.
    lines = source.encode().split(b"\n")
    for name, node in _functions(tree, file.module):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        query = first_paragraph(docstring)
        document = _document(lines, node)
        if reason := _fault(node, query, document):
            extraction.dropped[reason] += 1
        else:
            extraction.pairs.append(CodePair(name, name, file.package, query, document))
    return extraction


def first_paragraph(docstring: str) -> str:
    r"""Return the first paragraph of a cleaned docstring that is prose, on one line.

    >>> first_paragraph("Return the :class:`~a.Node`\nof a key.\n\nMore.")
    'Return the Node of a key.'
    >>> first_paragraph("find(key) -> node\n\nReturn the node.\nArgs:\n    key: A word.")
    'Return the node.'
    >>> first_paragraph("Args:\n    key: A word.")
    ''
    """
    text = _SIGNATURE.sub("", docstring.strip())
    paragraph = re.split(r"\n\s*\n", text, maxsplit=1)[0]
    prose = itertools.takewhile(lambda line: not _NO_PROSE.match(line), paragraph.split("\n"))
    text = " ".join(" ".join(prose).split())
    return _ROLE.sub(lambda match: match[1].removeprefix("~").split(".")[-1], text)


# What follows prose, sometimes without a blank line between: sections, lists of parameters,
# examples, underlines.
_NO_PROSE = re.compile(
    r"\s*((keyword )?(args|arguments|attributes|parameters?|params|returns?|raises|yields|examples?"
    r"|notes?|usage|inputs?|outputs?|shapes?|references?|see also)\s*:*\s*$"
    r"|\*{0,2}\w+ (\(`|\((int|str|bool|float|list|dict|tuple|Tensor|torch|optional)\b|: \S)"
    r"|[:@](param|parameter|arg|type|returns?|rtype|raises|keyword)\b|>>>|\.\. |[-=~^*#]{3,}|```)",
    re.IGNORECASE,
)
# A first line that only repeats how the function is called.
_SIGNATURE = re.compile(r"\A[\w.]+\([^\n]*\)( *-+> *[\w\[\](), .]{1,40})?(\n\s*|\Z)")
_ROLE = re.compile(r":[a-zA-Z:+-]+:`([^`<>]+)`")


def _is_test_file(name: str) -> bool:
    return name.startswith("test_") or name.endswith("_test.py") or name == "conftest.py"


def _source_file(path: Path, relative: Path) -> SourceFile:
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    package = parts[0]
    for folder, inner in itertools.pairwise(parts):
        if folder in _VENDOR_FOLDERS:
            package = inner.lstrip("_")
    return SourceFile(path, ".".join(parts), package, path.stat().st_size)


def _in_processes(tasks: Sequence[Sequence[SourceFile]], workers: int) -> Iterator[Extraction]:
    if workers == 1:
        yield from map(_extract_files, tasks)
        return
    # Spawned, not forked: the caller may hold threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_extract_files, tasks)


def _extract_files(files: Sequence[SourceFile]) -> Extraction:
    total = Extraction([], Counter())
    for file in files:
        part = extract_file(file)
        total.pairs.extend(part.pairs)
        total.dropped.update(part.dropped)
    return total


def _functions(node: ast.AST, name: str) -> Iterator[tuple[str, _Function]]:
    """Yield functions with their qualified names; one inside another belongs to the outer one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{name}.{child.name}")
        elif isinstance(child, _Block):
            yield from _functions(child, name)


def _document(lines: Sequence[bytes], node: _Function) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert node.end_lineno is not None
    kept = list(lines[first - 1 : node.end_lineno])
    kept[-1] = kept[-1][: node.end_col_offset]
    # From the last to the first, so that positions of those before stay true.
    for holder in reversed(list(_holders_of_docstrings(node))):
        _remove_docstring(kept, holder, first)
    margin = lines[first - 1][: node.col_offset]
    text = b"\n".join(line.removeprefix(margin) for line in kept)
    return text.decode()


def _holders_of_docstrings(node: ast.AST) -> Iterator[_Holder]:
    """Yield `node` and what is defined inside it, as far as it has a docstring, in source order."""
    if isinstance(node, _Holder) and ast.get_docstring(node, clean=False) is not None:
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Block):
            yield from _holders_of_docstrings(child)


def _remove_docstring(lines: list[bytes], holder: _Holder, first: int) -> None:
    docstring = holder.body[0]
    assert docstring.end_lineno is not None
    assert docstring.end_col_offset is not None
    start, end = docstring.lineno - first, docstring.end_lineno - first
    before = lines[start][: docstring.col_offset]
    after = lines[end][docstring.end_col_offset :].lstrip(b" \t;")
    if after.startswith(b"#"):
        after = b""  # It was about the docstring.
    if len(holder.body) == 1:
        after = b"pass"
    if not before.strip() and not after:
        del lines[start : end + 1]
    else:
        lines[start : end + 1] = [before + after]


def _fault(node: _Function, query: str, document: str) -> str | None:
    """Return why a function makes no good pair, or `None` if it does."""
    body = node.body[1:]
    if not body or _is_placeholder(body):
        return "trivial_code"
    assert body[-1].end_lineno is not None
    if body[-1].end_lineno - body[0].lineno + 1 < MIN_BODY_LINES:
        return "trivial_code"
    if len(document) > MAX_DOCUMENT_CHARS:
        return "long_code"
    if re.fullmatch(r"__\w+__", node.name):
        return "special_method"
    words = len(re.findall(r"[^\W\d_]{2,}", query))
    if words < MIN_QUERY_WORDS:
        return "short_query"
    if words > MAX_QUERY_WORDS:
        return "long_query"
    if sum(map(str.isascii, query)) < 0.9 * len(query) or not query.isprintable():
        return "not_prose"
    return None


def _is_placeholder(body: Sequence[ast.stmt]) -> bool:
    match body:
        case [ast.Pass()] | [ast.Expr(ast.Constant())]:
            return True
        case [ast.Raise(exc=ast.Name(id="NotImplementedError"))]:
            return True
        case [ast.Raise(exc=ast.Call(func=ast.Name(id="NotImplementedError")))]:
            return True
    return False
