"""Asking a server of models: again if it is busy or the connection breaks, and what to say if it gives nothing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.text import log

T = TypeVar("T")

# how often a server that is busy, or does not answer, is asked, and after how many seconds, each time more, unless it says when
_ATTEMPTS = 5
_WAIT, _LONGEST_WAIT = 1.0, 300.0

# those that versions of huggingface_hub use, whose errors are no OSError
_HTTP_LIBRARIES = ("httpx", "httpx2")


class NoAnswerError(FirstLayerError):
    """The server cannot be reached, or HF_HUB_OFFLINE is set."""


def tell_of_retries() -> None:
    """Say that huggingface_hub tries again to reach a server, for some 20 seconds, instead of its warnings of each attempt."""

    def tell(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Retrying"):
            log.info("the server does not answer; trying again")
        return False

    if "HF_HUB_VERBOSITY" in os.environ:
        return  # the user wants to see its log
    os.environ["HF_HUB_VERBOSITY"] = "error"
    attempts = logging.getLogger("huggingface_hub.utils._http")
    attempts.setLevel(logging.WARNING)
    attempts.addFilter(tell)


def ask(name: str, call: Callable[[], T]) -> T:
    """Ask a server, and again if it is busy or the connection breaks.

    Raises:
        FirstLayerError: it refuses; `NoAnswerError` if it cannot be reached, or the user wants no connections.
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
                raise NoAnswerError(f"{name} is not among what was downloaded from the Hub, and HF_HUB_OFFLINE is set") from err
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
    elif status is not None and 400 <= status < 500 and status != 429:
        told = f"cannot be read: {_status(status)}; check its name, and HF_TOKEN"
    elif status is None:
        raise NoAnswerError(f"{name} cannot be reached; check the connection, and run this again to go on") from reason
    else:
        told = f"cannot be read: {_status(status)}; try again later"
    raise FirstLayerError(f"{name} {told}") from reason
