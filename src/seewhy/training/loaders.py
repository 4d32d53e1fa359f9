"""ImageSet x Split -> batches to train and validate on: stored features, or images decoded now, in an order of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from seewhy.config import TrainConfig
from seewhy.core import distributed
from seewhy.curation.split import Split
from seewhy.data.decode import read_image
from seewhy.data.image_set import ImageSet
from seewhy.errors import ConfigError
from seewhy.models.backbones import Backbone
from seewhy.models.features import Features, FeatureSpec, extract_features, feature_shape, render_view
from seewhy.models.transforms import FIRST_RANDOM_VIEW, Preprocessing
from seewhy.models.trunk_tail import TrunkTail

VIEWS_A_SEED = 1_000_000  # fresh views of different seeds never meet

Batch = tuple[Tensor, Tensor]


class EpochBatches(Sampler[list[int]]):
    """Batches of positions epoch * n + i in an order that seed and epoch alone decide; Lightning calls set_epoch.

    Of processes that train together, each takes its share of every batch, so that all of them make the steps that one alone would.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, size: int = 1) -> None:
        self.n, self.batch_size, self.seed, self.rank, self.size = n, batch_size, seed, rank, size
        # A share of one has no variance for BatchNorm to divide by; these images have their turn in the next epoch.
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
    """Positions epoch * n + i -> a batch of stored features; each epoch takes the next view of each image."""

    def __init__(self, features: Features, labels: npt.NDArray[np.int64]) -> None:
        self.features = features
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """(B, *shape) float32 and (B,) int64, gathered in one go."""
        epoch, image = np.divmod(np.asarray(positions), len(self.labels))
        views = (image + epoch) % self.features.rows.shape[1]
        return torch.from_numpy(self.features.get(image, views)), torch.from_numpy(self.labels[image])


class ImageViews(Dataset[Batch]):
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
                read_image(self.images.paths[i], self.preprocessing.min_decode_side), view, self.images.hashes[i], self.preprocessing
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
        image = torch.from_numpy(square.copy()).permute(2, 0, 1)
        augmented: npt.NDArray[np.uint8] = v2.RandAugment()(image).permute(1, 2, 0).numpy()
    return augmented


def _as_is(batch: Any) -> Any:
    """The datasets above return whole batches already."""
    return batch


def make_loader(dataset: CachedViews | ImageViews, batch_size: int, seed: int | None, workers: int) -> DataLoader[Batch]:
    """Shuffled by `seed` and epoch; in order where seed is None. Stored features need no worker processes."""
    count = workers if isinstance(dataset, ImageViews) else 0
    batches: Any
    if seed is not None:
        batches = EpochBatches(len(dataset), batch_size, seed, distributed.rank(), distributed.world_size())
    else:
        mine = distributed.shard(range(len(dataset)))
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=count, collate_fn=_as_is, persistent_workers=count > 0)


def trains_on_features(cut: TrunkTail, config: TrainConfig) -> bool:
    """Whether something is frozen and its features can be kept: views are fixed, and there is a cache."""
    return cut.trunk is not None and not config.fresh_views and config.cache


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a fit reads: data sets to train and to validate on, (N,) labels of the one to train on, and the number of classes."""

    train: CachedViews | ImageViews
    val: CachedViews | ImageViews
    labels: npt.NDArray[np.int64]
    classes: int


def training_data(images: ImageSet, split: Split, backbone: Backbone, cut: TrunkTail, config: TrainConfig) -> TrainingData:
    """Stored features where something is frozen and views are fixed, images otherwise.

    Raises ConfigError where mixup=cutmix would have no maps of (channels, height, width) to cut pieces from.
    """
    preprocessing, labels, classes = backbone.preprocessing, images.labels[split.train], len(images.classes)
    if config.mixup == "cutmix" and cut.trunk is not None:
        channels_last = getattr(backbone.model, "output_fmt", "NCHW") == "NHWC"
        if len(feature_shape(cut.trunk, preprocessing)) != 3 or channels_last:
            raise ConfigError(
                f"mixup=cutmix cuts pieces of maps, and {backbone.name} has none behind its trunk; use mixup=mixup, or --unfreeze all"
            )
    if not trains_on_features(cut, config):
        views = 0 if config.fresh_views else config.views
        train_data = ImageViews(images, split.train, preprocessing, views, config.seed, config.augment)
        return TrainingData(train_data, ImageViews(images, split.val, preprocessing, 1, config.seed, "standard"), labels, classes)
    spec = FeatureSpec.of(config, distributed=True)
    train_features = extract_features(images, split.train, config.views, cut, preprocessing, spec)
    # Test features are computed here too: one pass over the images, one export of the trunk.
    rest = extract_features(images, np.concatenate([split.val, split.test]), 2 if config.tta_flip else 1, cut, preprocessing, spec)
    val_features = Features(rest.store, rest.rows[: len(split.val), :1], rest.computed)  # the fit watches the plain view
    return TrainingData(CachedViews(train_features, labels), CachedViews(val_features, images.labels[split.val]), labels, classes)
