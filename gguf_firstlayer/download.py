"""Files that are elsewhere, whole or their headers only, in folders of this machine."""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gguf_firstlayer.ask import ask
from gguf_firstlayer.errors import Caller, FirstLayerError
from gguf_firstlayer.source import without_data
from gguf_firstlayer.start import STOPPING
from gguf_firstlayer.text import log

# bytes that are read of a file at first, and then, until its header is complete: vocabularies differ
_HEADER_BYTES = (2 << 20, 8 << 20, 32 << 20)

# other addresses that an address may lead to
_REDIRECTIONS = 10


class Remote(NamedTuple):
    """A file elsewhere: as it was named, in a repository of the Hub, or, if `repository` is "", at a URL."""

    name: str
    repository: str
    revision: str
    file: str

    @property
    def token(self) -> bool | None:
        """The user's token is for the Hub only."""
        return None if self.repository else False

    @property
    def url(self) -> str:
        """Its address."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, self.file, revision=self.revision) if self.repository else self.file

    @property
    def basename(self) -> str:
        """Its name without those of folders."""
        path = self.file if self.repository else urlsplit(self.file).path
        return PurePosixPath(path).name or "model.gguf"

    @property
    def local_name(self) -> str:
        """The same, as every system takes it for the name of a file."""
        return re.sub(r"[^\w.-]", "_", self.basename).lstrip(".") or "model.gguf"


def download_from_hub(remote: Remote) -> Path:
    """A whole file in the Hub's cache."""
    from huggingface_hub import hf_hub_download

    with _announced(remote):
        return Path(ask(remote.name, lambda: hf_hub_download(remote.repository, remote.file, revision=remote.revision)))


def download(version: Version, folder: Path) -> Path:
    """A whole file that is kept in a folder."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock

    remote, size = version.remote, version.size
    path, partial = folder / remote.local_name, folder / f"{remote.local_name}.incomplete"

    def get() -> None:
        with partial.open("ab") as file:
            if not version.etag or (size is not None and file.tell() > size):
                file.truncate(file.seek(0))  # it may be of another version
            if file.tell() != size:
                headers = _headers(remote)
                http_get(remote.url, file, resume_size=file.tell(), headers=headers, displayed_filename=remote.local_name)
        if size is not None and partial.stat().st_size != size:
            raise OSError(f"{partial.stat().st_size} of {size} bytes came")

    if path.exists():  # perhaps where no lock can be made
        return path
    with WeakFileLock(folder / f"{remote.local_name}.lock"):
        if not path.exists():
            with _announced(remote):
                ask(remote.name, get)
            partial.replace(path)
    return path


def in_cache(remote: Remote) -> Path | None:
    """A file that was downloaded from the Hub."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(remote.repository, remote.file, revision=remote.revision) if remote.repository else None
    return Path(path) if isinstance(path, str) else None


def read_header(version: Version, folder: Path) -> Path:
    """The beginning of a file, as much as its header takes."""
    from huggingface_hub.utils import WeakFileLock

    remote, size = version.remote, version.size
    path, partial = folder / "headers" / remote.local_name, folder / f"{remote.local_name}.header"
    if path.exists():  # likewise
        return path
    path.parent.mkdir(exist_ok=True)
    with WeakFileLock(folder / f"{remote.local_name}.lock"), _without_bars():
        if not path.exists():
            partial.unlink(missing_ok=True)
            ends = [end if size is None else min(end, size) for end in _HEADER_BYTES]
            for first, end in zip([0, *ends], ends, strict=False):
                with partial.open("ab") as file:
                    file.write(_read(remote, first, end, size))
                try:
                    with without_data(partial):
                        break
                except FirstLayerError as err:
                    if end in (size, ends[-1]):
                        raise FirstLayerError(str(err).replace(str(partial), remote.name)) from err
            partial.replace(path)
    return path


def _read(remote: Remote, first: int, end: int, size: int | None) -> bytes:
    """The bytes from `first` up to `end` of a file, whose size is known if the server tells."""
    from huggingface_hub.file_download import http_get

    def get() -> bytes:
        part = _Part(remote.name, end - first)
        wanted = {"Range": f"bytes={first}-{end - 1}"}
        http_get(remote.url, part, headers=_headers(remote) | wanted, expected_size=None if size is None else end - first)
        return part.getvalue()

    return ask(remote.name, get)


class _Part(io.BytesIO):
    """A part of a file, which gets no longer than it was asked for."""

    def __init__(self, name: str, n_bytes: int) -> None:
        super().__init__()
        self._name, self._n_bytes = name, n_bytes

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._n_bytes:
            raise FirstLayerError(f"{self._name}: the server sends no parts of files; download the model first")
        return super().write(data)


@contextmanager
def _announced(remote: Remote) -> Iterator[None]:
    """A progress bar on a terminal, which huggingface_hub draws; elsewhere one line at the start."""
    with _ending_at_once():
        if sys.stderr.isatty():
            yield
        else:
            log.info("%s: downloading %s unless it is there", remote.name, remote.basename)
            with _without_bars():
                yield


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command line: hf_xet keeps Python from handling them, and a download goes on later."""
    if Caller.is_command_line:
        atexit.register(_end_silently)
    ours = [number for number in STOPPING if number != signal.SIGINT and callable(signal.getsignal(number))]
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ours if Caller.is_command_line}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) == signal.SIG_DFL:  # after Ctrl-C, it is ignored
                signal.signal(number, handler)


def _end_silently() -> None:
    """Keep what hf_xet's threads say when Python ends before them from standing below our last sentence."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _headers(remote: Remote) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return dict(build_hf_headers(token=remote.token))


class Version(NamedTuple):
    """A version of a file outside of the Hub's cache: what tells it from others, and its size in bytes, if the server does."""

    remote: Remote
    etag: str | None
    size: int | None


def version_of(remote: Remote) -> Version:
    """What the server says of a file, which may lead to another one."""
    from huggingface_hub import get_hf_file_metadata

    url = remote.url
    for _ in range(_REDIRECTIONS):
        try:
            found = ask(remote.name, lambda url=url: get_hf_file_metadata(url, token=remote.token))  # type: ignore[misc]
        except FirstLayerError:
            if url == remote.url:
                raise
            return Version(remote, None, None)  # an address that is only for downloads
        if remote.repository or str(found.location) == url:
            return Version(remote, found.etag, found.size)
        url = str(found.location)
    raise FirstLayerError(f"{remote.name} leads from one address to another without end; check its name")


def folder_of(versions: list[Version]) -> Path:
    """Where the files of a model are kept together, those of other versions elsewhere."""
    from huggingface_hub import cached_assets_path

    told = " ".join(f"{remote.url} {etag} {size}" for remote, etag, size in versions)
    place = versions[0].remote.repository or "urls"
    try:
        return Path(cached_assets_path("gguf-firstlayer", place, hashlib.sha256(told.encode()).hexdigest()[:32]))
    except ValueError as err:  # something else is there
        raise NotADirectoryError(str(err)) from err
