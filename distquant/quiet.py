"""Filters log lines that libraries write when imported, and that a user who loads a model cannot act on."""

from __future__ import annotations

import logging

PREFIXES = {
    "torchao": "Failed to load ",  # its GPU libraries, on a machine without a GPU; transformers imports torchao
    "torch.utils._pytree": "<enum ",  # torch's advice to torchao's authors
}


class _Without(logging.Filter):
    """Drops records that begin with a prefix."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.prefix)


def quiet_imports() -> None:
    """Drops such lines from the log of this process; all other lines of those libraries are still logged."""
    for name, prefix in PREFIXES.items():
        logging.getLogger(name).addFilter(_Without(prefix))
