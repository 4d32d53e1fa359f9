"""ImageSet x Split -> batches to train and validate on: stored features, or pictures decoded now, in an order of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from seewhy import distributed
from seewhy.backbones import Backbone
from seewhy.config import TrainConfig
from seewhy.cutting import Cut
from seewhy.decoding import read_image
from seewhy.features import Features, extract_features, render_view
from seewhy.images import ImageSet
from seewhy.split import Split
from seewhy.transforms import Preprocessing

FIRST_RANDOM_VIEW = 2  # views 0 and 1 are the plain and the mirrored one
VIEWS_A_SEED = 1_000_000  # fresh views of different seeds never meet

Batch = tuple[Tensor, Tensor]


class EpochBatches(Sampler[list[int]]):
    """Batches of positions epoch * n + i in an order that seed and epoch alone decide; Lightning calls set_epoch.

    Of processes that train together, each takes its share of every batch, so that all of them make the steps that one alone would.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, size: int = 1) -> None:
        self.n, self.batch_size, self.seed, self.rank, self.size = n, batch_size, seed, rank, size
        # A share of one has no variance for BatchNorm to divide by; these pictures have their turn in the next epoch.
        short = 0 < n % batch_size < 2 * size
        self.count = n // batch_size if short and n > batch_size else -(-n // batch_size)
        self.epoch = 0
        self.sampler = self  # where Lightning looks for what has to know the epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.n, generator=generator)
        for start in range(0, self.count * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size] + self.epoch * self.n
            yield batch[self.rank :: self.size].tolist()


class CachedViews(Dataset[Batch]):
    """Positions epoch * n + i -> a batch of stored features; each epoch takes the next view of each picture."""

    def __init__(self, features: Features, labels: npt.NDArray[np.int64]) -> None:
        self.features = features
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """(B, *shape) float32 and (B,) int64, gathered in one go."""
        epoch, picture = np.divmod(np.asarray(positions), len(self.labels))
        views = (picture + epoch) % self.features.rows.shape[1]
        return torch.from_numpy(self.features.get(picture, views)), torch.from_numpy(self.labels[picture])


class PictureViews(Dataset[Batch]):
    """Positions epoch * n + i -> a batch of squares (B, size, size, 3) uint8, decoded now.

    views > 0: the same numbered views as CachedViews. views = 0: a new random view every epoch.
    """

    def __init__(
        self, images: ImageSet, indices: npt.NDArray[np.int64], preprocessing: Preprocessing, views: int, seed: int, augment: str
    ) -> None:
        self.images = images
        self.indices = indices
        self.preprocessing = preprocessing
        self.views = views
        self.seed = seed
        self.augment = augment

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        squares, labels = [], []
        for position in positions:
            epoch, n = divmod(position, len(self.indices))
            i = int(self.indices[n])
            fresh = FIRST_RANDOM_VIEW + self.seed * VIEWS_A_SEED + epoch
            view = (n + epoch) % self.views if self.views else fresh
            square = render_view(
                read_image(self.images.paths[i], self.preprocessing.enough), view, self.images.hashes[i], self.preprocessing
            )
            if self.augment == "randaugment":
                square = _randaugment(square, int(self.images.hashes[i][:12], 16) + view)
            squares.append(square)
            labels.append(int(self.images.labels[i]))
        return torch.from_numpy(np.stack(squares)), torch.tensor(labels)


def _randaugment(square: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint8]:
    """torchvision's RandAugment (two operations, magnitude 9), decided by `seed` alone."""
    from torchvision.transforms import v2  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        picture = torch.from_numpy(square.copy()).permute(2, 0, 1)
        augmented: npt.NDArray[np.uint8] = v2.RandAugment()(picture).permute(1, 2, 0).numpy()
    return augmented


def _as_is(batch: Any) -> Any:
    """The datasets above return whole batches already."""
    return batch


def make_loader(dataset: CachedViews | PictureViews, batch_size: int, seed: int | None, workers: int) -> DataLoader[Batch]:
    """Shuffled by `seed` and epoch; in order where seed is None. Stored features need no worker processes."""
    count = workers if isinstance(dataset, PictureViews) else 0
    batches: Any
    if seed is not None:
        batches = EpochBatches(len(dataset), batch_size, seed, distributed.rank(), distributed.world_size())
    else:
        mine = distributed.shard(range(len(dataset)))
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=count, collate_fn=_as_is, persistent_workers=count > 0)


def trains_on_features(cut: Cut, config: TrainConfig) -> bool:
    """Whether something is frozen and its features can be kept: views are fixed, and there is a cache."""
    return cut.trunk is not None and not config.fresh_views and config.cache


def training_data(
    images: ImageSet, split: Split, backbone: Backbone, cut: Cut, config: TrainConfig
) -> tuple[CachedViews | PictureViews, CachedViews | PictureViews]:
    """To train and to validate on: stored features where something is frozen and views are fixed, pictures otherwise."""
    preprocessing, labels = backbone.preprocessing, images.labels
    if not trains_on_features(cut, config):
        views = 0 if config.fresh_views else config.views
        train_data = PictureViews(images, split.train, preprocessing, views, config.seed, config.augment)
        return train_data, PictureViews(images, split.val, preprocessing, 1, config.seed, "standard")
    arguments = (cut, preprocessing, config.engine, config.workers, True, config.feature_dtype, True)
    train_features = extract_features(images, split.train, config.views, *arguments)
    # Test features are computed here too: one pass over the pictures, one export of the trunk.
    rest = extract_features(images, np.concatenate([split.val, split.test]), 2 if config.test_flip else 1, *arguments)
    val_features = Features(rest.store, rest.rows[: len(split.val), :1], rest.computed)  # the fit watches the plain view
    return CachedViews(train_features, labels[split.train]), CachedViews(val_features, labels[split.val])
