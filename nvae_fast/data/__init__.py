"""Images in, batches out: `open_images` reads, `make_loader` batches, `check_size` refuses what no model fits."""

from .base import ImageSource
from .loader import Loader, make_loader
from .sources import DATASETS, Dataset, open_images
from .transforms import MAX_SIDE, check_size

__all__ = ["DATASETS", "MAX_SIDE", "Dataset", "ImageSource", "Loader", "check_size", "make_loader", "open_images"]
