"""Models on the Hugging Face Hub, and behind URLs, as files on this machine."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from gguf_firstlayer.errors import Caller, FirstLayerError, UsageError
from gguf_firstlayer.source import Source, part_name, without_data
from gguf_firstlayer.start import STOPPING
from gguf_firstlayer.text import log

T = TypeVar("T")

# for arguments of the library: a file, or what `local` downloads
ModelName = str | os.PathLike[str]

HUB = "hf:"
_REMOTE = re.compile(r"hf:|https?://")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+)|/(.+\.gguf))?")

# addresses at the Hub: of a file, and of the page of a repository, which people copy from their browsers
_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/]+)/(.+)")
_PAGE = re.compile(r"/(?!datasets/|spaces/)([\w.-]+/[\w.-]+)(?<!\.gguf)(?:/tree/main(?:/.*)?)?/?")
_HUBS = ("https://huggingface.co", "https://hf.co")

# files of this process only
_STREAM = re.compile(r"/dev/(fd/|std)|/proc/self/fd/")

# what `-hf` of llama.cpp takes if no quantization is named, and names of files that it takes for no model
# (common/download.cpp); and those of converted files, which may have been written beside their sources
_DEFAULTS = ("Q4_K_M", "Q8_0")
_OTHERS = re.compile(r"mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-|_firstlayer\.gguf$|-flp(-\d{5}-of-\d{5})?\.gguf$")

# bytes that are read of a file at first, and then, until its header is complete: vocabularies differ
_HEADER_BYTES = (2 << 20, 8 << 20, 32 << 20)

# how often a server that is busy, or does not answer, is asked, and after how many seconds, each time more, unless it says when
_ATTEMPTS = 5
_WAIT, _LONGEST_WAIT = 1.0, 300.0

# other addresses that an address may lead to
_REDIRECTIONS = 10

# those that versions of huggingface_hub use, whose errors are no OSError
_HTTP_LIBRARIES = ("httpx", "httpx2")


def is_remote(name: ModelName) -> bool:
    """Whether `local` would have to look for it elsewhere."""
    return isinstance(name, str) and bool(_REMOTE.match(name))


def model_name(text: str) -> ModelName:
    """A model as an argument of the command line.

    Raises:
        argparse.ArgumentTypeError: it is empty, as if a variable of the shell is not set.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name of a model is empty")
    return text if is_remote(text) else Path(text)


def local(name: ModelName) -> Path:
    """A model as files on this machine, downloaded unless they are there. Of a split model, the first part.

    Files from the Hub are kept in its cache (`HF_HUB_CACHE`), which llama.cpp's `-hf` shares; others in `HF_ASSETS_CACHE`.

    Args:
        name: a file; `hf:user/repo[:quant]`, which is understood as by `-hf` of llama.cpp; `hf:user/repo/file.gguf`; or a URL

    Raises:
        FirstLayerError: there is no such model, this user may not read it, the server cannot be reached, or the disk refuses.
    """
    if not is_remote(name):
        return _here(name)
    with _keeping(name):
        parts = _parts(str(name))
        if parts[0].repository:
            paths = [_download_from_hub(part) for part in parts]
            return paths[0]
        versions = [_version(part) for part in parts]
        folder = _folder(versions)
        paths = [_download(version, folder) for version in versions]
        return paths[0]


def header(name: ModelName) -> Path:
    """The same, but only its first megabytes are read, which hold its metadata, unless it was downloaded before."""
    if not is_remote(name):
        return _here(name)
    with _keeping(name):
        parts = _parts(str(name))
        cached = [_cached(part) for part in parts]
        if all(cached):
            return Path(str(cached[0]))
        versions = [_version(part) for part in parts]
        folder = _folder(versions)
        whole = [folder / part.local_name for part in parts]
        if all(path.exists() for path in whole):
            return whole[0]
        paths = [_read_header(version, folder) for version in versions]
        return paths[0]


