"""The built wheel carries conf/ and runs outside a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("largebatch", "conf", "pyproject.toml", "LICENSE", "README.md")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return what `command` prints; show it if the command fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in a copy: a build leaves folders behind, and old ones would slip into the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    run(*build, cwd=copy)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder, to be put before the environment's packages."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def files_below(folder: Path, pattern: str, prefix: str) -> set[str]:
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob(pattern)}


def test_the_wheel_holds_every_module_and_every_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = files_below(ROOT / "conf", "*.yaml", "largebatch/conf")
    assert configs
    modules = files_below(ROOT / "largebatch", "*.py", "largebatch")
    missing = (configs | modules | {"largebatch/py.typed", "largebatch/conf/__init__.py"}) - names
    assert not missing
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"largebatch"}


def test_the_wheel_runs_outside_a_checkout(site: Path, tmp_path: Path) -> None:
    where = "import largebatch; print(largebatch.__file__)"
    found = Path(run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(site)).strip())
    assert found.is_relative_to(site)

    script = site / "bin" / "largebatch"
    assert "train" in run(script, "--help", cwd=tmp_path, PYTHONPATH=str(site))
    resolved = run(
        script, "train", "quickstart", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert "global_batch:" in resolved
    assert not list(tmp_path.iterdir())  # showing a config leaves nothing behind
