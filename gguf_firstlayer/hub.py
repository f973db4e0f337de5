"""Models on the Hugging Face Hub, and behind URLs, as files on this machine."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from gguf_firstlayer.ask import NoAnswerError, ask
from gguf_firstlayer.download import Remote, download, download_from_hub, folder_of, in_cache, read_header, version_of
from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.source import Source, part_name
from gguf_firstlayer.text import log

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
            paths = [download_from_hub(part) for part in parts]
            return paths[0]
        versions = [version_of(part) for part in parts]
        folder = folder_of(versions)
        paths = [download(version, folder) for version in versions]
        return paths[0]


def download_with_sidecar(name: str) -> None:
    """Get what `-hf` of llama.cpp takes from a repository to the cache: a model, and its sidecar if it has one there.

    Args:
        name: as for `local`, at the Hub

    Raises:
        FirstLayerError: as `local`.
    """
    with _keeping(name):
        files = _parts(name)
        sidecar = files[0]._replace(file=re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "_firstlayer.gguf", files[0].file))
        if sidecar.file in _list(name, sidecar.repository).files:
            files.append(sidecar)
        for file in files:
            download_from_hub(file)


def header(name: ModelName) -> Path:
    """The same, but only its first megabytes are read, which hold its metadata, unless it was downloaded before."""
    if not is_remote(name):
        return _here(name)
    with _keeping(name):
        parts = _parts(str(name))
        paths = [path for part in parts if (path := in_cache(part))]
        if len(paths) == len(parts):
            return paths[0]
        versions = [version_of(part) for part in parts]
        folder = folder_of(versions)
        whole = [folder / part.local_name for part in parts]
        if all(path.exists() for path in whole):
            return whole[0]
        paths = [read_header(version, folder) for version in versions]
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


def _parts(name: str) -> list[Remote]:
    """All files of a model."""
    first = _find(name)
    match = Source.PART.fullmatch(first.basename)
    if not match or int(match[3]) == 0:
        return [first]
    names = [part_name(match[1], i, int(match[3])) for i in range(int(match[3]))]
    return [first._replace(file=first.file.replace(first.basename, part)) for part in names]


def _find(name: str) -> Remote:
    """The file that a name means; of a split model, its first part."""
    name = _of_page(name)
    if not name.startswith(HUB):
        match = _FILE.fullmatch(_path_at_hub(name))
        return Remote(name, match[1], match[2], match[3]) if match else Remote(name, "", "", name)

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
    return Remote(name, repository, "main", file)


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
        files = ask(name, lambda: [entry.path for entry in HfApi().list_repo_tree(repository, recursive=True)])
        return _Listing([file for file in files if file.isprintable()], True)  # they are shown on terminals
    except NoAnswerError:
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
