"""Buffers that the state dict has under another name than the module, for accelerate's hooks, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class PublicNames(nn.Module):
    """A module whose state dict has buffers under the names of `public_names`."""

    public_names: ClassVar[Mapping[str, str]] = {}
    """Names in the state dict -> those of the buffers."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for public, own in self.public_names.items():
            if prefix + own in destination:
                destination[prefix + public] = destination.pop(prefix + own)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        for public, own in self.public_names.items():
            if prefix + public in state_dict:  # torch gives every module a dict of its own
                state_dict[prefix + own] = state_dict.pop(prefix + public)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        public_of = {prefix + own: prefix + public for public, own in self.public_names.items()}
        missing[:] = [public_of.get(name, name) for name in missing]

    @property
    def _hf_hook(self) -> Any:
        """accelerate's hook, where the module has one."""
        if "_hf_hook" not in self.__dict__:
            raise AttributeError("_hf_hook")
        return self.__dict__["_hf_hook"]

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        """Makes the hook find buffers in a state dict: it looks for them by their own names."""
        for one in getattr(hook, "hooks", (hook,)):
            offloaded = getattr(one, "weights_map", None)
            if offloaded is not None and not isinstance(offloaded, _ByOwnNames):
                one.weights_map = _ByOwnNames(offloaded, {own: public for public, own in self.public_names.items()})
        self.__dict__["_hf_hook"] = hook

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["_hf_hook"]


class _ByOwnNames(Mapping[str, Tensor]):
    """A module's tensors by the names of its buffers, or by those in the state dict if these are not there."""

    def __init__(self, offloaded: Mapping[str, Tensor], public_of: Mapping[str, str]):
        self._offloaded, self._public_of = offloaded, public_of

    def __getitem__(self, name: str) -> Tensor:
        if name in self._public_of and name not in self._offloaded:
            return self._offloaded[self._public_of[name]]
        return self._offloaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._offloaded)

    def __len__(self) -> int:
        return len(self._offloaded)
