"""Compression inside ``Trainer.fit``: the base callback, the window where shapes change, and what loggers are told."""

from lightning_prune.callback.compression import Compression
from lightning_prune.callback.one_shot import compress, rehearse
from lightning_prune.callback.task import Task

__all__ = ["Compression", "Task", "compress", "rehearse"]
