"""Published weights by name, fetched once into the folder where torch hub keeps such files.

    detrlib import detr-r50                     what is it? (fetches 160 MB the first time)
    DETRLIB_WEIGHTS_URL=https://mirror.example/detr detrlib import detr-r50

A file counts when the beginning of its SHA-256 is the one in its name. What was fetched of a file stands beside it as
FILE.part until then; the next attempt goes on from there.
"""

import fcntl
import hashlib
import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm.auto import tqdm

from detrlib.errors import WeightsError

ADDRESS = "https://dl.fbaipublicfiles.com/detr"
MIRROR = "DETRLIB_WEIGHTS_URL"  # environment variable: an address that stands in for ADDRESS
PATIENCE = 30.0  # seconds without a byte


class Published(NamedTuple):
    """A file of weights, and what it does not tell of its model."""

    file: str
    settings: dict


# AP on COCO val2017 as published, of the four: 42.0, 43.3, 43.5, 44.9.
PUBLISHED = {
    "detr-r50": Published("detr-r50-e632da11.pth", {}),
    "detr-r50-dc5": Published("detr-r50-dc5-f0fb7ef5.pth", {"model.backbone.dilation": True}),
    "detr-r101": Published("detr-r101-2c7b67e5.pth", {}),
    "detr-r101-dc5": Published("detr-r101-dc5-a2e86def.pth", {"model.backbone.dilation": True}),
}
# Files that lie on drives, without an address that stays and without a hash: whose README links to them.
ELSEWHERE = {
    "deformable-detr": "github.com/fundamentalvision/Deformable-DETR",
    "deformable-detr-refine": "github.com/fundamentalvision/Deformable-DETR",
    "deformable-detr-two-stage": "github.com/fundamentalvision/Deformable-DETR",
    "conditional-detr": "github.com/Atten4Vis/ConditionalDETR",
    "sparse-detr": "github.com/kakaobrain/sparse-detr",
    "efficient-detr": "github.com/kakaobrain/sparse-detr",
}


def fetch(name: str, patience: float = PATIENCE) -> Path:
    """The file of published weights, from the cache or from its address.

    Args:
        name: one of `PUBLISHED`, or of `ELSEWHERE`, of which is said where they come from.
        patience: seconds without a byte after which the server is given up.

    Raises:
        WeightsError: one sentence with the address, the folder of the cache, what went wrong and what to do.
    """
    if name in ELSEWHERE:
        raise WeightsError(
            f"{name} has no address that stays: its file is linked from the README of {ELSEWHERE[name]}; download it, "
            "then give the file in place of the name, or make a run of it: detrlib import FILE --as RUN"
        )
    file = PUBLISHED[name].file
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        if not _is_whole(path):
            raise WeightsError(f"{path} is not {name}: its SHA-256 does not begin as its name says; delete it")
        return path
    url = f"{os.environ.get(MIRROR, ADDRESS).rstrip('/')}/{file}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{file}.part").open("ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX)  # another process that fetches the same file is waited for
            if not path.exists():
                _receive(url, part, patience)
                _accept(Path(part.name), path)
    except _Refused as reason:
        raise WeightsError(
            f"{name}: could not fetch {url}: {reason}. Try again, or download {file} by other means and put the file "
            f"there: {path.parent}"
        ) from None
    except OSError as error:
        raise WeightsError(
            f"{name}: could not write to {path.parent} ({error.strerror or error}), where {url} is to be kept; "
            "free some space, or let TORCH_HOME name a folder of yours"
        ) from None
    return path


class _Refused(Exception):
    """Why a file did not come; the message is a part of a sentence."""


def _receive(url: str, part: BinaryIO, patience: float) -> None:
    """Append to `part` what it lacks of the file at `url`."""
    had, total = part.seek(0, os.SEEK_END), None
    request = urllib.request.Request(url, headers={"Range": f"bytes={had}-"} if had else {})
    try:
        with urllib.request.urlopen(request, timeout=patience) as response:
            if had and response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server sends all of it again
                part.truncate(0)
                had = 0
            length = response.headers["Content-Length"]
            total = had + int(length) if length else None
            _copy(response, part, had, total, url.rsplit("/", 1)[1])
    except urllib.error.HTTPError as error:
        if not (had and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):  # that is: nothing is lacking
            raise _Refused(f"the server says {error.code} {error.reason}") from None
    except TimeoutError:
        raise _Refused(f"nothing came for {patience:g} s; what came until then is kept") from None
    except urllib.error.URLError as error:
        silent = isinstance(error.reason, TimeoutError)
        raise _Refused(f"no answer within {patience:g} s" if silent else f"no connection ({error.reason})") from None
    except (ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        raise _Refused(f"the connection broke ({error}); what came until then is kept") from None
    part.flush()
    if (size := part.tell()) < (total or 0):
        raise _Refused(f"it ended after {size} of {total} bytes; what came until then is kept")


def _copy(response: BinaryIO, part: BinaryIO, had: int, total: int | None, title: str) -> None:
    """Copy with a bar that starts where the last attempt ended."""
    with tqdm(total=total, initial=had, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        while block := response.read(2**20):
            part.write(block)
            bar.update(len(block))


def _accept(part: Path, path: Path) -> None:
    """Give a complete file its name, or forget its content."""
    if not _is_whole(part, path.name):
        os.truncate(part, 0)
        raise _Refused("what came has another SHA-256 than its name says, and is dropped")
    part.replace(path)


def _is_whole(path: Path, name: str | None = None) -> bool:
    """Whether the SHA-256 of a file begins as its name, or `name`, says."""
    expected = re.search(r"-([0-9a-f]{8,})\.", name or path.name)[1]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(expected)
