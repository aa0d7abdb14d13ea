"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70,000 pictures of clothes, 28 x 28, in ten classes."""

from __future__ import annotations

from os import PathLike

from torch import Tensor

from ce_plugin.datasets.mnist import read_idx

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def fashion_mnist(folder: str | PathLike[str], split: str = "train") -> tuple[Tensor, Tensor]:
    """Read Fashion-MNIST from its four distributed files, compressed or not.

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and the others.
        split: ``"train"``, 60,000 pictures, or ``"test"``, 10,000.

    Returns:
        Pictures (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64, indices of :data:`FASHION_CLASSES`.

    Raises:
        UnknownNameError: an unknown split.
        FileError: a file is missing, damaged, or in another format.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "t10k-images-idx3-ubyte").write_bytes(
        ...         bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(784)
        ...     )
        ...     _ = pathlib.Path(folder, "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 9]))
        ...     images, labels = fashion_mnist(folder, "test")
        >>> images.shape, FASHION_CLASSES[labels[0]]
        (torch.Size([1, 1, 28, 28]), 'Ankle boot')

    Source: arXiv 1708.07747; the format is that of LeCun's MNIST.
    """
    return read_idx(folder, split)
