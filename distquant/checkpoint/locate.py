"""The folder of a checkpoint, from a path or from a Hugging Face id, which is looked up in the local cache only.

The cache's layout (`models--ORG--NAME/{refs,snapshots}`) is documented at
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. It is read here directly: since 2.x,
`snapshot_download(local_files_only=True)` rejects a snapshot that lacks any file, even weights in another format.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from distquant.checkpoint.faults import CheckpointError, HeaderFault
from distquant.checkpoint.gguf import SUFFIX
from distquant.checkpoint.index import is_inside
from distquant.errors import InputError
from distquant.files import REFERENCE_BYTES, read_file

_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def locate(
    model: str | os.PathLike[str], revision: str | None, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[Path, str]:
    """Returns the checkpoint's folder (or `.gguf` file), and the advice for a damaged file in it.

    An id is looked up in `cache_dir`, or in the Hugging Face cache.

    Raises:
        CheckpointError: NO_CHECKPOINT if nothing has that name, NOT_IN_CACHE for an id not downloaded yet.
        InputError: the revision is invalid, or was given for a folder.
    """
    name = os.fspath(model)
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike Path's methods, no exception for a name too long, and "" is not "."
        if revision is not None:
            fix = "Leave the revision out, or give a Hugging Face id"
            raise InputError.one("revision", f"{revision!r} was given for the folder {path}, which has none", fix)
        return Path(path), "The file is damaged or was not fully written: download or copy it again"
    if path.endswith(SUFFIX) and os.path.isfile(path):
        if revision is not None:
            raise InputError.one("revision", f"{revision!r} was given for the file {path}", "Leave the revision out")
        return Path(path), "The file is damaged or was not fully written: download or copy it again"
    if os.path.exists(path):
        fix = "Give the folder that holds the safetensors files and config.json"
        raise CheckpointError.one(name, "is a file, not a folder", fix, HeaderFault.NO_CHECKPOINT)
    if not isinstance(model, str) or not _REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        fix = "Give an existing folder, or a Hugging Face id such as org/name"
        reason = "no folder has this path, and it is not a Hugging Face id"
        raise CheckpointError.one(name, reason, fix, HeaderFault.NO_CHECKPOINT)
    return _from_cache(name, revision, cache_dir)


def _from_cache(model: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> tuple[Path, str]:
    from huggingface_hub import constants

    if revision is not None and not is_inside(revision):
        raise InputError.one("revision", f"{revision!r} is not a branch, tag or commit", "Give one, such as 'main'")
    wanted = revision or constants.DEFAULT_REVISION
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else os.path.expanduser(cache_dir))
    repo = cache / f"models--{model.replace('/', '--')}"
    ref = repo / "refs" / wanted
    try:
        commit = read_file(ref, REFERENCE_BYTES).decode().strip() if os.path.exists(ref) else wanted
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        fix = f"Remove it, and run `hf download {model}`" if cache_dir is None else "Remove it, and download it again"
        raise CheckpointError.one(str(ref), reason, fix, HeaderFault.NOT_IN_CACHE) from error
    folder = repo / "snapshots" / commit
    download = f"hf download {model}" + (f" --revision {revision}" if revision else "")
    download += f" --cache-dir {cache}" if cache_dir is not None else ""
    if not is_inside(commit) or not os.path.isdir(folder):
        reason = f"revision {wanted!r} is not in the Hugging Face cache {cache}, and there is no folder of this name"
        raise CheckpointError.one(model, reason, f"Run `{download}` first", HeaderFault.NOT_IN_CACHE)
    return folder, f"Download it: `{download}` (with `--force-download` if the file is there)"