def _here(name: ModelName) -> Path:
    """A file of this machine, which other processes can open, too."""
    if os.path.exists(name) and not (os.path.isfile(name) or os.path.isdir(name)):
        raise FirstLayerError(f"{os.fspath(name)} is not a regular file; save it to one first")
    return Path(os.path.realpath(name) if _STREAM.match(os.fspath(name)) else name)


@contextmanager
def _keeping(name: ModelName) -> Iterator[None]:
    """Say what is wrong with a name, or with the folder of downloads."""
    try:
        yield
    except OSError as err:
        told = f"{err.filename}: {err.strerror}" if err.filename else str(err)
        raise FirstLayerError(f"{name} cannot be kept ({told}); set HF_HOME to a folder on a disk with room") from err
    except ValueError as err:
        raise UsageError(f"{name}: {err}") from err


def models(name: str) -> list[str]:
    """The models of `hf:user/repo`, each as `hf:user/repo/file.gguf`. The name of one model stands for itself."""
    with _keeping(name):
        name = _of_page(name)
        match = _REPOSITORY.fullmatch(name.removeprefix(HUB))
        if not match or match[2] or match[3]:
            return [name]
        return [f"{HUB}{match[1]}/{file}" for file in models_among(_list(name, match[1]).files)]


def models_among(files: list[str]) -> list[str]:
    """Those files that are models; of split ones, the first parts."""
    names = {file: PurePosixPath(file).name for file in files}
    parts = {file: Source.PART.fullmatch(name) for file, name in names.items()}
    return [
        file
        for file, name in sorted(names.items())
        if name.endswith(".gguf")
        and not _OTHERS.search(name)
        and ((part := parts[file]) is None or int(part[2]) == 1 <= int(part[3]))
    ]


class _Remote(NamedTuple):
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
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, self.file, revision=self.revision) if self.repository else self.file

    @property
    def basename(self) -> str:
        path = self.file if self.repository else urlsplit(self.file).path
        return PurePosixPath(path).name or "model.gguf"

    @property
    def local_name(self) -> str:
        """The same, as every system takes it for the name of a file."""
        return re.sub(r"[^\w.-]", "_", self.basename).lstrip(".") or "model.gguf"


def _parts(name: str) -> list[_Remote]:
    """All files of a model."""
    first = _find(name)
    match = Source.PART.fullmatch(first.basename)
    if not match or int(match[3]) == 0:
        return [first]
    names = [part_name(match[1], i, int(match[3])) for i in range(int(match[3]))]
    return [first._replace(file=first.file.replace(first.basename, part)) for part in names]


def _find(name: str) -> _Remote:
    """The file that a name means; of a split model, its first part."""
    name = _of_page(name)
    if not name.startswith(HUB):
        match = _FILE.fullmatch(_path_at_hub(name))
        return _Remote(name, match[1], match[2], match[3]) if match else _Remote(name, "", "", name)

    match = _REPOSITORY.fullmatch(name.removeprefix(HUB))
    if not match:
        raise UsageError(f"'{name}' is no model on the Hub; give {HUB}USER/REPOSITORY, and perhaps :QUANTIZATION or /FILE.gguf")
    repository, quantization, file = match.groups()
    if file is None:
        listing = _list(name, repository)
        found = models_among(listing.files)
        wanted = [rf"{re.escape(quantization)}[.-]"] if quantization else [*(f"{each}[.-]" for each in _DEFAULTS), ""]
        fits = [file for pattern in wanted for file in found if re.search(pattern, file, re.IGNORECASE)]
        if not fits:
            names = ", ".join(PurePosixPath(each).name for each in found)
            if not listing.is_whole:
                raise FirstLayerError(
                    f"{name} was not downloaded, as were {names or 'no models'}; connect to the Hub to get it"
                )
            raise FirstLayerError(f"{name}: the repository has no such GGUF model{names and f'; it has {names}'}")
        file = fits[0]
    return _Remote(name, repository, "main", file)


