"""JSON from files and arguments that nobody vouches for: whatever is wrong with a text is one kind of error."""

from __future__ import annotations

import json
from typing import Any


def parse_json(source: str | bytes, **hooks: Any) -> Any:
    """Returns the value of a JSON text.

    Args:
        source: the text, or its bytes in UTF-8.
        hooks: of `json.loads`, such as `object_pairs_hook`.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested too deeply, or holds a lone surrogate: that parses, and then
            cannot be printed, hashed or sent.
    """
    text = source.decode() if isinstance(source, bytes) else source
    try:
        document = json.loads(text, **hooks)
        if "\\u" in text or isinstance(source, str):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise ValueError(f"it holds a lone surrogate, U+{code:04X}, which is half a character") from error
    return document
