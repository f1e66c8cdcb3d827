"""Keeps messages out of the log that libraries write about themselves on import, and that no user can change."""

from __future__ import annotations

import logging
import re
import warnings

from distquant.process_state import changing_process_state

PREFIXES = {
    "torchao": "Failed to load ",  # its GPU libraries, on a machine without a GPU; transformers imports torchao
    "torch.utils._pytree": "<enum ",  # torch's advice to torchao's authors
    # How Ray protects the cluster that distquant has started, on this machine alone, for the time of the load.
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled ",
    # On each call of a layer, though LLM.int8() is defined in float16, and models of our day are not.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast from ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # distquant does not use that kernel
}
"""Beginning of such messages, by the logger's name."""

WARNINGS = {
    "torch.jit._script": "`torch.jit.script_method` is deprecated",  # torch's own call, when it imports its compiler
}
"""Beginning of warnings of the module `warnings`, by the module that they are about."""


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
    with changing_process_state():
        for module, beginning in WARNINGS.items():
            wanted = ("ignore", re.compile(re.escape(beginning), re.IGNORECASE), DeprecationWarning)
            if not any(each[:3] == wanted for each in warnings.filters):
                warnings.filterwarnings("ignore", re.escape(beginning), DeprecationWarning, re.escape(module))
