"""Every picture of a data set decoded once, before training: what cannot be read is named at once, all of it.

What was found is remembered by size and time of each file, so that another start, of any run, need not decode again.
200 photographs took 0.8 seconds of one core (AMD EPYC), so those of COCO should take some 8 minutes of it.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
from tqdm.auto import tqdm

from detrlib.config.machine import cache_folder, cores
from detrlib.data.coco import CocoDataset
from detrlib.data.decoding import (
    UNREADABLE,
    depth_of,
    open_picture,
    orientation_of,
    read_picture,
    to_rgb,
    why_unreadable,
)
from detrlib.data.pictures import unreadable
from detrlib.errors import DataError, RunError
from detrlib.files import write_atomic

logger = logging.getLogger(__name__)

VERSION = 1  # of what is remembered: raise it with every change of what is found in a file
SECONDS = 30  # between two lines of a log that shows no bar
SHOWN = 8  # faults in a message; more are written to a file
FACTS = {  # of a picture, and their types
    **{"bytes": "int64", "modified": "int64", "decoded": "bool", "fault": "str", "width": "int64", "height": "int64"},
    **{"orientation": "int64", "truncated": "bool", "depth": "int64", "brightest": "int64", "digest": "str"},
}


def check_pictures(
    splits: Mapping[str, CocoDataset], level: Literal["all", "headers"] = "all"
) -> dict[str, pd.DataFrame]:
    """Look into every picture of several data sets.

    Args:
        splits: data sets by the names of their splits.
        level: "all" decodes the pictures; "headers" finds files that are none, or of another size than annotated.

    Returns:
        For each split a row per picture, in order of the data set: file, width and height in pixels as stored,
        orientation in EXIF (1 to 8), and where it was decoded truncated, depth in bits (see `depth_of`), brightest
        pixel in 0..255 and digest, which pictures of the same pixels have in common.

    Raises:
        DataError: pictures cannot be read, or are of another size than annotated; names all of them.
    """
    found, faults = {}, {}
    for split, dataset in splits.items():
        found[split] = _facts(dataset, level == "all")
        faults |= _faults(dataset, found[split])
    if faults:
        raise DataError(_message(faults, splits))
    return found


def _facts(dataset: CocoDataset, decode: bool) -> pd.DataFrame:
    """What is known of each picture, remembered or found now."""
    memory = cache_folder() / "pictures" / f"v{VERSION}-{_hash(str(dataset.images_path.absolute()))}.parquet"
    known = _remembered(memory)
    names = dataset.file_names
    stats = {name: path.stat() for name, path in zip(names, dataset.files, strict=True)}
    done = zip(known.index, known["bytes"], known["modified"], known["decoded"], strict=True)
    valid = {(name, size, time) for name, size, time, decoded in done if decoded or not decode}
    missing = [name for name, own in stats.items() if (name, own.st_size, own.st_mtime_ns) not in valid]
    rows = []
    try:
        for name, facts in _examined(dataset.images_path, missing, decode):
            rows.append({"file": name, "bytes": stats[name].st_size, "modified": stats[name].st_mtime_ns} | facts)
    finally:  # what was done is not done again after an interruption
        if rows:
            new = pd.DataFrame(rows).set_index("file")
            known = pd.concat([known.drop(index=new.index, errors="ignore"), new]).astype(FACTS)
            _remember(memory, known)
    return known.loc[names].reset_index()


def _remembered(path: Path) -> pd.DataFrame:
    if path.exists():
        try:
            return pd.read_parquet(path, page_checksum_verification=True).astype(FACTS)
        except Exception as error:  # pyarrow has many
            logger.warning("%s is damaged and is made anew (%s)", path, error)
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in FACTS.items()}, index=pd.Index([], name="file"))


def _remember(path: Path, table: pd.DataFrame) -> None:
    try:
        write_atomic(path, partial(table.to_parquet, write_page_checksum=True))
    except RunError as error:  # a cache that cannot be written is no reason not to train
        logger.warning("pictures will be decoded again at the next start: %s", error)


def _examined(folder: Path, names: list[str], decode: bool) -> Iterator[tuple[str, dict]]:
    """Names with what is found in their files, by all cores: Pillow decodes outside of Python's lock."""
    if not names:
        return
    if decode:
        logger.info("decoding %d pictures of %s once, before training (data.check)", len(names), folder)
    with ThreadPoolExecutor(cores()) as pool:
        try:
            futures = {pool.submit(_examine, folder / name, decode): name for name in names}
            for future in _reported(as_completed(futures), len(futures)):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _examine(path: Path, decode: bool) -> dict:
    facts = {name: 0 if kind == "int64" else "" if kind == "str" else False for name, kind in FACTS.items()}
    facts |= {"decoded": decode}
    del facts["bytes"], facts["modified"]
    try:
        with open_picture(path) as file:
            facts |= {"width": file.width, "height": file.height, "orientation": orientation_of(file)}
            try:
                image = to_rgb(file) if decode else None
                facts["depth"] = depth_of(file) if decode else 0
            except OSError:
                image, _ = read_picture(path, truncated=True)  # raises for what is no JPEG
                facts |= {"truncated": True, "depth": 8}
        if decode:
            facts["brightest"] = max(high for _, high in image.getextrema())
            facts["digest"] = _hash(str(image.size), image.tobytes())
    except UNREADABLE as error:
        facts["fault"] = why_unreadable(error)
    return facts


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _reported(done: Iterable, total: int) -> Iterator:
    """`done` with a bar, or, in a log, a line now and then."""
    start = said = time.monotonic()
    with tqdm(done, total=total, desc="decoding pictures", unit="picture", leave=False, disable=None) as bar:
        for number, one in enumerate(bar, 1):
            yield one
            now = time.monotonic()
            if bar.disable and now - said > SECONDS:
                said, left = now, (now - start) / number * (total - number)
                logger.info("%d of %d pictures decoded, about %.0f min left", number, total, left / 60)


def _faults(dataset: CocoDataset, found: pd.DataFrame) -> dict[str, str]:
    """{file: why} of the pictures that cannot be used."""
    faults = {}
    for index, (file, row) in enumerate(zip(dataset.files, found.itertuples(), strict=True)):
        size = (row.height, row.width) if dataset.upright and row.orientation >= 5 else (row.width, row.height)
        why = row.fault or ("cut short" if row.truncated and not dataset.truncated else None)
        if why := why or dataset.size_fault(index, *size):
            faults[str(file)] = why
    return faults


def _message(faults: Mapping[str, str], splits: Mapping[str, CocoDataset]) -> str:
    """One line on all faults; where they are many, the rest of them stand in a file that is named."""
    said = f"pictures of {' and '.join(splits)} cannot be used, {len(faults)}: {unreadable(faults)}"
    if len(faults) > SHOWN:
        path = cache_folder() / "pictures" / f"faults-{_hash(*faults)}.txt"
        text = "".join(f"{name}: {why}\n" for name, why in faults.items())
        try:
            write_atomic(path, lambda temporary: temporary.write_text(text))
            said += f" (all of them in {path})"
        except RunError:  # the faults are what matters
            said += f" (no list of all of them could be written to {path})"
    cut = "; data.truncated: accept reads JPEG files that are cut short" if "cut short" in faults.values() else ""
    return f"{said}; replace them, or remove their entries{cut}"
