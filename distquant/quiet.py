"""What libraries say on import about themselves, and nobody who loads a model can do anything about."""

from __future__ import annotations

import logging

PREFIXES = {
    "torchao": ("Failed to load ",),  # its GPU libraries, on a machine without a GPU; transformers imports torchao
    "torch.utils._pytree": ("<enum ",),  # torch's advice to torchao's authors
}


def quiet_imports() -> None:
    """Leaves such lines out of the log of this process; everything else of those libraries is still logged."""
    for name, prefixes in PREFIXES.items():
        logging.getLogger(name).addFilter(lambda record, p=prefixes: not record.getMessage().startswith(p))
