"""Reading GGUF models, in one file or split into several."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType, ReaderField, ReaderTensor

from gguf_firstlayer.c_api import Extent, library
from gguf_firstlayer.errors import FirstLayerError

if sys.platform == "win32":
    import msvcrt

    FSCTL_SET_SPARSE = 0x900C4

# bytes of a file that are hashed at once: Ctrl-C takes effect only in between
_HASHED = 64 << 20


class _Reader(GGUFReader):
    """A GGUFReader that skips the elements of long arrays: vocabularies would take 3 KB per entry.

    And it cuts its pieces from a plain array, not from a memmap, each of whose slices is a memmap: in a third of the time.
    """

    _LONG = 4096
    _HEADER = struct.Struct("<IQ")  # element type and number of elements
    _LENGTH = struct.Struct("<Q")  # of a string

    @property  # type: ignore[override]
    def data(self) -> npt.NDArray[np.uint8]:
        """The bytes of the file, as mapped."""
        return self._data

    @data.setter
    def data(self, mapped: npt.NDArray[np.uint8]) -> None:
        self._data = mapped.view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            raw_kind, count = self._HEADER.unpack(self.data[orig_offs : orig_offs + self._HEADER.size].tobytes())
            kind, end = GGUFValueType(raw_kind), orig_offs + self._HEADER.size
            if count > self._LONG and kind == GGUFValueType.STRING:
                view, length = self.data.data, self._LENGTH.unpack_from
                for _ in range(count):
                    end += 8 + length(view, end)[0]
            elif kind in self.gguf_scalar_to_np:
                begin, dtype = end, np.dtype(self.gguf_scalar_to_np[kind])
                end += count * dtype.itemsize
                if 0 < count <= self._LONG and end <= len(self.data):  # all in one part, which `contents` makes a list of
                    parts = [self.data[orig_offs:begin], self.data[begin:end].view(dtype)]
                    return end - orig_offs, parts, [1], [GGUFValueType.ARRAY, kind]
            if end > orig_offs + self._HEADER.size:
                return end - orig_offs, [self.data[orig_offs:end]], [], [GGUFValueType.ARRAY, kind]
        return super()._get_field_parts(orig_offs, raw_type)


def _validate(path: Path) -> Extent:
    """The extent of a GGUF file, whose header is checked.

    Raises:
        FirstLayerError: it cannot be read, is not GGUF, has the other byte order, or its header is malformed or truncated.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as err:
        raise FirstLayerError(f"{path} cannot be read: {err.strerror}") from err
    if magic == b"version ":
        raise FirstLayerError(f"{path} is only a pointer of Git LFS; get the file itself with git lfs pull")
    if magic[:4] == b"GGUF" and len(magic) < 8:
        raise FirstLayerError(f"{path} is truncated; download or create it again")
    if magic[:4] != b"GGUF":
        raise FirstLayerError(f"{path} is not a GGUF file; convert the model with llama.cpp's convert_hf_to_gguf.py first")
    if magic[4:] not in (b"\2\0\0\0", b"\3\0\0\0"):
        raise FirstLayerError(
            f"{path} is a GGUF file of another byte order or version; only little-endian versions 2 and 3 are read"
        )
    return library().validate(path)


def _open(path: Path) -> GGUFReader:
    """Open a GGUF file, after checking its header and that all tensors are within the file.

    Raises:
        FirstLayerError: as for `_validate`, or the file is truncated.
    """
    extent, size = _validate(path), path.stat().st_size
    if size < extent.file:
        raise FirstLayerError(f"{path} is truncated: it has {size} bytes of {extent.file}; download or create it again")
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as err:
        raise FirstLayerError(f"{path} is truncated or malformed ({err}); download or create it again") from err


