"""A folder in a bucket, or on whatever else fsspec reaches: what the copy of a run needs of it.

Credentials and endpoints come from where fsspec's clients look for them (AWS_*, FSSPEC_*,
GOOGLE_APPLICATION_CREDENTIALS). The clients try a failed request again by themselves.
"""

import posixpath
from pathlib import Path
from typing import Any

import fsspec

from routedvit.training.config.base import ConfigError, one_line
from routedvit.training.watch.secrets import without_secrets


class BucketError(OSError):
    """The store did not do it; its text says what and why."""


class Bucket:
    """Files below `url`, by names relative to it.

    Args:
        url: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or another of fsspec's, or a path.

    Raises:
        ConfigError: fsspec does not know such URLs, or lacks the package for them.

    Methods raise BucketError for whatever a client raises.
    """

    def __init__(self, url: str) -> None:
        self.shown = str(without_secrets(url))
        scheme, _ = fsspec.core.split_protocol(url)
        local = scheme in (None, "file", "local")
        options: dict[str, Any] = {"auto_mkdir": True} if local else {"use_listings_cache": False}
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror: {self.shown}: {one_line(error)}") from error

    def names(self) -> set[str]:
        """Every file; none where there is no such folder."""
        try:
            found = self._files.find(self._root)
        except FileNotFoundError:
            return set()
        except Exception as error:  # each client library has exceptions of its own
            raise self._error("cannot be listed", error) from error
        return {posixpath.relpath(path, self._root) for path in found}

    def read(self, name: str) -> bytes | None:
        """A small file, whole; None if it is not there."""
        try:
            content: bytes = self._files.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._error(f"{name} cannot be read", error) from error
        return content

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole."""
        try:
            self._files.pipe_file(self._path(name), content)
        except Exception as error:
            raise self._error(f"{name} cannot be written", error) from error

    def put(self, path: Path, name: str) -> None:
        """Copy a local file there.

        Raises:
            FileNotFoundError: it is not here any more.
        """
        try:
            self._files.put_file(str(path), self._path(name))
        except Exception as error:
            if not path.exists():
                raise FileNotFoundError(path) from error
            raise self._error(f"{name} cannot be written", error) from error

    def get(self, name: str, path: Path) -> None:
        """Copy a file from there; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._files.get_file(self._path(name), str(path))
        except Exception as error:
            raise self._error(f"{name} cannot be read", error) from error

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it, where there is one."""
        try:
            self._files.rm(self._path(name), recursive=True)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._error(f"{name} cannot be deleted", error) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _error(self, what: str, error: Exception) -> BucketError:
        return BucketError(f"{self.shown}: {what} ({type(error).__name__}: {one_line(error)})")