def _path_at_hub(url: str) -> str:
    """The path of a URL, "" if that is not of the Hub."""
    from huggingface_hub import constants

    host, port, path = _place(url)
    if not host:
        raise UsageError(f"{url} is no address of a file")
    for hub in (constants.ENDPOINT, *_HUBS):
        hub_host, hub_port, folder = _place(hub)
        if (host, port) == (hub_host, hub_port) and path.startswith(f"{folder.rstrip('/')}/"):
            return path[len(folder.rstrip("/")) :]
    return ""


def _place(url: str) -> tuple[str | None, int | None, str]:
    """Host, port unless it is that of the scheme, and path of a URL. Raises ValueError if the port is no number."""
    address = urlsplit(url)
    is_usual = address.port == {"http": 80, "https": 443}.get(address.scheme)
    return address.hostname, None if is_usual else address.port, unquote(address.path)


def _of_page(name: str) -> str:
    """The repository whose page this is, or the name itself."""
    match = None if name.startswith(HUB) else _PAGE.fullmatch(_path_at_hub(name))
    return f"{HUB}{match[1]}" if match else name


class _Listing(NamedTuple):
    """Files of a repository: all, or, where the Hub cannot be asked, those that were downloaded."""

    files: list[str]
    is_whole: bool


def _list(name: str, repository: str) -> _Listing:
    """What is in a repository."""
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        files = _ask(name, lambda: [entry.path for entry in HfApi().list_repo_tree(repository, recursive=True)])
        return _Listing([file for file in files if file.isprintable()], True)  # they are shown on terminals
    except _NoAnswerError:
        try:
            revisions = [
                revision
                for repo in scan_cache_dir().repos
                if repo.repo_id == repository
                for revision in repo.revisions
                if "main" in revision.refs
            ]
        except CacheNotFound:
            revisions = []
        if not revisions:
            raise
        log.warning("%s: the Hub cannot be asked, so only what was downloaded of %s is known", name, repository)
        found = [str(PurePosixPath(file.file_path.relative_to(revisions[0].snapshot_path))) for file in revisions[0].files]
        return _Listing(found, False)


def _download_from_hub(remote: _Remote) -> Path:
    from huggingface_hub import hf_hub_download

    with _announced(remote):
        return Path(_ask(remote.name, lambda: hf_hub_download(remote.repository, remote.file, revision=remote.revision)))


def _download(version: _Version, folder: Path) -> Path:
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
                _ask(remote.name, get)
            partial.replace(path)
    return path


def _cached(remote: _Remote) -> str | None:
    """The path of a file that was downloaded from the Hub."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(remote.repository, remote.file, revision=remote.revision) if remote.repository else None
    return path if isinstance(path, str) else None


def _read_header(version: _Version, folder: Path) -> Path:
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


def _read(remote: _Remote, first: int, end: int, size: int | None) -> bytes:
    """The bytes from `first` up to `end` of a file, whose size is known if the server tells."""
    from huggingface_hub.file_download import http_get

    def get() -> bytes:
        part = _Part(remote.name, end - first)
        wanted = {"Range": f"bytes={first}-{end - 1}"}
        http_get(remote.url, part, headers=_headers(remote) | wanted, expected_size=None if size is None else end - first)
        return part.getvalue()

    return _ask(remote.name, get)


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
def _announced(remote: _Remote) -> Iterator[None]:
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
    ours = [number for number in STOPPING if number != signal.SIGINT and callable(signal.getsignal(number))]
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ours if Caller.is_command_line}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) == signal.SIG_DFL:  # after Ctrl-C, it is ignored
                signal.signal(number, handler)


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


def _headers(remote: _Remote) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return dict(build_hf_headers(token=remote.token))


class _Version(NamedTuple):
    """A version of a file outside of the Hub's cache: what tells it from others, and its size in bytes, if the server does."""

    remote: _Remote
    etag: str | None
    size: int | None


