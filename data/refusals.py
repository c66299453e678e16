"""What the error of a client library means: will waiting mend it, and how to say it in a line.

Three answers. Nothing there: BadShard, alike for every rank. Refused: rights, and where nothing was
ever read from a place also missing credentials and a host without an address, since a mistake in
the config is then likelier than an outage. All else may pass. The libraries wrap each other's
errors, so what counts is looked for along the chain of causes, and botocore's and gcsfs' classes by
name, since either package may be missing. gcsfs tries a connection for some 45 s before it fails.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import aiohttp
from fsspec.exceptions import FSTimeoutError

from data.errors import BadShard, DataError, Refused

_MISSING = frozenset({404, 410})
_REFUSED = frozenset({400, 401, 403, 405, 416, 451})
_STORE_REFUSED = frozenset({401, 403})  # s3 answers 400 also to a request that came too slowly
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})
_NO_ADDRESS = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role of this machine, or "
    "FSSPEC_S3_ANON=true for a public bucket"
)
_CORRECT = "correct the URL or the rights"


def permanent(error: Exception, first: bool) -> DataError | None:
    """What an error means that no wait mends; None for the others.

    `first`: nothing was ever read from there.
    """
    if _status(error) in _MISSING or isinstance(error, FileNotFoundError):
        return BadShard(f"{said(error)}; {_CORRECT}")
    if _forbidden(error):
        return Refused(f"{said(error)}; {_CORRECT}")
    if first and _NO_CREDENTIALS & {type(cause).__name__ for cause in _causes(error)}:
        return Refused(f"{said(error)}; {_CREDENTIALS}")
    if first and any(
        isinstance(cause, socket.gaierror) and cause.errno in _NO_ADDRESS
        for cause in _causes(error)
    ):
        return Refused("no such host; correct the URL or the endpoint in the environment")
    return None


def unconnected(error: Exception) -> bool:
    """Whether nobody took the connection up."""
    kinds = (ConnectionRefusedError, aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
    return any(isinstance(cause, kinds) for cause in _causes(error))


def said(error: Exception) -> str:
    """The error in a line; some have no text of their own."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the server answers {error.status} {error.message}"
    if isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, FSTimeoutError):
        return "its answer took too long"
    return str(error).replace(":\n", ": ").partition("\n")[0] or type(error).__name__


def _forbidden(error: Exception) -> bool:
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _REFUSED
    # the last is botocore's, for a bucket that cannot be called so
    if isinstance(error, (PermissionError, aiohttp.InvalidURL)) or (
        type(error).__name__ == "ParamValidationError"
    ):
        return True
    # gcsfs makes of a 403 an OSError without a number
    return _status(error) in _STORE_REFUSED or str(error).startswith("Forbidden: ")


def _status(error: Exception) -> int | None:
    """The HTTP status that an error tells, of aiohttp, gcsfs or botocore."""
    for cause in _causes(error):
        if isinstance(cause, aiohttp.ClientResponseError):
            return cause.status
        code = getattr(cause, "code", None)
        if type(cause).__name__ == "HttpError" and str(code).isdecimal():
            return int(str(code))
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(status) if status else None
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came of, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        # aiobotocore raises its own without `from`
        cause = cause.__cause__ or cause.__context__
