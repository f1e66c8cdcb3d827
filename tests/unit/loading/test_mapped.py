"""Mapped weights: the file's own pages where they can be, the same bits everywhere, and nothing written to the file."""

from __future__ import annotations

import copy
import errno
import gc
import os
import shutil
from pathlib import Path

import pytest
import torch

import distquant as dq
import distquant.loading.mapped as mapped_module
from distquant.errors import InputError
from distquant.loading.stream.file_systems import is_local
from distquant.loading.stream.files import Files, ReadError
from distquant.loading.stream.reader import Reader

IDS = torch.tensor([[5, 17, 99, 3, 42, 42, 8, 110]])
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def llama(model_of) -> str:
    return model_of("llama-gqa")


def pages(model: torch.nn.Module, file: str) -> set[str]:
    """Names of the parameters whose memory is pages of a file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(file):
            ranges.append([int(edge, 16) for edge in line.split()[0].split("-")])
    inside = {
        name: any(a <= value.data_ptr() and value.data_ptr() + value.nbytes <= b for a, b in ranges)
        for name, value in model.named_parameters()
    }
    return {name for name, within in inside.items() if within}


def report_of(path: str, **options) -> tuple[str, int, int]:
    model = dq.load(path, **options)
    report = model.distquant.report
    return dq.fingerprint(model), report.mapped_bytes, report.bytes_read


def test_unquantized_weights_are_pages_of_the_file(llama: str) -> None:
    model = dq.load(llama, io="mapped")
    names = {name for name, _ in model.named_parameters()}
    assert pages(model, f"{llama}/{FILE}") == names
    report, read = model.distquant.report, dq.load(llama, io="buffered")
    assert report.bytes_read == 0
    assert report.mapped_bytes == sum(value.nbytes for value in model.parameters()) == report.unquantized_bytes
    assert read.distquant.report.mapped_bytes == 0
    assert dq.fingerprint(model) == dq.fingerprint(read)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, read(IDS).logits)


def test_what_is_written_to_is_a_copy(copy_of) -> None:
    folder = copy_of("llama-gqa")
    before = (folder / FILE).read_bytes()
    one, other = (dq.load(folder, io="mapped") for _ in range(2))
    truth, clone = dq.fingerprint(other), copy.deepcopy(one)
    one.train()
    loss = one(IDS, labels=IDS).loss
    loss.backward()
    torch.optim.SGD(one.parameters(), lr=0.1).step()
    assert dq.fingerprint(one) != truth
    assert dq.fingerprint(other) == truth == dq.fingerprint(dq.load(folder, io="buffered"))
    assert all(torch.equal(a, b) for a, b in zip(clone.parameters(), other.parameters(), strict=True))
    assert (folder / FILE).read_bytes() == before


def test_the_mapping_ends_with_the_last_weight(copy_of) -> None:
    path = str(copy_of("llama-gqa") / FILE)

    def is_mapped() -> bool:
        gc.collect()
        return path in Path("/proc/self/maps").read_text()

    model = dq.load(os.path.dirname(path), io="mapped")
    kept = model.model.norm.weight
    del model
    assert is_mapped()
    assert bool(kept.isfinite().all())
    del kept
    assert not is_mapped()


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_what_is_quantized_on_the_way_is_read(llama: str, quant: str) -> None:
    truth, none, everything = report_of(llama, quantization_config=quant, io="buffered")
    fingerprint, mapped, read = report_of(llama, quantization_config=quant, io="mapped")
    assert (fingerprint, none) == (truth, 0)
    assert mapped > 0
    assert mapped + read == everything


def test_another_dtype_is_read(llama: str) -> None:
    assert report_of(llama, dtype="float32", io="mapped")[1] == 0


def test_elements_off_their_grid_are_read(copy_of) -> None:
    """A header of any length is legal: one more byte, and no bfloat16 begins on a multiple of its size."""
    folder = copy_of("llama-gqa")
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ")
    for more in range(2):
        padded = header + b" " * (-len(header) % 2 + more)
        (folder / FILE).write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])
        fingerprint, mapped, read = report_of(folder, io="mapped")
        assert (mapped > 0, read > 0) == ((True, False) if not more else (False, True))
        assert fingerprint == dq.fingerprint(dq.load(folder, io="buffered"))


def test_experts_go_into_their_stack(moe_of) -> None:
    """They are rows of one parameter, and several tensors in the file."""
    path = moe_of("mixtral")
    fingerprint, mapped, read = report_of(path, io="mapped")
    assert mapped > 0
    assert read > 0
    assert fingerprint == dq.fingerprint(dq.load(path, io="buffered"))


def test_what_a_device_map_puts_on_the_disk_is_read(llama: str) -> None:
    places = {"model": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    model = dq.load(llama, device_map=places, io="mapped")
    layer = sum(t.nbytes for n, t in dq.load(llama).named_parameters() if n.startswith("model.layers.1."))
    assert model.distquant.report.bytes_read == layer
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dq.load(llama)(IDS).logits)


# -- auto --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("local", "cached"), [(True, True), (True, False), (False, True)])
def test_auto_maps_local_files_that_are_in_memory(llama: str, monkeypatch, local: bool, cached: bool) -> None:
    monkeypatch.setattr(mapped_module, "is_local", lambda fd: local)
    monkeypatch.setattr(Files, "in_memory", lambda self, file: cached)
    assert (report_of(llama)[1] > 0) == (local and cached)
    assert report_of(llama, io="mapped")[1] > 0
    assert report_of(llama, io="buffered")[1] == 0


def test_local_file_systems_are_known() -> None:
    for path, local in (("/dev/shm", True), ("/proc", False), ("/sys", False)):
        if os.path.isdir(path):
            fd = os.open(path, os.O_RDONLY)
            assert is_local(fd) == local, path
            os.close(fd)


# -- files that cannot be mapped, or change ----------------------------------------------------------------------------


def test_a_file_that_cannot_be_mapped(llama: str, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mapped_module.mmap, "mmap", fail)
    with pytest.raises(InputError, match=r"^io: .*safetensors cannot be mapped \(.*\)\. Use io='auto' or 'buffered'$"):
        mapped_module._map(Files(Path(llama), "mapped"), FILE, "mapped")
    assert mapped_module._map(Files(Path(llama)), FILE, "auto") is None


def test_a_change_during_the_load_is_refused(copy_of, monkeypatch) -> None:
    folder = copy_of("llama-gqa")
    join = Reader.join

    def change(self: Reader, *arguments: object) -> bool:
        with open(folder / FILE, "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"xy")
        return join(self, *arguments)

    monkeypatch.setattr(Reader, "join", change)
    with pytest.raises(ReadError, match="the file was changed after its header was read"):
        dq.load(folder, io="mapped")


def test_a_file_that_was_shortened_after_its_header_was_read_is_not_touched(
    llama: str, tmp_path: Path, monkeypatch
) -> None:
    plan = dq.plan(shutil.copytree(llama, tmp_path / "model"))
    of = Files.open

    def shorten(self: Files, file: str) -> int:
        fd = of(self, file)
        os.truncate(tmp_path / "model" / FILE, 4096)
        return fd

    monkeypatch.setattr(Files, "open", shorten)
    with pytest.raises(ReadError, match=r"the file ends \d+ bytes too early"):
        dq.load(plan, io="mapped")


def test_a_model_does_not_overwrite_its_own_pages(copy_of, tmp_path: Path) -> None:
    folder = copy_of("llama-gqa")
    before = (folder / FILE).read_bytes()
    model = dq.load(folder, io="mapped")
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(InputError, match=r"^save_pretrained: the pages of .*Save to another folder, or load with"):
            each.save_pretrained(folder)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / FILE).symlink_to(folder / FILE)
    with pytest.raises(InputError, match="the pages of"):
        model.save_pretrained(linked)
    assert (folder / FILE).read_bytes() == before
    model.save_pretrained(tmp_path / "other")
    assert dq.fingerprint(dq.load(tmp_path / "other")) == dq.fingerprint(model)
    dq.load(folder, io="buffered").save_pretrained(folder)