@contextmanager
def without_data(path: Path) -> Iterator[Path]:
    """Yield a model with the metadata of the given one, of which only the headers are needed, as after a partial download.

    It is the model itself if that is complete; otherwise a copy in sparse files, which take no space.

    Raises:
        FirstLayerError: a part is missing, or its header is malformed.
    """
    match = Source.PART.fullmatch(path.name)
    others = [path.with_name(part_name(match[1], i, int(match[3]))) for i in range(int(match[3]))] if match else []
    extents = {part: _validate(part) for part in [path, *others] if part == path or part.exists()}
    if all(part.stat().st_size >= extent.file for part, extent in extents.items()):
        yield path
        return
    # on Windows, what is still mapped after an error cannot be removed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for part, extent in extents.items():
            try:
                with part.open("rb") as source, (Path(folder) / part.name).open("wb") as copy:
                    copy.write(source.read(extent.header))
                    _make_sparse(copy)
                    copy.truncate(extent.file)
            except (OSError, OverflowError) as err:
                raise FirstLayerError(f"{part} claims {extent.file} bytes, but no such file can be made: {err}") from err
        yield Path(folder) / path.name


def _make_sparse(file: BinaryIO) -> None:
    """On Windows, which otherwise gives a file its space when it grows; in vain on file systems without sparse files."""
    if sys.platform == "win32":
        size = ctypes.c_ulong()
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno()))
        ctypes.windll.kernel32.DeviceIoControl(handle, FSCTL_SET_SPARSE, None, 0, None, 0, ctypes.byref(size), None)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells that a file is still the same one, with the same content; None if it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def part_name(stem: str, i: int, count: int) -> str:
    """Name of part i, from 0, of a split model (`llama_split_path`)."""
    return f"{stem}-{i + 1:05}-of-{count:05}.gguf"


def _field_bytes(field: ReaderField) -> bytes:
    return b"".join(part.tobytes() for part in field.parts)


