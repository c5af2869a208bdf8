"""Weights of blocks in a slower tier, brought to the device one block at a time through two buffers.

While a block is worked on in one buffer, the one before it is written back from the other and the one after it is
read into the other. A block's bytes are those of its file: its parameters one after another, wide dtypes first.

Shapes: a buffer is uint8, (bytes of the largest block,); parameters of any shape are views of it.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pintpot.core.errors import UnsupportedModel
from pintpot.core.model_folder import TensorEntry, header_of, read_header
from pintpot.core.shape import block_names

Ticket = Callable[[], object]
"""Waits until something that was begun is done, and raises what it raised."""


@dataclass(frozen=True)
class Layout:
    """Where the parameters of a block lie.

    Attributes:
        block: its name.
        entries: its parameters by name in the model, in the order of their bytes; offsets from the first of them.
    """

    block: str
    entries: Mapping[str, TensorEntry]

    @classmethod
    def of(cls, block: str, parameters: Mapping[str, Tensor]) -> Layout:
        """The layout of some parameters."""
        entries: dict[str, TensorEntry] = {}
        end = 0
        for name, p in sorted(parameters.items(), key=lambda item: -item[1].dtype.itemsize):
            size = p.numel() * p.dtype.itemsize
            entries[name] = TensorEntry(name, Path(), p.dtype, tuple(p.shape), end, size)
            end += size
        return cls(block, entries)

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.block}.safetensors"

    @property
    def nbytes(self) -> int:
        """Bytes of all its parameters."""
        return sum(entry.nbytes for entry in self.entries.values())

    def view(self, name: str, buffer: Tensor) -> Tensor:
        """One parameter in a buffer that holds the block."""
        entry = self.entries[name]
        return buffer[entry.offset : entry.offset + entry.nbytes].view(entry.dtype).view(entry.shape)


class BlockStore(ABC):
    """The slower tier. What is begun on it is done in the order in which it was begun.

    Attributes:
        layouts: of the blocks, in the order in which a model runs them.
        places: the layout that each parameter is in, by its name.
        disk_bytes: what the store takes of the disk.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = tuple(layouts)
        self.disk_bytes = 0
        self.places = {name: layout for layout in layouts for name in layout.entries}

    @abstractmethod
    def read(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Begin to fill a buffer with a block."""

    @abstractmethod
    def write(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Begin to keep what a buffer holds of a block."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One parameter, on the CPU."""

    @abstractmethod
    def put(self, name: str, value: Tensor) -> None:
        """Keep one parameter."""

    def save(self, folder: Path) -> None:
        """Write all blocks into a new folder, one safetensors file each."""
        folder.mkdir()
        for layout in self.layouts:
            save_file({name: self.get(name) for name in layout.entries}, folder / layout.file)

    def load(self, folder: Path) -> None:
        """Go back to what ``save`` wrote."""
        for layout in self.layouts:
            for name, entry in read_header(folder / layout.file).items():
                self.put(name, entry.read())


class DiskStore(BlockStore):
    """One safetensors file for each block, rewritten in place; nothing of them is held in memory.

    Args:
        folder: for the files, which are whole only between steps; those of an earlier run are overwritten. A temporary
            one, which goes with the store, when ``None``.
        layouts: of the blocks.
    """

    def __init__(self, folder: Path | None, layouts: Sequence[Layout]) -> None:
        super().__init__(layouts)
        self._temporary = TemporaryDirectory(prefix="pintpot-") if folder is None else None
        self.folder = folder or Path(self._temporary.name if self._temporary is not None else "")
        self._starts: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pintpot-stream")
        self.folder.mkdir(parents=True, exist_ok=True)
        for layout in layouts:
            with (self.folder / layout.file).open("wb") as file:
                start = file.write(header_of(layout.entries.values()))
                file.truncate(start + layout.nbytes)
            self._starts[layout.block] = start
            self.disk_bytes += start + layout.nbytes

    def read(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Begin to read, in the store's thread."""
        start = self._starts[layout.block]
        return self._thread.submit(_read, self.folder / layout.file, start, _bytes(layout, buffer)).result

    def write(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Begin to write, in the store's thread."""
        start = self._starts[layout.block]
        return self._thread.submit(_write, self.folder / layout.file, start, _bytes(layout, buffer)).result

    def get(self, name: str) -> Tensor:
        """One parameter, read after all that was begun."""
        return self._thread.submit(self._entry(name).read).result()

    def put(self, name: str, value: Tensor) -> None:
        """Keep one parameter."""
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        entry = self._entry(name)
        self._thread.submit(_write, entry.file, entry.offset, data).result()

    def save(self, folder: Path) -> None:
        """Copy the files into another folder."""
        folder.mkdir()
        for layout in self.layouts:
            self._thread.submit(shutil.copyfile, self.folder / layout.file, folder / layout.file).result()

    def load(self, folder: Path) -> None:
        """Go back to what ``save`` copied."""
        for layout in self.layouts:
            self._thread.submit(shutil.copyfile, folder / layout.file, self.folder / layout.file).result()

    def _entry(self, name: str) -> TensorEntry:
        layout = self.places[name]
        entry = layout.entries[name]
        offset = self._starts[layout.block] + entry.offset
        return TensorEntry(name, self.folder / layout.file, entry.dtype, entry.shape, offset, entry.nbytes)


class HostStore(BlockStore):
    """Pinned host memory, copied to and from a GPU beside its work.

    Args:
        device: the GPU.
        layouts: of the blocks.
    """

    def __init__(self, device: torch.device, layouts: Sequence[Layout]) -> None:
        super().__init__(layouts)
        self._held = {x.block: torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=True) for x in layouts}
        self._stream = torch.cuda.Stream(device)

    def read(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Begin to copy to the device, once the work before is done with the buffer."""
        return self._copy(buffer[: layout.nbytes], self._held[layout.block])

    def write(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Begin to copy from the device, once the work before is done."""
        return self._copy(self._held[layout.block], buffer[: layout.nbytes])

    def get(self, name: str) -> Tensor:
        """One parameter, once all that was begun is done."""
        return self._view(name).clone()

    def put(self, name: str, value: Tensor) -> None:
        """Keep one parameter."""
        self._view(name).copy_(value)

    def _view(self, name: str) -> Tensor:
        self._stream.synchronize()
        return self.places[name].view(name, self._held[self.places[name].block])

    def _copy(self, target: Tensor, source: Tensor) -> Ticket:
        work = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(work)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        done = self._stream.record_event()
        return lambda: work.wait_event(done)


class ShapeStore(BlockStore):
    """Stands for any store where tensors have shapes only."""

    def read(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Nothing to do."""
        return _nothing

    def write(self, layout: Layout, buffer: Tensor) -> Ticket:
        """Nothing to do."""
        return _nothing

    def get(self, name: str) -> Tensor:
        """A tensor of the shape."""
        entry = self.places[name].entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype)

    def put(self, name: str, value: Tensor) -> None:
        """Nothing to do."""


class Stream:
    """A model whose blocks are in a store; at most two are on the device, one worked on and one underway.

    Parameters that are away have their shape and a single NaN for all numbers; a parameter stays the same object.

    Args:
        model: the model; its blocks' parameters are taken out of memory.
        store: where they are, or go.
        device: where the model runs; what is not in the blocks goes there for good.
        keep: copy what the parameters hold into the store first.
    """

    def __init__(self, model: nn.Module, store: BlockStore, device: torch.device, *, keep: bool) -> None:
        self.store, self.device = store, device
        parameters = dict(model.named_parameters())
        self._parameters = [{name: parameters[name] for name in layout.entries} for layout in store.layouts]
        for index, own in enumerate(self._parameters):
            for name, p in own.items():
                if keep:
                    store.put(name, p.detach())
            self._part(index)
        if any(p.device.type != device.type for p in model.parameters()):
            model.to(device)
        largest = max(layout.nbytes for layout in store.layouts)
        count = min(2, len(store.layouts))
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self._held: list[int | None] = [None] * count
        self._fresh = [False] * count
        self._tickets: list[list[Ticket]] = [[] for _ in range(count)]
        self._last = count - 1
        self.forget()

    def __len__(self) -> int:
        return len(self.store.layouts)

    def ahead(self, index: int) -> None:
        """Begin to bring a block, if there is one of this number, into the buffer that is not in use."""
        if index >= len(self):
            return
        slot = self._held.index(index) if index in self._held else (self._last + 1) % len(self._buffers)
        if self._held[slot] != index or not self._fresh[slot]:
            self._place(index, slot)
            self._tickets[slot].append(self.store.read(self.store.layouts[index], self._buffers[slot]))
            self._fresh[slot] = True

    def fetch(self, index: int) -> None:
        """Have a block on the device, and the next one on its way."""
        self.ahead(index)
        self._last = self._held.index(index)
        self._wait(self._last)
        self.ahead(index + 1)

    @contextmanager
    def changing(self, index: int) -> Iterator[None]:
        """A block on the device, written back afterwards; on an error the store keeps what it had."""
        self.fetch(index)
        slot = self._last
        try:
            yield
        except BaseException:
            self._fresh[slot] = False
            raise
        self._tickets[slot].append(self.store.write(self.store.layouts[index], self._buffers[slot]))

    def finish(self) -> None:
        """Wait until the store has everything."""
        for slot in range(len(self._buffers)):
            self._wait(slot)

    def forget(self) -> None:
        """Take what the buffers hold for old. They belong to blocks all the same, as all of a model's memory does."""
        self.finish()
        for slot in range(len(self._buffers)):
            self._place(slot, slot)

    def part(self) -> None:
        """Put every block into memory of its own, for good."""
        self.finish()
        for own in self._parameters:
            for name, p in own.items():
                p.data = self.store.get(name).to(self.device, copy=True)

    def _wait(self, slot: int) -> None:
        tickets, self._tickets[slot] = self._tickets[slot], []
        for ticket in tickets:
            ticket()

    def _place(self, index: int, slot: int) -> None:
        """Give a buffer to a block, and take it from the one that had it."""
        before = self._held[slot]
        if before is not None and before != index:
            self._part(before)
        self._held[slot], self._fresh[slot] = index, False
        for name, p in self._parameters[index].items():
            p.data = self.store.layouts[index].view(name, self._buffers[slot])

    def _part(self, index: int) -> None:
        for p in self._parameters[index].values():
            p.data = away(p, self.device)


def block_layouts(model: nn.Module) -> list[Layout]:
    """How the blocks of a model lie in a store.

    Raises:
        UnsupportedModel: when it is not one row of blocks with parameters of their own.
    """
    names = block_names(model)
    parameters = dict(model.named_parameters())
    layouts = [Layout.of(b, {n: p for n, p in parameters.items() if n.startswith(b + ".")}) for b in names]
    used = [id(p) for name in names for p in model.get_submodule(name).parameters()]
    outside = {id(p) for n, p in parameters.items() if not n.startswith(tuple(b + "." for b in names))}
    if len({name.rpartition(".")[0] for name in names}) != 1 or len(set(used)) < len(used) or outside & set(used):
        raise UnsupportedModel(
            f"{type(model).__name__} is not one row of blocks with weights of their own",
            hint="use mezo, which keeps the whole model in memory",
        )
    return layouts


def away(p: Tensor, device: torch.device | None = None) -> Tensor:
    """What stands for a parameter that is elsewhere: its shape, and one NaN."""
    return torch.full((1,), torch.nan, dtype=p.dtype, device=device or p.device).expand(p.shape)


def is_away(p: Tensor) -> bool:
    """Whether a parameter is elsewhere."""
    return p.untyped_storage().nbytes() < p.numel() * p.dtype.itemsize


def _nothing() -> None:
    pass


def _bytes(layout: Layout, buffer: Tensor) -> memoryview:
    view: memoryview = buffer[: layout.nbytes].numpy().data
    return view


def _read(file: Path, offset: int, into: memoryview) -> None:
    with file.open("rb", buffering=0) as handle:
        handle.seek(offset)
        while into:
            # One call gives less than 2 GiB.
            count = handle.readinto(into)
            if not count:
                raise OSError(f"{file} ends before the block does")
            into = into[count:]


def _write(file: Path, offset: int, data: memoryview) -> None:
    with file.open("r+b", buffering=0) as handle:
        handle.seek(offset)
        while data:
            data = data[handle.write(data) or 0 :]
