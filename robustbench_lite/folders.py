"""Folders of images: a sub-folder a class, PNG and JPEG, all of one size."""

import os
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = {".png", ".jpg", ".jpeg"}


def read(root: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Pixels (N, C, H, W), labels (N,) and the number of classes.

    Classes are numbered as their names sort. The first image of each class comes first, then the second of each, and so
    on, so that the first few are a fair sample. Where ``root`` has a sub-folder ``test`` the classes are in there, and
    those of the training split in ``train``. Images are grey if all of them are, else RGB; transparency is dropped.

    Raises:
        ValueError: for a file that is no image, of another size, or outside of the folder; and where there is none.
    """
    folder = root / split if (root / "test").is_dir() else root
    if split == "train" and folder == root:
        raise ValueError(f"{_shown(root)} has no training split; put the classes into its sub-folders train and test")
    if not folder.is_dir():
        raise ValueError(f"no folder {_shown(folder)}")
    classes = sorted(path for path in _within(folder, folder) if path.is_dir())
    if len(classes) < 2:
        raise ValueError(f"{_shown(folder)} has {len(classes)} sub-folders; give one a class, of two or more")
    files = [[(file, label) for file in _files(one, folder)] for label, one in enumerate(classes)]
    turns = [one for one in chain.from_iterable(zip_longest(*files)) if one is not None]
    images = [_pixels(file) for file, _ in turns]
    for (file, _), image in zip(turns, images):
        if image.shape[:2] != images[0].shape[:2]:
            sizes = [f"{width}x{height}" for height, width in (image.shape[:2], images[0].shape[:2])]
            raise ValueError(f"{_shown(file)} has {sizes[0]} pixels, but {_shown(turns[0][0])} has {sizes[1]}")
    channels = max(image.shape[2] for image in images)
    x = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    return x.transpose(0, 3, 1, 2), np.array([label for _, label in turns]), len(classes)


def _within(folder: Path, root: Path) -> Iterator[Path]:
    """What a folder holds, but for hidden files; links may not lead out of ``root``."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
                raise ValueError(f"{_shown(path)} leads out of {_shown(root)}")
            yield path


def _files(folder: Path, root: Path) -> list[Path]:
    files = sorted(_within(folder, root))
    if not files:
        raise ValueError(f"{_shown(folder)} has no images")
    for file in files:
        if file.suffix.lower() not in KINDS or not file.is_file():
            raise ValueError(f"{_shown(file)} is no PNG or JPEG file")
    return files


def _pixels(file: Path) -> NDArray[Any]:
    """(H, W, 1) or (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel")
            grey = image.mode in ("1", "L", "LA")
            return np.asarray(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, -1)
    except Exception as error:  # a damaged image raises anything
        raise ValueError(f"{_shown(file)} cannot be read: {' '.join(str(error).split())}") from None


def _shown(path: Path) -> str:
    """A name with what a terminal would take for a command, or could not print, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))
