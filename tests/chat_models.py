"""A chat model of the trained example: a copy with a chat template, which has never seen a conversation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('Unknown role') }}{% endif %}
{{- message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def save_chat_model(source: str, folder: Path, context: int | None = None, template: str = TEMPLATE) -> str:
    """Copies a checkpoint, and adds a chat template; with a context of its own if one is given."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    if context is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return str(folder)
