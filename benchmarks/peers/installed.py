"""Finds the peers that are installed, and says how to install the others.

Some peers' packages import more than their loss needs (torchvision, search indexes); of these only
the module with the loss is loaded, so that `pip install --no-deps` is enough.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

INSTALL = {
    "sentence-transformers": "pip install sentence-transformers",
    "GradCache": "git clone https://github.com/luyug/GradCache, then --gradcache-path GradCache",
    "open_clip": "pip install --no-deps open_clip_torch",
    "FlagEmbedding": "pip install FlagEmbedding",
    "Inf-CL": "pip install inf-cl",
    "pylate": "pip install --no-deps pylate",
}
PACKAGES = {
    "sentence-transformers": "sentence-transformers",
    "open_clip": "open_clip_torch",
    "FlagEmbedding": "FlagEmbedding",
    "Inf-CL": "inf-cl",
    "pylate": "pylate",
}


class MissingPeerError(ImportError):
    """A peer can't be imported; the message says why and how to install it."""


def load(peer: str, module: str) -> ModuleType:
    """Import a module of a peer.

    Raises:
        MissingPeerError: It can't be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a foreign package does when it is imported
        reason = " ".join(str(error).split())[:160]
        raise MissingPeerError(
            f"{module} can't be imported ({type(error).__name__}: {reason}); {INSTALL[peer]}"
        ) from error


def load_alone(peer: str, package: str, file: str) -> ModuleType:
    """Load one file of an installed package without importing the package around it.

    Raises:
        MissingPeerError: The package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingPeerError(f"{package} is not installed; {INSTALL[peer]}")
    path = Path(found.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_gradcache(path: str | None) -> None:
    """Make GradCache's package importable from a clone.

    Its package on PyPI (0.0.1) is called `gradcache`, but imports itself as `grad_cache`, so
    `from gradcache import GradCache` fails there.
    """
    if path is not None:
        sys.path.insert(0, str((Path(path) / "src").resolve()))


def version(peer: str) -> str:
    """Return a peer's version, or of a clone its commit."""
    if peer in PACKAGES:
        return importlib.metadata.version(PACKAGES[peer])
    source = importlib.util.find_spec("grad_cache")
    if source is None or source.origin is None:
        return ""
    head = Path(source.origin).parents[2] / ".git" / "HEAD"
    if not head.exists():
        return "unknown commit"
    text = head.read_text(encoding="utf-8").strip()
    if text.startswith("ref: "):
        ref = head.parent / text[5:]
        text = ref.read_text(encoding="utf-8").strip() if ref.exists() else text
    return text[:7]
