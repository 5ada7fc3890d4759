"""Annotations are read and checked once on a machine: what is kept of a large file lies in the cache, as columns.

Processes map that index into their memory, so that all of them share one copy. It is found by the digest of the
annotations, wherever they lie. Files below `LEAST` bytes are read anew each time, which is as quick.
"""

import hashlib
import logging
from pathlib import Path

import torch
from pydantic_core import from_json, to_json

from detrlib.config.machine import cache_folder
from detrlib.data.annotations import read_annotations
from detrlib.data.blocks import OddFile, Twice, read_blocks
from detrlib.data.columns import BoxColumns, Columns, ImageColumns, Names
from detrlib.data.formats import open_content
from detrlib.errors import DataError, RunError
from detrlib.files import damage, one_at_a_time, write_checkpoint

logger = logging.getLogger(__name__)

VERSION = 1  # of an index: raise it with every change of what is kept, or of what is checked
LEAST = 2**22  # bytes


def read_columns(annotations: Path) -> Columns:
    """Read the annotations of a split, checked and complete, from the index or else from the file.

    Args:
        annotations: as `find_split` gives them.

    Raises:
        DataError: as `read_annotations`.
    """
    # A list of Pascal VOC's (.txt) says where the annotations are, and stays as it is where they change.
    if not annotations.is_file() or annotations.suffix == ".txt" or annotations.stat().st_size < LEAST:
        return _read(annotations)
    with open_content(annotations) as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    index = cache_folder() / "annotations" / f"v{VERSION}-{digest}.pt"
    if (known := _load(index)) is not None:
        return known
    try:
        with one_at_a_time(index):  # of the processes of a training, one reads and the others wait
            if (known := _load(index)) is None:
                known = _read(annotations)
                write_checkpoint(index, _state(known))
                known = _load(index) or known  # now shared with the others
    except (OSError, RunError) as error:  # a cache that cannot be written is no reason not to train
        logger.warning("every process reads %s anew: %s", annotations, error)
        known = known or _read(annotations)
    return known


def _read(annotations: Path) -> Columns:
    try:
        with open_content(annotations) as file:
            return read_blocks(file)
    except Twice as twice:
        raise DataError(f"{annotations}: {twice}; make one list of them") from None
    except OddFile as odd:
        logger.debug("%s is read entry by entry: %s", annotations, odd)
        return Columns.of(read_annotations(annotations))


def _state(columns: Columns) -> dict:
    """Columns as `torch.save` keeps them without code."""
    images, boxes, rest = columns
    kept = {"names": images.names._asdict(), "ids": images.ids, "sizes": images.sizes}
    return {"images": kept, "boxes": boxes._asdict(), "rest": to_json(rest).decode()}


def _load(index: Path) -> Columns | None:
    """What an index holds, mapped into memory; None: there is none, or it is damaged."""
    try:
        if fault := damage(index):
            raise OSError(fault)
        state = torch.load(index, map_location="cpu", mmap=True, weights_only=True)
        images = state["images"] | {"names": Names(**state["images"]["names"])}
        return Columns(ImageColumns(**images), BoxColumns(**state["boxes"]), from_json(state["rest"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # torch has many for a file that is none of its own
        logger.warning("%s is damaged and is made anew (%s)", index, error)
        return None