def _version(remote: _Remote) -> _Version:
    from huggingface_hub import get_hf_file_metadata

    url = remote.url
    for _ in range(_REDIRECTIONS):
        try:
            found = _ask(remote.name, lambda url=url: get_hf_file_metadata(url, token=remote.token))  # type: ignore[misc]
        except FirstLayerError:
            if url == remote.url:
                raise
            return _Version(remote, None, None)  # an address that is only for downloads
        if remote.repository or str(found.location) == url:
            return _Version(remote, found.etag, found.size)
        url = str(found.location)
    raise FirstLayerError(f"{remote.name} leads from one address to another without end; check its name")


def _folder(versions: list[_Version]) -> Path:
    """Where the files of a model are kept together, those of other versions elsewhere."""
    from huggingface_hub import cached_assets_path

    told = " ".join(f"{remote.url} {etag} {size}" for remote, etag, size in versions)
    place = versions[0].remote.repository or "urls"
    try:
        return Path(cached_assets_path("gguf-firstlayer", place, hashlib.sha256(told.encode()).hexdigest()[:32]))
    except ValueError as err:  # something else is there
        raise NotADirectoryError(str(err)) from err


class _NoAnswerError(FirstLayerError):
    """The server cannot be reached, or HF_HUB_OFFLINE is set."""


def _ask(name: str, call: Callable[[], T]) -> T:
    """Ask a server, and again if it is busy or the connection breaks.

    Raises:
        FirstLayerError: it refuses; `_NoAnswerError` if it cannot be reached, or the user wants no connections.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except HFValidationError as err:
            raise UsageError(f"{name}: {err}") from err
        except (KeyError, TypeError, RecursionError) as err:
            raise FirstLayerError(f"{name}: the server's answer is malformed; check the name") from err
        except Exception as err:
            module = type(err).__module__.partition(".")[0]
            from_xet = isinstance(err, RuntimeError) or module == "hf_xet"
            if from_xet:  # which tries again itself
                raise FirstLayerError(f"{name} cannot be downloaded ({err}); run this again to go on") from err
            if not isinstance(err, OSError) and module not in _HTTP_LIBRARIES:
                raise
            reason = err.__cause__ if isinstance(err, LocalEntryNotFoundError) and err.__cause__ else err
            if isinstance(reason, OfflineModeIsEnabled):
                raise _NoAnswerError(
                    f"{name} is not among what was downloaded from the Hub, and HF_HUB_OFFLINE is set"
                ) from err
            response = getattr(reason, "response", None)
            status = response.status_code if response is not None else None
            if isinstance(reason, OSError) and reason.errno and not isinstance(reason, HfHubHTTPError | ConnectionError):
                raise reason from err  # of the disk, not of the network
            is_final = (status not in (None, 429) and status < 500) or "Connect" in type(reason).__name__  # nobody listens
            if is_final or attempt == _ATTEMPTS:
                _refuse(name, reason, status)
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else _WAIT * attempt
            log.info("%s: %s; trying again in %g s", name, _status(status), wait)
            time.sleep(wait)
    raise AssertionError


def _status(status: int | None) -> str:
    known = {None: "the connection broke", 429: "the server is busy"}
    return known.get(status, f"the server answers {status}")


def _refuse(name: str, reason: BaseException, status: int | None) -> NoReturn:
    """Say why a server gave nothing."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(reason, GatedRepoError):
        told = "is gated; accept its terms on its page, and set HF_TOKEN"
    elif isinstance(reason, RepositoryNotFoundError) or status == 401:
        told = "does not exist, or is private; check its name, or set HF_TOKEN to a token that may read it"
    elif status == 404:
        told = "does not exist; check its name"
    elif status is None:
        raise _NoAnswerError(f"{name} cannot be reached; check the connection, and run this again to go on") from reason
    else:
        told = f"cannot be read: {_status(status)}; try again later"
    raise FirstLayerError(f"{name} {told}") from reason
