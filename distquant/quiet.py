"""Keeps messages out of the log that libraries write about themselves on import, and that no user can change."""

from __future__ import annotations

import logging

PREFIXES = {
    "torchao": "Failed to load ",  # its GPU libraries, on a machine without a GPU; transformers imports torchao
    "torch.utils._pytree": "<enum ",  # torch's advice to torchao's authors
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # distquant does not use that kernel
}
"""Beginning of such messages, by the logger's name."""


class _Without(logging.Filter):
    """Passes every record that does not begin with a prefix."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.prefix)


_FILTERS = {name: _Without(prefix) for name, prefix in PREFIXES.items()}


def quiet_imports() -> None:
    """Removes such messages from the log of this process; may be called again. All other messages are still logged."""
    for name, without in _FILTERS.items():
        logging.getLogger(name).addFilter(without)  # adds each filter once
