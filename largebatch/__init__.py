"""Pre-train text-embedding models with very large contrastive batches.

    import largebatch as lb

    encoder = lb.Encoder.from_pretrained("path-or-name", pooling="mean")
    loss = lb.ContrastiveLoss(lb.Temperature(0.02, learned=True), symmetric=True)
    step = lb.GradCache(encoder, loss, tokens_per_chunk=16384)
    value = step(queries, documents)  # lists of texts; gradients are in .grad

Names are imported when they are first used: `import largebatch` itself needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.errors import UserError
    from largebatch.losses.temperature import Temperature
    from largebatch.model.encoder import Encoder
    from largebatch.objectives.contrastive import ContrastiveLoss
    from largebatch.step.gradcache import GradCache

__all__ = ["ContrastiveLoss", "Encoder", "GradCache", "Temperature", "UserError"]
__version__ = "0.1.0"

_MODULES = {
    "ContrastiveLoss": "largebatch.objectives.contrastive",
    "Encoder": "largebatch.model.encoder",
    "GradCache": "largebatch.step.gradcache",
    "Temperature": "largebatch.losses.temperature",
    "UserError": "largebatch.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'largebatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
