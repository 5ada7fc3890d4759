"""What a person should know of his data before a model learns from it: counts, and what would otherwise be silent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch

from detrlib.data.check import check_pictures
from detrlib.data.coco import CocoDataset
from detrlib.errors import listed

FEW = 20  # boxes, with fewer of which a class is hardly learned
DARK = 64  # of 255: a picture without a brighter pixel is likely of another range than it says
LINES = 12
NAMES = 6  # in a sentence


@dataclass(frozen=True)
class Findings:
    """Data sets of several splits before training.

    counts     objects (no crowds) of each class, a row each, in each split, a column each
    images     of each split
    sentences  what is unusual, the gravest first
    """

    counts: pd.DataFrame
    images: dict[str, int]
    sentences: list[str]

    @property
    def lines(self) -> list[str]:
        """All there is to say, counts first."""
        splits = ", ".join(
            f"{name} {self.images[name]} images {self.counts[name].sum()} objects" for name in self.images
        )
        most = self.counts.sort_values(list(self.counts), ascending=False, kind="stable")
        rows = [f"{name} {' / '.join(map(str, row))}" for name, row in zip(most.index, most.to_numpy(), strict=True)]
        return [f"data: {splits}", f"objects by class ({' / '.join(self.counts)}): {listed(rows)}", *self.sentences]

    def __str__(self) -> str:
        """At most `LINES` lines."""
        lines = self.lines
        if len(lines) > LINES:
            lines = [*lines[: LINES - 1], f"and {len(lines) - LINES + 1} more: detrlib check CONFIG"]
        return "\n    ".join(lines)


def look_over(
    splits: Mapping[str, CocoDataset], num_queries: int | None = None, check: Literal["all", "headers", "none"] = "all"
) -> Findings:
    """Look over data sets before training; all pictures are decoded once, see `check_pictures`.

    Args:
        splits: data sets by the names of their splits, the training split first; they share one list of classes.
        num_queries: of the model; None: not compared.
        check: "all" decodes the pictures, "headers" reads what stands before the pixels, "none" does neither.

    Returns:
        Counts, and sentences on: classes with few or no objects, more objects than queries, boxes that were cut or left
        out, pictures with an orientation, cut short, nearly black, of several depths, or in both splits.

    Raises:
        DataError: pictures cannot be read, or are of another size than annotated.
    """
    pictures = {} if check == "none" else check_pictures(splits, check)
    train = next(iter(splits.values()))
    counted = {split: torch.bincount(one.labels, minlength=train.num_classes) for split, one in splits.items()}
    index = pd.Index([train.names[label] for label in sorted(train.names)], name="class")
    labels = sorted(train.names)
    counts = pd.DataFrame({split: count[labels].numpy() for split, count in counted.items()}, index=index)
    sentences = [f"{split}: {note}" for split, one in splits.items() for note in one.notes]
    sentences += _of_pictures(splits, pictures) + _of_queries(splits, num_queries) + _of_classes(counts)
    return Findings(counts, {split: len(one) for split, one in splits.items()}, sentences)


def _of_classes(counts: pd.DataFrame) -> list[str]:
    """Classes with few or no objects."""
    first, *others = counts
    sentences = []
    for split in (first, *others):
        known = counts[counts[first] > 0] if split != first else counts
        if len(absent := known.index[known[split] == 0]):
            why = "they cannot be learned" if split == first else "their AP is not defined"
            sentences.append(f"{split} has no object of {listed(absent, NAMES)}: {why}")
    few = counts[(counts[first] > 0) & (counts[first] < FEW)][first].sort_values()
    if len(few):
        named = listed((f"{name} ({count})" for name, count in few.items()), NAMES)
        sentences.append(f"{first} has fewer than {FEW} objects of {named}: too few to be learned well")
    return sentences


def _of_queries(splits: Mapping[str, CocoDataset], num_queries: int | None) -> list[str]:
    """Images with more objects than a model can find."""
    sentences = []
    for split, one in splits.items():
        objects = one.objects_per_image()
        crowded = int((objects > num_queries).sum()) if num_queries else 0
        if crowded:
            sentences.append(
                f"{split}: {crowded} images hold more objects than model.num_queries {num_queries}, up to "
                f"{int(objects.max())}; those beyond cannot be found: raise it"
            )
    return sentences


def _of_pictures(splits: Mapping[str, CocoDataset], pictures: Mapping[str, pd.DataFrame]) -> list[str]:
    """What was seen in the files."""
    sentences = [*_shared(pictures)]
    for split, table in pictures.items():
        turned = table["file"][table["orientation"] > 1]
        if len(turned):
            read = "read as they are stored; if boxes were drawn on what programs show, set data.orientation: exif"
            read = "turned upright (data.orientation: exif)" if splits[split].upright else read
            sentences.append(
                f"{split}: {len(turned)} pictures have an orientation in EXIF ({listed(turned, 2)}), {read}"
            )
        if table["truncated"].any():
            cut = table["file"][table["truncated"]]
            sentences.append(f"{split}: {len(cut)} JPEG files are cut short ({listed(cut, 2)}) and grey at their end")
        dark = table["file"][(table["brightest"] < DARK) & table["decoded"]]
        if len(dark):
            sentences.append(
                f"{split}: {len(dark)} pictures have no pixel above {DARK} of 255 ({listed(dark, 2)}); are they of "
                "another range than their format says? then save them with 8 bits"
            )
        depths = table["depth"][table["decoded"]].value_counts()
        if len(depths) > 1 or 12 in depths:
            named = ", ".join(f"{'0..1' if bits == 1 else f'{bits} bits'} {count}" for bits, count in depths.items())
            sentences.append(f"{split}: pictures are scaled by the range of their pixels: {named}")
    return sentences


def _shared(pictures: Mapping[str, pd.DataFrame]) -> list[str]:
    """Pictures of the same pixels within a split, or in two."""
    sentences = []
    names = list(pictures)
    for number, split in enumerate(names):
        own = pictures[split][pictures[split]["decoded"]]
        for other in names[:number]:
            both = own.merge(pictures[other], on="digest", suffixes=("", "_other")).drop_duplicates("file")
            if len(both[both["decoded_other"]]):
                pairs = listed((f"{row.file} = {row.file_other}" for row in both.itertuples()), 2)
                share = f"{len(both)} of {len(own)} pictures are in {other} too ({pairs})"
                sentences.append(f"{split}: {share}: what is measured on them was learned by heart")
        again = own[own.duplicated("digest")]
        if len(again):
            sentences.append(f"{split}: {len(again)} pictures are there more than once ({listed(again['file'], 2)})")
    return sentences
