from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_lite.data import load


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)


def write(file: Path, image: np.ndarray) -> Path:
    """A PNG of pixels (C, H, W) or (H, W)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0)).save(file)
    return file


@pytest.fixture
def photos(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Three classes of 3, 1 and 3 images; written so that neither time nor the file system sorts them."""
    places = {"dog/b.png": 4, "cat/9.png": 2, "eel/c.PNG": 6, "dog/.hidden": 0, "cat/1.png": 0, "eel/b.png": 5}
    for name, at in (places | {"cat/10.png": 1, "eel/a.png": 3}).items():
        write(tmp_path / "photos" / name, pixels[at]) if "hidden" not in name else None
    (tmp_path / "photos/dog/.hidden").write_text("no image")
    return tmp_path / "photos"


def test_a_folder_has_the_rows_of_the_npz_of_the_same_pixels(photos: Path, pixels: np.ndarray):
    order, labels = [0, 4, 3, 1, 5, 2, 6], [0, 1, 2, 0, 2, 0, 2]  # one of each class in turn, by name
    np.savez(photos.parent / "same.npz", x=pixels[order], y=labels)
    found, same = load(f"folder:{photos}"), load(f"npz:{photos.parent / 'same.npz'}")
    assert torch.equal(found.x, same.x)
    assert torch.equal(found.y, same.y)
    assert (found.classes, found.fingerprint) == (3, same.fingerprint)


def test_a_pixel_changes_the_fingerprint_and_a_copy_elsewhere_does_not(photos: Path, pixels: np.ndarray):
    before = load(f"folder:{photos}").fingerprint
    moved = photos.rename(photos.parent / "moved")
    assert load(f"folder:{moved}").fingerprint == before
    write(moved / "dog/b.png", pixels[4] ^ (np.arange(20).reshape(5, 4) == 7).astype(np.uint8))
    assert load(f"folder:{moved}").fingerprint != before


def test_splits_are_sub_folders(tmp_path: Path, pixels: np.ndarray):
    for at, place in enumerate(["train/a/1.png", "train/b/1.png", "train/b/2.png", "test/a/1.png", "test/b/1.png"]):
        write(tmp_path / place, pixels[at])
    assert load(f"folder:{tmp_path}", "train").y.tolist() == [0, 1, 1]
    assert torch.equal(load(f"folder:{tmp_path}").x[1], torch.from_numpy(pixels[4]) / 255)


def test_grey_images_have_one_channel_unless_others_have_three(tmp_path: Path, pixels: np.ndarray):
    grey = [write(tmp_path / f"{name}/1.png", pixels[at, 0]) for at, name in enumerate("ab")]
    found = load(f"folder:{tmp_path}")
    assert torch.equal(found.x, torch.from_numpy(pixels[:2, :1]) / 255)
    write(grey[0].with_name("2.png"), pixels[2])
    mixed = load(f"folder:{tmp_path}")
    assert torch.equal(mixed.x[:2], found.x.expand(2, 3, 5, 4))
    assert mixed.shape == (3, 5, 4)


def test_jpeg_is_read(tmp_path: Path):
    for name in ("a/1.JPG", "b/1.jpeg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / name, "jpeg")
    assert load(f"folder:{tmp_path}").x[0, 0].min() > 0.95


def outside(photos: Path) -> None:
    write(photos.parent / "secret.png", np.zeros((5, 4), np.uint8))
    (photos / "dog/z.png").symlink_to(photos.parent / "secret.png")


def loop(photos: Path) -> None:
    (photos / "dog/z.png").symlink_to(photos / "dog/z.png")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda p: write(p / "dog/z.png", np.zeros((6, 4), np.uint8)), "dog/z.png has 4x6 pixels, but .*1.png has 4x5"),
        (lambda p: (p / "dog/z.png").write_bytes(b"\x89PNG"), "dog/z.png cannot be read"),
        (lambda p: (p / "dog/z.webp").write_bytes(b""), "dog/z.webp is no PNG or JPEG file"),
        (lambda p: (p / "dog/z.png").mkdir(), "dog/z.png is no PNG or JPEG file"),
        (lambda p: (p / "fox").mkdir(), "fox has no images"),
        (lambda p: (p / "dog/\x1b[31m\n.txt").write_text(""), r"dog/\\x1b\[31m\\n.txt is no PNG"),
        (lambda p: Image.new("I;16", (4, 5)).save(p / "dog/z.png"), "more than 8 bits"),
        (lambda p: p.rename(p.with_name("gone")), "no folder"),
        (outside, "dog/z.png leads out of"),
        (loop, "dog/z.png is no PNG or JPEG file"),
    ],
    ids=["size", "damaged", "format", "folder", "empty", "escape", "deep", "gone", "link", "loop"],
)
def test_what_is_wrong_is_named_in_one_line(photos: Path, spoil: Callable[[Path], object], complaint: str):
    spoil(photos)
    with pytest.raises(ValueError, match=complaint) as caught:
        load(f"folder:{photos}")
    assert str(caught.value).isprintable()


def test_a_folder_without_classes_or_a_training_split_is_refused(photos: Path):
    with pytest.raises(ValueError, match="has 0 sub-folders"):
        load(f"folder:{photos / 'dog'}")
    with pytest.raises(ValueError, match="has no training split"):
        load(f"folder:{photos}", "train")
