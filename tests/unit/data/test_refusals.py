"""Mistakes are told from outages: what a client raises, as it raises it."""

from __future__ import annotations

import errno
import socket

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
)
from gcsfs.retry import HttpError, validate_response
from s3fs.errors import translate_boto_error

from data.errors import BadShard, Refused
from data.refusals import permanent, said, unconnected

KEY = ConnectionKey("h", 80, False, True, None, None, None)


def dns(number: int) -> Exception:
    """As aiohttp says that a name has no address."""
    cause = socket.gaierror(number, "Name or service not known")
    error = aiohttp.ClientConnectorDNSError(KEY, cause)
    error.__cause__ = cause
    return error


def by_s3(error: Exception) -> Exception:
    """As botocore wraps what aiohttp raises."""
    wrapped = EndpointConnectionError(endpoint_url="http://h", error=error)
    wrapped.__context__ = error  # without `from`
    return wrapped


def answered_by_s3(status: int, code: str) -> Exception:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(answer, "GetObject"))
    return error


def answered_by_gs(status: int) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011, several kinds
        validate_response(status, b'{"error": {"message": "Anonymous caller"}}', "b/x")
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered_by_s3(403, "AccessDenied"), Refused),
        (answered_by_s3(401, "Unauthorized"), Refused),
        (answered_by_s3(404, "NoSuchBucket"), BadShard),
        (answered_by_s3(400, "RequestTimeout"), type(None)),
        (answered_by_s3(503, "SlowDown"), type(None)),
        (answered_by_gs(401), Refused),
        (answered_by_gs(403), Refused),
        (answered_by_gs(404), BadShard),
        (answered_by_gs(503), type(None)),
        (HttpError({"code": "429", "message": "slow down"}), type(None)),
        (ParamValidationError(report="Invalid bucket name"), Refused),
        (ConnectionResetError(errno.ECONNRESET, "reset"), type(None)),
    ],
)
def test_an_answer_means_the_same_at_every_contact(error: Exception, kind: type) -> None:
    assert {type(permanent(error, first)) for first in (True, False)} == {kind}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NoCredentialsError(), "Unable to locate credentials; set AWS_ACCESS_KEY_ID"),
        (dns(socket.EAI_NONAME), "no such host; correct the URL"),
        (by_s3(dns(socket.EAI_NONAME)), "no such host; correct the URL"),
    ],
)
def test_without_any_contact_these_are_mistakes(error: Exception, words: str) -> None:
    assert isinstance(permanent(error, first=True), Refused)
    assert str(permanent(error, first=True)).startswith(words)
    assert permanent(error, first=False) is None


def test_a_name_service_that_is_not_there_yet_may_pass() -> None:
    assert permanent(dns(socket.EAI_AGAIN), first=True) is None
    assert unconnected(dns(socket.EAI_AGAIN))


def test_it_is_known_whether_a_connection_was_taken_up() -> None:
    refused = aiohttp.ClientConnectorError(KEY, OSError(errno.ECONNREFUSED, "refused"))
    assert unconnected(refused)
    assert unconnected(by_s3(refused))
    assert not unconnected(answered_by_s3(503, "SlowDown"))
    assert not unconnected(ConnectionResetError())


def test_an_error_is_said_in_a_line() -> None:
    assert said(ParamValidationError(report="Invalid name\nmore")) == (
        "Parameter validation failed: Invalid name"
    )
    assert said(TimeoutError()) == "TimeoutError"
