"""File format of a checkpoint for torch.distributed.checkpoint: safetensors and JSON, nothing that runs code.

Owns: the layout below, its checks, and the interface to torch's planner, which decides which worker writes and reads which parts.
Does not know: which checkpoints exist, when one is written.

    step-000001000/rank-00000.safetensors    written by worker 0: whole tensors, or boxes of sharded ones
                   rank-00001.safetensors
                   index.json                facts of the run; every tensor: type, shape, boxes: (offset, shape, file, bytes, CRC-32)
                   COMMIT                    size and CRC-32 of the index, size of every file; written last, when all others are durable

A checkpoint is read by box: any number of workers may write it, and any other number read it.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from pi0fm.policy.saved.weights import NAMES, header
from pi0fm.train.checkpoint.index import INDEX, VERSION, Box, Index, TornError, remove
from pi0fm.train.checkpoint.storage import COMMIT, Store, folder


@final
class Writer(StorageWriter):
    """Writer of this worker's part of one checkpoint; torch calls its methods in the order below."""

    def __init__(self, store: Store, step: int, rank: int, facts: Mapping[str, Any]) -> None:
        self._store, self._step, self._rank, self._facts = store, step, rank, dict(facts)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: no state is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return torch's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Remove an earlier attempt's files, COMMIT first; called on the first worker before any worker writes."""
        remove(self._store, self._step, list(self._store.sizes()))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write one safetensors file with all tensors of this worker's plan."""
        tensors = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(f"a checkpoint holds tensors, {item.index.fqn} is none")
            found = planner.resolve_data(item)
            assert isinstance(found, Tensor)
            tensors.append(found.detach().cpu().contiguous())
        name = f"rank-{self._rank:05d}.safetensors"
        keys = [
            item.index.fqn if not item.index.offset or not any(item.index.offset) else f"{item.index.fqn}@{tuple(item.index.offset)}"
            for item in plan.items
        ]
        buffers = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in tensors]
        head, _, _ = header({key: (tuple(tensor.shape), tensor.dtype) for key, tensor in zip(keys, tensors, strict=True)})
        start, results = len(head), []
        for item, buffer in zip(plan.items, buffers, strict=True):
            place = (name, start, start + buffer.nbytes, zlib.crc32(buffer))
            results.append(WriteResult(item.index, buffer.nbytes, place))
            start += buffer.nbytes
        if results:
            self._store.write(f"{folder(self._step)}/{name}", [memoryview(head), *buffers])
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, check every file's size, and write COMMIT; called on the first worker when all have written."""
        places = {result.index: result.storage_data for written in results for result in written}
        tensors, files = {}, dict.fromkeys((place[0] for place in places.values()), 0)
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes), *places[MetadataIndex(name, chunk.offsets)]) for chunk in found.chunks]
            tensors[name] = {"dtype": NAMES[found.properties.dtype], "shape": list(found.size), "boxes": [vars(box) for box in boxes]}
            for box in boxes:
                files[box.file] = max(files[box.file], box.stop)
        tree = {"version": VERSION, "facts": self._facts, "tensors": tensors}
        index = json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()
        place = folder(self._step)
        self._store.write(f"{place}/{INDEX}", [memoryview(index)])
        present = self._store.sizes()
        for name, size in files.items():
            if present.get(f"{place}/{name}") != size:
                raise OSError(
                    f"the first worker does not see {place}/{name}, which another wrote; checkpoints must be where all workers can read"
                )
        commit = {"version": VERSION, "step": self._step, "files": files | {INDEX: len(index)}, "index_crc32": zlib.crc32(index)}
        self._store.write(f"{place}/{COMMIT}", [memoryview(json.dumps(commit).encode())])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Refuse every id, since the step is given to the constructor."""
        del checkpoint_id
        return False


@final
class Reader(StorageReader):
    """Reader of one checkpoint, whose index was already read."""

    def __init__(self, store: Store, step: int, index: Index) -> None:
        self._store, self._step, self._index = store, step, index

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index as torch's metadata."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in entry.boxes],
                )
                for name, entry in self._index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return torch's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return torch's plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the planned parts, box by box. Raises TornError for bytes that differ from those written."""
        asked: dict[tuple[str, int], list[ReadItem]] = {}
        for item in plan.items:
            box = self._box(item.storage_index)
            asked.setdefault((box.file, box.start), []).append(item)
        for items in asked.values():
            box = self._box(items[0].storage_index)
            stored = self._read(box, self._index.tensors[items[0].storage_index.fqn].dtype)
            for item in items:
                part = stored
                for axis, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(axis, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _box(self, index: MetadataIndex) -> Box:
        wanted = tuple(index.offset or ())
        boxes = self._index.tensors[index.fqn].boxes
        return next(box for box in boxes if box.offset == wanted) if wanted else boxes[0]

    def _read(self, box: Box, dtype: torch.dtype) -> Tensor:
        content = self._store.read(f"{folder(self._step)}/{box.file}", box.start, box.stop)
        if len(content) != box.stop - box.start or zlib.crc32(content) != box.crc32:
            raise TornError(f"{box.file} does not hold what was written")
        if not content:
            return torch.empty(box.shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).reshape(box.shape)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Refuse every id, since the step is given to the constructor."""
        del checkpoint_id
        return False
