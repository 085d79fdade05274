"""Frozen stacks that are read from disk when a layer asks for them, so that memory does not grow with their number.

A page is one stack's tensors in one layer: what a forward pass needs at a time. It is checked against the manifest
whenever it is read.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from holdfast.adapters.layer import AdaptedLinear
from holdfast.adapters.method import Tensors
from holdfast.adapters.methods.brainstacks.library import Manifest, Record, read_manifest
from holdfast.adapters.store import fit_adapters
from holdfast.adapters.tensor_file import TensorFile, tensors_digest
from holdfast.errors import ConfigurationError, ManifestMismatch

__all__ = ["Pager", "PagerStats", "page_stacks"]

_Key = tuple[str, int, str]
"""Domain, round and layer."""


@dataclass(slots=True)
class PagerStats:
    """Counted since the pager was made."""

    hits: int = 0
    """Pages that were in memory when they were asked for."""
    read_ahead: int = 0
    """Pages that were being read, or had been, because they followed the last time."""
    misses: int = 0
    bytes_read: int = 0
    evictions: int = 0
    peak_bytes: int = 0
    """Most that was kept, or being read ahead, at a time."""


class Pager:
    """At most ``budget_bytes`` of pages in host memory, the least recently used one leaving first. Besides them there
    are in memory the one page that a layer is computing with, on its device, and one tensor's bytes while it is read.

    While a page is in use, the one that followed it the last time is read ahead by a thread. To be asked by one thread
    at a time. Where gradients are needed, the backward pass keeps the pages it reads, whatever the budget.

    Raises: ConfigurationError for a budget below two pages.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, budget_bytes: int) -> None:
        sizes = {
            (record.stack.domain, record.stack.round, layer): page.size_bytes
            for record in manifest.records
            for layer, page in record.pages.items()
        }
        if budget_bytes < 2 * max(sizes.values(), default=0):
            raise ConfigurationError(
                f"budget_bytes={budget_bytes} must hold two pages, one in use and one that is read ahead; "
                f"give at least {2 * max(sizes.values())}"
            )
        self.manifest, self.stats = manifest, PagerStats()
        self._directory, self._budget_bytes = directory, budget_bytes
        self._records = {(record.stack.domain, record.stack.round): record for record in manifest.records}
        self._sizes = sizes
        self._files = dict[tuple[str, int], TensorFile]()
        self._pages = OrderedDict[_Key, Tensors]()
        self._held_bytes = 0
        self._ahead: tuple[_Key, Future[Tensors]] | None = None
        self._follows = dict[_Key | None, _Key]()
        self._last: _Key | None = None
        self._is_closed = False
        self._thread = ThreadPoolExecutor(1, "holdfast-pager")

    def page(self, key: _Key) -> Tensors:
        """Of a domain, a round and a layer: on the CPU, not to be changed.

        Raises: ManifestMismatch for what is damaged or another stack's; OSError; ConfigurationError after
        :meth:`close`.
        """
        if self._is_closed:
            raise ConfigurationError(f"layer {key[2]} asks for stack {key[0]}/{key[1]} of a pager that is closed")
        tensors = self._pages.get(key)
        if tensors is not None:
            self.stats.hits += 1
            self._pages.move_to_end(key)
        else:
            tensors = self._arrived(key) or self._miss(key)
            self._pages[key] = tensors
        self._follows[self._last] = key
        self._last = key
        following = self._follows.get(key)
        if following is not None and following not in self._pages and self._ahead is None:
            self._read_ahead(following)
        return tensors

    @property
    def held_bytes(self) -> int:
        """Of pages that are in memory or being read ahead."""
        return self._held_bytes

    def close(self) -> None:
        """Wait for the thread and drop all pages."""
        self._thread.shutdown(cancel_futures=True)
        self._pages.clear()
        self._ahead, self._held_bytes, self._is_closed = None, 0, True

    def __enter__(self) -> Pager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, _: object) -> Pager:
        return self  # a copied model reads the same pages

    # -- reading ------------------------------------------------------------------------------------------------------

    def _arrived(self, key: _Key) -> Tensors | None:
        """What was read ahead, if it is this; otherwise it is kept for later, or was in vain."""
        if self._ahead is None:
            return None
        (other, future), self._ahead = self._ahead, None
        if other == key:
            try:
                tensors = self._counted(key, future.result())
            except BaseException:
                self._held_bytes -= self._sizes[key]
                raise
            self.stats.read_ahead += 1
            return tensors
        try:
            self._pages[other] = self._counted(other, future.result())
        except (ManifestMismatch, OSError):  # told when it is asked for
            self._held_bytes -= self._sizes[other]
        return None

    def _miss(self, key: _Key) -> Tensors:
        self.stats.misses += 1
        self._make_room(key)
        try:
            return self._counted(key, self._read(key))
        except BaseException:
            self._held_bytes -= self._sizes[key]
            raise

    def _read_ahead(self, key: _Key) -> None:
        self._make_room(key)
        self._ahead = key, self._thread.submit(self._read, key)

    def _make_room(self, key: _Key) -> None:
        """Count a page before it is read, and drop the oldest ones that it has no room beside."""
        while self._held_bytes + self._sizes[key] > self._budget_bytes and self._pages:
            old, _ = self._pages.popitem(last=False)
            self._held_bytes -= self._sizes[old]
            self.stats.evictions += 1
        self._held_bytes += self._sizes[key]
        self.stats.peak_bytes = max(self.stats.peak_bytes, self._held_bytes)

    def _counted(self, key: _Key, tensors: Tensors) -> Tensors:
        self.stats.bytes_read += self._sizes[key]
        return tensors

    def _read(self, key: _Key) -> Tensors:
        """Also in the thread, which changes nothing but what it is the only one to change: files, while one read
        runs."""
        domain, number, layer = key
        record, prefix = self._records[domain, number], f"{layer}.0."
        where = self._directory / record.directory
        try:
            file = self._files.get((domain, number)) or self._open(record)
            tensors = {name.removeprefix(prefix): rows for name, rows in file.read(file.names(prefix)).items()}
        except FileNotFoundError as error:
            raise ManifestMismatch(f"{where} lost its tensors: {error}") from error
        if tensors_digest(tensors) != record.pages[layer].digest:
            raise ManifestMismatch(f"layer {layer} of stack {record.stack.task!r} in {where} is damaged")
        return tensors

    def _open(self, record: Record) -> TensorFile:
        where = self._directory / record.directory
        file = TensorFile(where / self.manifest.sidecar(self._directory, record).tensors)
        if file.header_digest != record.header_digest:
            raise ManifestMismatch(f"the header of stack {record.stack.task!r} in {where} is damaged")
        self._files[record.stack.domain, record.stack.round] = file
        return file


