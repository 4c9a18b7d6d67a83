import ast
from pathlib import Path
from textwrap import dedent

import pytest

from largebatch.curate.code_pairs import (
    CodePair,
    Extraction,
    SourceFile,
    extract_all,
    extract_file,
    find_source_files,
    first_paragraph,
    installed_roots,
)
from largebatch.errors import UserError


def extract(tmp_path: Path, code: str) -> Extraction:
    path = tmp_path / "mod.py"
    path.write_text(dedent(code), encoding="utf-8")
    return extract_file(SourceFile(path, "pkg.mod", "pkg", 0))


def only_pair(tmp_path: Path, code: str) -> CodePair:
    (pair,) = extract(tmp_path, code).pairs
    return pair


def test_pair_of_a_method_is_cut_exactly(tmp_path):
    pair = only_pair(
        tmp_path,
        '''
        class Tree:
            """Holds nodes in order."""

            @staticmethod
            @cached(size=3)
            async def find(key, *, deep=True):
                """Return the node
                of a key.

                Args:
                    key: A word.
                """
                # Look at the root first, "né".
                node = await root(key)

                return node

            x = 3
        ''',
    )
    assert pair.id == pair.name == "pkg.mod.Tree.find"
    assert pair.package == "pkg"
    assert pair.query == "Return the node of a key."
    assert pair.document == dedent(
        """\
        @staticmethod
        @cached(size=3)
        async def find(key, *, deep=True):
            # Look at the root first, "né".
            node = await root(key)

            return node"""
    )


def test_inner_docstrings_go_and_inner_functions_are_no_pairs(tmp_path):
    pair = only_pair(
        tmp_path,
        '''
        def outer(values):
            """Sum the values that are left."""
            class Stop(Exception):
                """Tells that all is done."""
            def inner(value):
                """Say whether a value is left."""
                return value > 0
            if values:
                def other(): "Return something that matters."; return 1
            return sum(filter(inner, values))
        ''',
    )
    assert pair.name == "pkg.mod.outer"
    assert '"' not in pair.document
    module = ast.parse(pair.document)
    assert not [
        n for n in ast.walk(module) if isinstance(n, ast.Constant) and n.value not in (0, 1)
    ]
    assert len([n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]) == 3


@pytest.mark.parametrize(
    "first_line",
    [
        '"Return twice the value here."',
        '"Return twice the value here."  # noqa: D401',
        '"Return twice the value here.";',
        '("Return twice "\n        "the value here.")',
        'r"""Return twice the value here.\n    """; y = 2',
        "'''Return twice the value here.\nArgs:\nless indented'''",
        '"Return twice the value here."; text = """\nnot indented\n"""',
    ],
)
def test_code_compiles_and_means_the_same_without_its_docstring(tmp_path, first_line):
    code = f"class A:\n  def f(x):\n    {first_line}\n    y = x * 2\n    return y\n"
    pair = only_pair(tmp_path, code)
    assert pair.query == "Return twice the value here."
    expected = ast.parse(code).body[0].body[0]
    expected.body.pop(0)
    assert ast.dump(ast.parse(pair.document).body[0]) == ast.dump(expected)


def test_functions_are_found_in_any_block(tmp_path):
    body = '"""Return the value of it."""\n        x = 1\n        return x\n'
    code = (
        f"if a:\n    def f():\n        {body}else:\n    def f():\n        {body}"
        f"try:\n    pass\nexcept E:\n    def g():\n        {body}"
        f"match a:\n  case 1:\n    def h():\n        {body}"
    )
    names = [pair.name for pair in extract(tmp_path, code).pairs]
    assert names == ["pkg.mod.f", "pkg.mod.f", "pkg.mod.g", "pkg.mod.h"]


@pytest.mark.parametrize(
    ("reason", "head", "docstring", "body"),
    [
        ("trivial_code", "def f():", "Return the value of it.", ""),
        ("trivial_code", "def f():", "Return the value of it.", "return 1"),
        ("trivial_code", "def f():", "Return the value of it.", "raise NotImplementedError(\n'x')"),
        ("trivial_code", "def f():", "Return the value of it.", "..."),
        ("long_code", "def f():", "Return the value of it.", "x = 1\n" * 1000),
        ("special_method", "def __len__(self):", "Return the number of it.", "x = 1\nreturn x"),
        ("short_query", "def f():", "Two words.", "x = 1\nreturn x"),
        ("short_query", "def f():", ":param x: Of some kind here.", "x = 1\nreturn x"),
        ("short_query", "def f():", ">>> f(x, y, z)  # and so on", "x = 1\nreturn x"),
        ("short_query", "def f():", "1 + 2 - 34 x = 56 * 7", "x = 1\nreturn x"),
        ("long_query", "def f():", "word " * 201, "x = 1\nreturn x"),
        ("not_prose", "def f():", "数を返す 関数で ある。", "x = 1\nreturn x"),
        ("not_prose", "def f():", "One lone \\ud800 surrogate here.", "x = 1\nreturn x"),
    ],
)
def test_what_makes_no_good_pair_is_counted(tmp_path, reason, head, docstring, body):
    lines = [f'"""{docstring}"""', *body.splitlines()]
    extraction = extract(tmp_path, "\n    ".join([head, *lines]))
    assert extraction.pairs == []
    assert extraction.dropped == {reason: 1}


