"""Downloads published files: resumes partial downloads, retries, and verifies size and SHA-256.

`urllib` rather than `huggingface_hub.file_download.http_get`: that one does not retry after a server error or a
connection reset, writes in blocks of 10 MB that an interruption loses, and raises the errors of a client library that
differs between the versions this project supports.
"""

from __future__ import annotations

import hashlib
import http.client
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

WAITS = (1.0, 2.0, 4.0)
"""Seconds to wait before each retry."""

_TIMEOUT_S = 30
_BLOCK = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A published file; `size` in bytes and `sha256` in hexadecimal digits are None if they were not published."""

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None


class DownloadError(Exception):
    """A failed or wrong download; the message, one line, names the URL or path and the way out."""


def fetch(files: Iterable[RemoteFile], folder: Path) -> list[Path]:
    """Return the paths of `files` in `folder`; missing ones are downloaded as `NAME.part`, verified and renamed.

    A file without a published SHA-256 is accepted, and its SHA-256 printed.
    Raises DownloadError for the first file that cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_fetch_one(file, folder / file.name) for file in files]


def _fetch_one(file: RemoteFile, path: Path) -> Path:
    if path.exists():
        problem = _problem_with(path, file)
        if problem:
            raise DownloadError(f"{path}: {problem}; delete it and run this again, or put the right file there")
        return path
    part = path.with_name(path.name + ".part")
    _transfer_with_retries(file, part, path)
    problem = _problem_with(part, file)
    if problem:
        part.unlink()
        raise DownloadError(
            f"{file.url}: {problem}; the download was deleted: run this again, or put the right file at {path}"
        )
    part.replace(path)
    return path


def _problem_with(path: Path, file: RemoteFile) -> str | None:
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size:,} bytes, expected {file.size:,}"
    found = sha256_of(path)
    if file.sha256 is None:
        print(f"{file.name}: {size:,} bytes, SHA-256 {found} (not checked: none is published)")
    elif found != file.sha256:
        return f"SHA-256 {found}, expected {file.sha256}"
    else:
        print(f"{file.name}: {size:,} bytes, SHA-256 as expected")
    return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _transfer_with_retries(file: RemoteFile, part: Path, path: Path) -> None:
    for number, wait in enumerate((*WAITS, None), start=2):
        try:
            return _transfer(file, part)
        except HTTPError as error:
            error.close()
            reason = f"HTTP {error.code} {error.reason}"
            may_pass = error.code >= 500 or error.code in (408, 416, 429)
            if error.code == 416:  # no such range, so the partial file is not the beginning of this file
                part.unlink(missing_ok=True)
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            may_pass = True
        if wait is None or not may_pass:
            break
        print(f"{file.name}: {reason}; try {number} of {len(WAITS) + 1} in {wait:g} s", file=sys.stderr)
        time.sleep(wait)
    again = "run this again (it resumes where it stopped), or " if may_pass else ""
    raise DownloadError(f"{file.url}: {reason}; {again}fetch the file by other means and put it at {path}")


def _transfer(file: RemoteFile, part: Path) -> None:
    """Append the missing bytes to `part`, or overwrite it if the server sends the whole file.

    Raises OSError or HTTPException for an incomplete transfer; the bytes received stay in `part`.
    """
    have = part.stat().st_size if part.exists() else 0
    if have == file.size:
        return
    request = Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urlopen(request, timeout=_TIMEOUT_S) as response:
        if response.status != 206:
            have = 0
        coming = response.length  # None if the server does not say
        total = file.size if coming is None else have + coming
        with (
            open(part, "ab" if have else "wb") as target,
            tqdm(
                desc=file.name, total=total, initial=have, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
            ) as bar,
        ):
            while block := response.read(_BLOCK):
                target.write(block)
                bar.update(len(block))
    size = part.stat().st_size
    if coming is not None and size < have + coming:
        raise ConnectionError(f"the connection was cut after {size:,} of {total:,} bytes")
