"""Load batches to train and validate on: cached features or decoded images, in an order that seed and epoch determine."""

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
from seewhy.evaluation.evaluate import Evaluation, evaluate_part
from seewhy.models.backbones import Backbone, create_backbone
from seewhy.models.features import Features, FeatureSpec, extract_features, feature_shape, render_view
from seewhy.models.transforms import FIRST_RANDOM_VIEW, Preprocessing
from seewhy.models.trunk_tail import TrunkTail, split_backbone

VIEWS_PER_SEED = 1_000_000  # keeps the random views of different seeds apart

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class TrainingContext:
    """What the stages of a training share: images, their split, the network with its trunk and tail, and the resolved config."""

    images: ImageSet
    split: Split
    backbone: Backbone
    cut: TrunkTail
    config: TrainConfig

    @staticmethod
    def create(images: ImageSet, split: Split, config: TrainConfig) -> TrainingContext:
        """Create the network of a resolved config and freeze its trunk."""
        backbone = create_backbone(config.backbone, len(images.classes), config.weights, config.seed, config.resize, config.size)
        return TrainingContext(images, split, backbone, split_backbone(backbone, config.unfreeze), config)

    def evaluate(self, part: str) -> Evaluation:
        """Evaluate the network as it is on 'train', 'val' or 'test', uncalibrated."""
        return evaluate_part(self.images, self.split.part(part), part, self.backbone, self.cut, self.config, self.split.groups)


class EpochBatches(Sampler[list[int]]):
    """Batches of positions epoch * n + i, shuffled by seed and epoch; Lightning calls set_epoch.

    Process `rank` of `size` takes its share of every batch, so that several processes make the same steps as one.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, size: int = 1) -> None:
        self.n, self.batch_size, self.seed, self.rank, self.size = n, batch_size, seed, rank, size
        # BatchNorm needs two images a process; those of a shorter last batch are left out in this epoch.
        short = 0 < n % batch_size < 2 * size
        self.count = n // batch_size if short and n > batch_size else -(-n // batch_size)
        self.epoch = 0
        self.sampler = self  # on which Lightning calls set_epoch

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


@dataclass(eq=False)
class CachedViews(Dataset[Batch]):
    """Stored features by positions epoch * n + i; each epoch takes the next view of each image. labels: (n,)."""

    features: Features
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """(B, *shape) float32 features and (B,) int64 labels."""
        epoch, image = np.divmod(np.asarray(positions), len(self.labels))
        views = (image + epoch) % self.features.rows.shape[1]
        return torch.from_numpy(self.features.get(image, views)), torch.from_numpy(self.labels[image])


@dataclass(eq=False)
class ImageViews(Dataset[Batch]):
    """Decoded images by positions epoch * n + i.

    views: the number of views to alternate, as in CachedViews; 0: a new random view every epoch.
    """

    images: ImageSet
    indices: npt.NDArray[np.int64]
    preprocessing: Preprocessing
    views: int
    seed: int
    augment: str

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """(B, size, size, 3) uint8 pixels and (B,) int64 labels."""
        batch, labels = [], []
        for position in positions:
            epoch, n = divmod(position, len(self.indices))
            i = int(self.indices[n])
            view = (n + epoch) % self.views if self.views else FIRST_RANDOM_VIEW + self.seed * VIEWS_PER_SEED + epoch
            image = read_image(self.images.paths[i], self.preprocessing.min_decode_side)
            pixels = render_view(image, view, self.images.hashes[i], self.preprocessing)
            if self.augment == "randaugment":
                pixels = _randaugment(pixels, int(self.images.hashes[i][:12], 16) + view)
            batch.append(pixels)
            labels.append(int(self.images.labels[i]))
        return torch.from_numpy(np.stack(batch)), torch.tensor(labels)


def _randaugment(pixels: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint8]:
    """torchvision's RandAugment (two operations, magnitude 9), seeded."""
    from torchvision.transforms import v2  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        augmented: npt.NDArray[np.uint8] = v2.RandAugment()(image).permute(1, 2, 0).numpy()
    return augmented


def _identity(batch: Any) -> Any:
    """Collate function for datasets that return whole batches; a lambda cannot be pickled for worker processes."""
    return batch


def make_loader(dataset: CachedViews | ImageViews, batch_size: int, seed: int | None, workers: int) -> DataLoader[Batch]:
    """Make a loader that shuffles by `seed` and epoch, or keeps the order if seed is None. workers: processes that decode images."""
    workers = workers if isinstance(dataset, ImageViews) else 0
    batches: Any
    if seed is not None:
        batches = EpochBatches(len(dataset), batch_size, seed, distributed.rank(), distributed.world_size())
    else:
        mine = distributed.shard(range(len(dataset)))
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_identity, persistent_workers=workers > 0)


def trains_on_features(cut: TrunkTail, config: TrainConfig) -> bool:
    """Whether training reads cached features: there is a trunk, views are fixed and the cache is on."""
    return cut.trunk is not None and not config.fresh_views and config.cache


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Datasets of a fit, the (N,) labels of `train`, and the number of classes."""

    train: CachedViews | ImageViews
    val: CachedViews | ImageViews
    labels: npt.NDArray[np.int64]
    classes: int


def training_data(context: TrainingContext) -> TrainingData:
    """Make the datasets, of features if `trains_on_features`, which are computed here, else of images.

    Raises ConfigError if mixup=cutmix and the trunk's features are not (channels, height, width).
    """
    images, split, cut, config = context.images, context.split, context.cut, context.config
    preprocessing, labels, classes = context.backbone.preprocessing, images.labels[split.train], len(images.classes)
    if config.mixup == "cutmix" and cut.trunk is not None:
        channels_last = getattr(context.backbone.model, "output_fmt", "NCHW") == "NHWC"
        if len(feature_shape(cut.trunk, preprocessing)) != 3 or channels_last:
            raise ConfigError(
                f"mixup=cutmix needs feature maps, which the trunk of {config.backbone} does not give; use mixup=mixup, or --unfreeze all"
            )
    if not trains_on_features(cut, config):
        views = 0 if config.fresh_views else config.views
        train_data = ImageViews(images, split.train, preprocessing, views, config.seed, config.augment)
        return TrainingData(train_data, ImageViews(images, split.val, preprocessing, 1, config.seed, "standard"), labels, classes)
    spec = FeatureSpec.of(config, distributed=True)
    train_features = extract_features(images, split.train, config.views, cut, preprocessing, spec)
    # With test, so that its features, too, are computed in this pass.
    rest = extract_features(images, np.concatenate([split.val, split.test]), 2 if config.tta_flip else 1, cut, preprocessing, spec)
    val_features = Features(rest.store, rest.rows[: len(split.val), :1], rest.computed)  # the unflipped view
    return TrainingData(CachedViews(train_features, labels), CachedViews(val_features, images.labels[split.val]), labels, classes)