def test_function_without_docstring_is_not_counted(tmp_path):
    assert extract(tmp_path, "def f():\n    x = 1\n    return x\n") == Extraction([], {})


@pytest.mark.parametrize(
    "content",
    [b"def f(:\n", 'x = "é"\n'.encode("latin-1"), b"x = 1\0\n", b"# coding: nonsense\n"],
)
def test_file_that_python_cannot_read_is_counted(tmp_path, content):
    path = tmp_path / "broken.py"
    path.write_bytes(content)
    assert extract_file(SourceFile(path, "broken", "broken", 0)).dropped == {"unreadable_file": 1}
    path.unlink()
    assert extract_file(SourceFile(path, "broken", "broken", 0)).dropped == {"unreadable_file": 1}


def test_declared_encodings_and_line_ends_are_understood(tmp_path):
    code = '# coding: latin-1\ndef f():\n    """Say it in é words."""\n    x = "é"\n    return x\n'
    path = tmp_path / "old.py"
    path.write_bytes(code.replace("\n", "\r\n").encode("latin-1"))
    (pair,) = extract_file(SourceFile(path, "old", "old", 0)).pairs
    assert pair.query == "Say it in é words."
    assert pair.document == 'def f():\n    x = "é"\n    return x'


def test_warnings_of_the_parsed_code_stay_silent(tmp_path):
    code = 'def f():\n    """Return the \\d of it."""\n    x = "\\d"\n    return x is 1\n'
    assert only_pair(tmp_path, code).query == "Return the \\d of it."


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("One line.\n\nMore.", "One line."),
        ("Two\n  lines  here.\n   \nMore.", "Two lines here."),
        ("Prose.\nParameters\n----------\nx", "Prose."),
        ("Prose.\n:param x: A number.", "Prose."),
        ("Prose.\n>>> f()", "Prose."),
        ("x (`int`, *optional*): A number.", ""),
        ("Prose (with brackets) goes on.", "Prose (with brackets) goes on."),
        ("f(x, y) -> int\n\nReturn it.", "Return it."),
        ("a.f(x=(1, 2)) -> (int, str)\nReturn it.", "Return it."),
        ("f(x, y)", ""),
        ("f(x) is called twice.", "f(x) is called twice."),
        ("Call :py:meth:`~a.b.run` and :func:`go`.", "Call run and go."),
        ("", ""),
    ],
)
def test_first_paragraph(docstring, query):
    assert first_paragraph(docstring) == query


def test_source_files_are_named_and_tests_left_out(tmp_path):
    kept = {
        "six.py": ("six", "six"),
        "a/__init__.py": ("a", "a"),
        "a/b/c.py": ("a.b.c", "a"),
        "pip/_vendor/rich/text.py": ("pip._vendor.rich.text", "rich"),
        "pip/_vendor/six.py": ("pip._vendor.six", "six"),
        "sk/externals/_packaging/version.py": ("sk.externals._packaging.version", "packaging"),
    }
    left_out = [
        "a/tests/x.py",
        "a/test_x.py",
        "conftest.py",
        "a/notes.txt",
        "folder.py/notes.txt",
        ".hidden/x.py",
        "site-packages/other.py",
    ]
    for name in [*kept, *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_source_files([tmp_path, tmp_path])
    assert {f.path.relative_to(tmp_path).as_posix(): (f.module, f.package) for f in found} == kept
    assert len(found) == len(kept)
    # A root that is a package keeps its name.
    assert [f.module for f in find_source_files([tmp_path / "a"])] == ["a", "a.b.c"]


def test_root_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_source_files([tmp_path / "nowhere"])


def test_roots_hold_the_standard_library_and_what_is_installed():
    files = {path.name for root in installed_roots() for path in root.iterdir()}
    assert {"argparse.py", "pytest"} <= files


def test_number_of_workers_changes_nothing(tmp_path):
    for i in range(70):
        body = f'def f():\n    """Return the number {i} twice."""\n    x = {i}\n    return x + x\n'
        (tmp_path / f"m{i}.py").write_text(body + body if i == 5 else body)
    (tmp_path / "broken.py").write_text("def f(:")
    files = find_source_files([tmp_path])
    read: list[int] = []
    one = extract_all(files, workers=1, advance=read.append)
    two = extract_all(files, workers=2, advance=lambda _: None)
    assert one == two
    assert len(files) == 71
    assert sum(read) == sum(file.path.stat().st_size for file in files)
    assert one.dropped == {"unreadable_file": 1}
    assert len(one.pairs) == len({pair.id for pair in one.pairs}) == 71
    assert "m5.f#2" in {pair.id for pair in one.pairs}
