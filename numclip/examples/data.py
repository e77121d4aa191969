"""The data sets of the training programs: scikit-learn's digits, and MNIST's IDX files."""

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

DIGITS_TRAINING = 1500
CLASSES = 10
UNSIGNED_BYTE = 0x08  # the IDX format's code for the only element type MNIST uses

Float32Array = npt.NDArray[np.float32]


class DataError(ValueError):
    """A data file that is missing or does not hold what its name says."""


@dataclass(frozen=True)
class Images:
    """Images as rows of float32 pixels in [0, 1], and their labels 0 to 9."""

    pixels: Float32Array
    labels: npt.NDArray[np.intp]

    def batches(self, size: int) -> Iterator[tuple[Float32Array, Float32Array]]:
        """Yield the pixels and one-hot labels of full batches, in order."""
        one_hot = np.eye(CLASSES, dtype=np.float32)
        for stop in range(size, len(self.labels) + 1, size):
            rows = slice(stop - size, stop)
            yield self.pixels[rows], one_hot[self.labels[rows]]


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: a training and a test set, in file order."""

    name: str
    training: Images
    test: Images


def load_digits() -> Digits:
    """Read scikit-learn's 1797 digits of 8 x 8 pixels: 1500 to train with, the rest to test."""
    from sklearn.datasets import load_digits as bundled_digits

    grey_levels, labels = bundled_digits(return_X_y=True)
    pixels = np.asarray(grey_levels / 16, dtype=np.float32)
    labels = np.asarray(labels, dtype=np.intp)
    n = DIGITS_TRAINING
    return Digits(
        name="scikit-learn's digits",
        training=Images(pixels[:n], labels[:n]),
        test=Images(pixels[n:], labels[n:]),
    )


def load_mnist(folder: Path) -> Digits:
    """Read MNIST's four IDX files, each plain or compressed by gzip.

    Parameters
    ----------
    folder : Path
        Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
        ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, or the same names
        with a dot (``train-images.idx3-ubyte``); ``.gz`` may follow any of them.

    Returns
    -------
    Digits
        The pixels divided by 255.

    Raises
    ------
    DataError
        If the folder or a file is missing, cannot be read, or has the wrong content.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with MNIST's IDX files, found none")
    training, test = _read_images(folder, "train"), _read_images(folder, "t10k")
    if training.pixels.shape[1] != test.pixels.shape[1]:
        raise DataError(
            f"{folder}: expected training and test images of one size, "
            f"got {training.pixels.shape[1]} and {test.pixels.shape[1]} pixels"
        )
    return Digits(name=f"MNIST in {folder}", training=training, test=test)


def read_idx(path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes with ``ndim`` dimensions, compressed or not.

    The file is: two zero bytes, the element type, the number of dimensions, each dimension
    as a big-endian 32-bit integer, then the elements in C order.
    """
    content = _read_bytes(path)
    magic = bytes([0, 0, UNSIGNED_BYTE, ndim])
    if content[:4] != magic:
        got = content[:4].hex() or "nothing"
        raise DataError(f"{path}: expected magic number {magic.hex()}, got {got}")
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{path}: expected a header of {start} bytes, got {len(content)}")
    shape = [int(n) for n in np.frombuffer(content, dtype=">u4", count=ndim, offset=4)]
    expected = start + math.prod(shape)
    if len(content) != expected:
        sizes = " x ".join(map(str, shape))
        raise DataError(f"{path}: expected {expected} bytes for {sizes}, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_images(folder: Path, prefix: str) -> Images:
    images_path = _find(folder, f"{prefix}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if images.size == 0:
        raise DataError(f"{images_path}: expected images, got none")
    if len(labels) != len(images):
        raise DataError(f"{labels_path}: expected {len(images)} labels, got {len(labels)}")
    if labels.max() >= CLASSES:
        raise DataError(f"{labels_path}: expected labels 0 to 9, got {labels.max()}")
    pixels = images.reshape(len(images), -1).astype(np.float32)
    pixels /= 255
    return Images(pixels, labels.astype(np.intp))


def _find(folder: Path, stem: str, kind: str) -> Path:
    for name in (f"{stem}-{kind}", f"{stem}.{kind}"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{folder}: expected a file {stem}-{kind} or {stem}-{kind}.gz, found none")


def _read_bytes(path: Path) -> bytes:
    """Read a file; decompress it if it begins with gzip's two bytes, whatever its name."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from error
