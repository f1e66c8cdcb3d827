"""What libraries say on import about themselves, and nobody who loads a model can do anything about."""

from __future__ import annotations

import logging

PREFIXES = {
    "torchao": "Failed to load ",  # its GPU libraries, on a machine without a GPU; transformers imports torchao
    "torch.utils._pytree": "<enum ",  # torch's advice to torchao's authors
}


class _Without(logging.Filter):
    """Lets pass what does not begin with a prefix."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.prefix)


def quiet_imports() -> None:
    """Leaves such lines out of the log of this process; everything else of those libraries is still logged."""
    for name, prefix in PREFIXES.items():
        logging.getLogger(name).addFilter(_Without(prefix))