class Source:
    """A model in a GGUF file, or in the parts that `llama-gguf-split` makes.

    Args:
        path: the file, or the first part

    Attributes:
        path: as given
        paths: of all files
        parts: readers of the files; the first has the keys
        tensors: by name, in the order of the files
        architecture: value of `general.architecture`, "unknown" if there is none
        bytes: size of all files

    Raises:
        FirstLayerError: a file cannot be read, is not GGUF, is malformed or truncated, or has the other byte order; or it is
            not the first part, or another part is missing; or it holds no model.
    """

    PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = [path]
        self._identities = {path: _identity(path)}
        self.parts = [_open(path)]

        part, count = (self._number(key) for key in ("split.no", "split.count"))
        if count > 1:
            match = self.PART.fullmatch(path.name)
            if match is None or int(match[3]) != count:
                raise FirstLayerError(f"{path} is a part of a split model, but is not named like ...-00001-of-{count:05}.gguf")
            self.paths = [path.with_name(part_name(match[1], i, count)) for i in range(count)]
            if part != 0:
                raise FirstLayerError(f"{path} is part {part + 1} of a split model; give the first, {self.paths[0]}")
            self._identities |= {name: _identity(name) for name in self.paths[1:]}
            self.parts += [_open(name) for name in self.paths[1:]]

        self.tensors: dict[str, ReaderTensor] = {}
        self._part_of: dict[str, GGUFReader] = {}
        for reader in self.parts:
            for tensor in reader.tensors:
                self.tensors[tensor.name] = tensor
                self._part_of[tensor.name] = reader

        self.architecture = str(self.value("general.architecture") or "unknown")
        self.bytes = sum(int(reader.data.nbytes) for reader in self.parts)
        if (kind := self.value("general.type")) in ("adapter", "mmproj", "imatrix"):
            raise FirstLayerError(f"{path} is no model, but has the type '{kind}'; give the model that it belongs to")
        if not self.tensors:
            raise FirstLayerError(f"{path} holds only a vocabulary and no weights; give a model with weights")

    def check_unchanged(self) -> None:
        """Raises FirstLayerError if a file was replaced or written to since it was opened."""
        for path, identity in self._identities.items():
            if _identity(path) != identity:
                raise FirstLayerError(f"{path} changed while it was read, so nothing was written; run this again")

    def get_field(self, key: str) -> ReaderField | None:
        """A key of the model, None if it does not have it."""
        return self.parts[0].get_field(key)

    def value(self, key: str) -> Any:
        """The value of a key: a number, a text or a list of these; None if the model does not have it.

        Raises:
            FirstLayerError: it is malformed, or a list of more than 4096.
        """
        field = self.get_field(key)
        if field and field.types[0] == GGUFValueType.ARRAY and not field.data and int(field.parts[-1].nbytes) > 12:
            raise FirstLayerError(f"{self.path}: the list {key} is too long; download or create it again")
        try:
            return field.contents() if field else None
        except (UnicodeDecodeError, ValueError, IndexError) as err:
            raise FirstLayerError(f"{self.path}: the value of {key} is malformed ({err}); download or create it again") from err

    def _number(self, key: str) -> int:
        value = self.value(key)
        if value is not None and not isinstance(value, int):
            raise FirstLayerError(f"{self.path}: the value of {key} is no whole number; download or create it again")
        return value or 0

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, as mapped from its file."""
        tensor = self.tensors[name]
        return self._part_of[name].data[tensor.data_offset : tensor.data_offset + tensor.n_bytes].data

    def place(self, name: str) -> tuple[Path, int, int]:
        """The file of a tensor, its offset in it, and its size in bytes."""
        tensor = self.tensors[name]
        path = next(path for path, part in zip(self.paths, self.parts, strict=True) if part is self._part_of[name])
        return path, int(tensor.data_offset), int(tensor.n_bytes)

    def keys(self) -> tuple[int, bytes]:
        """The model's own keys as (number, bytes in the file): without those of a split file or of tables."""
        foreign = ("GGUF.", "split.", "firstlayer.")
        fields = [field for name, field in self.parts[0].fields.items() if not name.startswith(foreign)]
        return len(fields), b"".join(map(_field_bytes, fields))

    def array_bytes(self, key: str) -> bytes:
        """The elements of an array of bytes, empty if the model does not have it."""
        field = self.get_field(key)
        if field is None or field.types != [GGUFValueType.ARRAY, GGUFValueType.UINT8]:
            return b""
        return _field_bytes(field)[8 + len(key.encode()) + 4 + 12 :]  # after its name, type, and number of elements

    def sha256(self) -> str:
        """SHA-256 of the file, or of its parts one after the other, hexadecimal."""
        digest = hashlib.sha256()
        for reader in self.parts:
            for first in range(0, len(reader.data), _HASHED):
                digest.update(reader.data[first : first + _HASHED].data)
        return digest.hexdigest()

    def headers(self) -> list[bytes]:
        """The header of each file without `keys()`: magic, version, numbers of tensors and keys, other keys, tensor infos."""
        headers: list[bytes] = []
        for reader in self.parts:
            keys = reader.fields.items()
            # those of the first part but split.* are the model's, and what the reader adds is named GGUF.*
            others = [field for name, field in keys if name.startswith("split.") or (headers and not name.startswith("GGUF."))]
            infos = [tensor.field for tensor in reader.tensors]
            headers.append(reader.data[:24].tobytes() + b"".join(map(_field_bytes, others + infos)))
        return headers

    @property
    def holds_more(self) -> bool:
        """Whether bytes between the header and the tensors of a file, or after these, are not zero."""
        for reader in self.parts:
            infos = [tensor.field for tensor in reader.tensors]
            end = max((info.offset + sum(int(part.nbytes) for part in info.parts) for info in infos), default=len(reader.data))
            for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
                if reader.data[end : tensor.data_offset].any():
                    return True
                end = tensor.data_offset + tensor.n_bytes
            if reader.data[end:].any():
                return True
        return False

    @property
    def stem(self) -> str:
        """Name of the file without its extension and without the number of its part."""
        match = self.PART.fullmatch(self.path.name) if len(self.parts) > 1 else None
        return match[1] if match else self.path.stem
