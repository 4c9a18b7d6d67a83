"""What the documents tell readers to type exists: make targets, commands, scripts, links, imports.

A ```python block that is followed by a ```text block is run, and must print that text.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "launch/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]
BLOCK = re.compile(r"^ *```(\w+)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SHELLS = {"bash", "sh", "shell", "console"}


class Block(NamedTuple):
    document: str
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    name = str(document.relative_to(ROOT))
    found = BLOCK.finditer(document.read_text())
    return [Block(name, match[1], textwrap.dedent(match[2])) for match in found]


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def words_of(line: str) -> list[str]:
    """Split a shell line into words, without prompt, comment and leading variables."""
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def command_lines() -> list[list[str]]:
    lines = []
    for block in BLOCKS:
        if block.language not in SHELLS:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            lines += [words_of(part.strip()) for part in line.split("&&")]
    return [words for words in lines if words]


COMMANDS = command_lines()


def called(program: str) -> list[list[str]]:
    """Return the arguments of every call of `program` in the documents, each once."""
    calls = {tuple(words[1:]): None for words in COMMANDS if words[0].endswith(program)}
    return [list(call) for call in calls]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ
    )


def test_the_documents_name_the_two_commands() -> None:
    assert ["make", "quickstart"] in COMMANDS
    assert ["make", "test"] in COMMANDS


@pytest.mark.parametrize("arguments", called("make"), ids=" ".join)
def test_make_targets_exist(arguments: list[str]) -> None:
    done = run("make", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr


TRAININGS = [["train", *arguments] for arguments in called("torchrun.sh")]


@pytest.mark.parametrize("arguments", called("largebatch") + TRAININGS, ids=" ".join)
def test_commands_compose(arguments: list[str], tmp_path: Path) -> None:
    if "-m" in arguments:  # of a sweep, the first job
        arguments = [a if "[" in a else a.split(",")[0] for a in arguments if a != "-m"]
    program = (sys.executable, "-m", "largebatch")
    asks_only = {"--help", "--cfg"} & set(arguments) or not arguments
    done = run(*program, *arguments, *([] if asks_only else ["--cfg", "job"]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr or done.stdout
    assert not list(tmp_path.iterdir())


def test_scripts_exist() -> None:
    scripts = {words[0] for words in COMMANDS if "/" in words[0] and words[0][0] not in "./~"}
    missing = [name for name in sorted(scripts) if not os.access(ROOT / name, os.X_OK)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    prose = BLOCK.sub("", document.read_text())
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert not [target for target in local if not (document.parent / target).exists()]


def python_blocks() -> list[tuple[str, str | None]]:
    """Return each python block and, if a text block follows it, what it must print."""
    pairs = []
    for block, after in zip_longest(BLOCKS, BLOCKS[1:]):
        if block.language == "python":
            follows = after and after.document == block.document and after.language == "text"
            pairs.append((block.text, after.text if after and follows else None))
    return pairs


@pytest.mark.parametrize(("code", "printed"), python_blocks())
def test_python_blocks(code: str, printed: str | None, tmp_path: Path) -> None:
    aliases = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            aliases |= {name.asname or name.name: name.name for name in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("largebatch"):
            module = importlib.import_module(node.module or "")
            assert not [name.name for name in node.names if not hasattr(module, name.name)]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = aliases.get(node.value.id, "")
            if owner.startswith("largebatch"):
                assert hasattr(importlib.import_module(owner), node.attr), node.attr
    if printed is not None:
        done = run(sys.executable, "-c", code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == printed.strip()
