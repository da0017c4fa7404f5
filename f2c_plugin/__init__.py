"""F²C (Faster Face Classification, CVPR 2022): train on many identities without a weight for each.

In a training loop of your own, with any backbone and any dataset with labels::

    loader = DataLoader(dataset, batch_size=128, shuffle=True, drop_last=True)
    head = build_head(backbone, num_identities=len(set(labels)), total_steps=epochs * len(loader), embedding_size=512)
    optimizer = SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        for images, identities in loader:
            loss = head(backbone(images), identities)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

The head has no parameters to train; ``head.state_dict()`` belongs in checkpoints beside the backbone's.
Every error is an ``F2CError``; ``f2c_plugin.errors`` lists them. In arcface_torch, ``config.head = "f2c_dcp"`` is all.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("f2c_plugin runs on Linux and macOS: on Windows, install it in WSL 2")

if TYPE_CHECKING:
    from f2c_plugin.build import build_head
    from f2c_plugin.data import DualLoader, DualSampler, IdentityIndex, RecordDataset, RecordWriter
    from f2c_plugin.errors import F2CError
    from f2c_plugin.evaluation.monitor import Monitor
    from f2c_plugin.evaluation.verification import VerificationSet
    from f2c_plugin.method.gallery import GalleryNet
    from f2c_plugin.method.head import F2CHead
    from f2c_plugin.method.margin import Margin, SFace
    from f2c_plugin.method.pool import DynamicClassPool
    from f2c_plugin.method.resident import ResidentPool
    from f2c_plugin.method.resident_head import ResidentHead
    from f2c_plugin.method.schedule import Schedule

__version__ = "0.2.0"

__all__ = [
    "DualLoader", "DualSampler", "DynamicClassPool", "F2CError", "F2CHead", "GalleryNet", "IdentityIndex", "Margin", "Monitor",
    "RecordDataset", "RecordWriter", "ResidentHead", "ResidentPool", "SFace", "Schedule", "VerificationSet", "build_head",
]

# Imported at first use: PyTorch takes seconds, in which a training must already hear signals.
_HOMES = {name: module for module, names in {
    "build": ["build_head"], "errors": ["F2CError"], "evaluation.monitor": ["Monitor"], "method.head": ["F2CHead"],
    "evaluation.verification": ["VerificationSet"], "method.gallery": ["GalleryNet"], "method.margin": ["Margin", "SFace"],
    "method.pool": ["DynamicClassPool"], "method.resident": ["ResidentPool"],
    "method.resident_head": ["ResidentHead"], "method.schedule": ["Schedule"],
    "data": ["DualLoader", "DualSampler", "IdentityIndex", "RecordDataset", "RecordWriter"]}.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
