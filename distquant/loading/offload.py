"""Tensors that accelerate's hooks put into modules before they run: from the disk, or from the CPU."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distquant.errors import InputError
from distquant.left_behind import made_folder
from distquant.parallel.experts import LocalExperts
from distquant.quantization.linear.keeps_dtypes import KeepsDtypes
from distquant.quantization.public_names import PublicNames


class Offloaded(Mapping[str, Tensor]):
    """Tensors by their names in the model, as `named_parameters` and `named_buffers` have them.

    On the disk each is a file of its bytes, so every dtype can be there; it is mapped when it is asked for. The files
    go with the last reference to this.

    Attributes:
        tied: other names of tensors -> the names that they are here by.
    """

    def __init__(self) -> None:
        self.tied: Mapping[str, str] = {}
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, tuple[Path, torch.dtype, torch.Size]] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def write(self, name: str, value: Tensor) -> None:
        """Writes a tensor to the disk; raises InputError where it has no room."""
        if self.folder is None:
            self.folder = made_folder("offload-")
        path = Path(self.folder.name, f"{len(self._files)}.bin")
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            with open(path, "wb") as file:
                file.write(content.data)
        except OSError as error:
            fault = f"the weights that the device map puts on the disk do not fit into {self.folder.name}"
            fix = "Set TMPDIR to a folder on a local disk with more room, or put fewer modules on the disk"
            raise InputError.one("device_map", f"{fault} ({error.strerror})", fix) from error
        self._files[name] = (path, value.dtype, value.shape)

    def hold(self, name: str, value: Tensor) -> None:
        """Keeps a tensor in memory."""
        self._held[name] = value.detach()

    def __getitem__(self, name: str) -> Tensor:
        name = self.tied.get(name, name)
        if name in self._held:
            return self._held[name]
        path, dtype, shape = self._files[name]
        nbytes = shape.numel() * dtype.itemsize
        if not nbytes:  # nothing to map
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8).view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        yield from self._held
        yield from self._files
        yield from (name for name in self.tied if name not in self._held)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloaded:
        return self  # a copy of the model reads the same files


def place_module(owner: str, module: nn.Module, offloaded: Offloaded) -> None:
    """Writes the tensors that a filled module holds by itself to the disk, and leaves them on `meta`."""
    for leaf, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            offloaded.write(f"{owner}.{leaf}", buffer)
            module._buffers[leaf] = torch.empty_like(buffer, device="meta")


def keep_plain_buffers(model: nn.Module, offloaded: Offloaded) -> None:
    """Puts buffers that are not components of weights where their modules run, and makes hooks leave them there.

    They are small, and models read some of them beside the forward of the module that has them (biases of routers).
    """
    from accelerate.hooks import AlignDevicesHook

    for name, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        offloads = isinstance(hook, AlignDevicesHook) and hook.offload
        if not offloads or isinstance(module, (KeepsDtypes, LocalExperts)):
            continue
        hook.offload_buffers = False
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = offloaded[f"{name}.{leaf}" if name else leaf].to(hook.execution_device)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Gives a module the tensors that its hook offloads, as during its forward."""
    from accelerate.hooks import AlignDevicesHook

    hook: Any = getattr(module, "_hf_hook", None)
    every = getattr(hook, "hooks", (hook,))
    offloading = next((one for one in every if isinstance(one, AlignDevicesHook) and one.offload), None)
    if offloading is None:
        yield
        return
    offloading.pre_forward(module)
    try:
        yield
    finally:
        offloading.post_forward(module, None)


def save_offloaded(model: Any, offloaded: Offloaded) -> None:
    """Makes `save_pretrained` write offloaded tensors, too.

    transformers would look for each tensor of the state dict under that name in its module, where components of
    weights have others.
    """

    from distquant.quantization.quantizer import Quantizer

    def save_pretrained(self: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        state = self.state_dict() if state_dict is None else state_dict
        tensors = {name: _stored(self, name, offloaded) if value.is_meta else value for name, value in state.items()}
        for name, source in offloaded.tied.items():  # transformers knows ties by their memory
            if name in tensors and source in tensors:
                tensors[name] = tensors[source]
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, Quantizer):
            type(self).save_pretrained(self, *args, state_dict=tensors, **kwargs)
            return
        quantizer.state_dict = tensors
        try:
            type(self).save_pretrained(self, *args, **kwargs)
        finally:
            quantizer.state_dict = None

    model.save_pretrained = types.MethodType(save_pretrained, model)


def _stored(model: Any, name: str, offloaded: Offloaded) -> Tensor:
    """Returns a tensor by its name in the state dict."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    own = module.public_names.get(leaf, leaf) if isinstance(module, PublicNames) else leaf
    return offloaded[f"{owner}.{own}" if owner else own]