class _Pages:
    """One layer's finished tasks: the ``Source`` that the layer asks."""

    __slots__ = ("_is_at_home", "_keys", "_layer", "_pager")

    def __init__(self, pager: Pager, layer: AdaptedLinear) -> None:
        stacks = [record.stack for record in pager.manifest.records]
        self._keys = [(stack.domain, stack.round, layer.name) for stack in stacks]
        self._pager, self._layer = pager, layer
        # Without an accelerator every layer is where the pages are. Asking a module for its device takes as long as
        # everything else here, in every forward pass.
        self._is_at_home = not torch.accelerator.is_available()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, task: int) -> Tensors:
        page = self._pager.page(self._keys[task])
        if self._is_at_home:
            return page
        return {name: rows.to(self._layer.weight.device) for name, rows in page.items()}


def page_stacks(model: nn.Module, directory: Path, *, budget_bytes: int) -> Pager:
    """Give the model all stacks of a library, read when they act. Close the pager when the model is done.

    The model's own adapters of the same kind lose their tasks; without any, they are injected. Everything but the
    tensors is checked before.

    Raises: as :func:`read_manifest` and :func:`holdfast.adapters.load_adapters`, and for a budget that is too small.
    """
    manifest = read_manifest(directory)
    if not manifest.records:
        raise ConfigurationError(f"the library in {directory} has no stacks")
    sidecars = [manifest.sidecar(directory, record) for record in manifest.records]
    pager = Pager(directory, manifest, budget_bytes=budget_bytes)
    try:
        adapters = fit_adapters(model, sidecars[0], directory)
    except BaseException:
        pager.close()
        raise
    for layer in adapters.layers.values():
        layer.clear()
        layer.source = _Pages(pager, layer)
    adapters.tasks[:] = [record.stack.task for record in manifest.records]
    return pager
