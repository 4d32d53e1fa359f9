"""ImageSet -> vectors that say what its pictures show, by the network that comes with the package, whatever else is trained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from seewhy.backbones import create_backbone
from seewhy.cutting import cut_backbone
from seewhy.features import FeatureSpec, extract_features
from seewhy.images import ImageSet

EMBEDDER = "efficientnet_lite0"


def embed(images: ImageSet, indices: npt.NDArray[np.int64] | None = None, workers: int = 2, keep: bool = True) -> npt.NDArray[np.float32]:
    """(N, 1280) pooled features of the pictures (or of those at `indices`); what the cache holds is not computed again.

    keep: whether to leave them in the cache.

    They are the features that `--backbone efficientnet_lite0 --unfreeze 0` trains on, so such a run finds them ready.
    """
    chosen = np.arange(len(images)) if indices is None else indices
    backbone = create_backbone(EMBEDDER, 2)
    cut = cut_backbone(backbone, 0)
    spec = FeatureSpec(workers=workers, cache=keep, distributed=keep)
    features = extract_features(images, chosen, 1, cut, backbone.preprocessing, spec)
    return features.get(np.arange(len(chosen)))
