"""The fit: schedules and groups by hand, cached equals uncached, best weights restored, resume repeats the uninterrupted fit."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from seewhy.config import TrainConfig, make_config
from seewhy.curation.split import Split, split_images
from seewhy.data.image_set import ImageSet, open_images
from seewhy.errors import ConfigError
from seewhy.models.backbones import Backbone, create_backbone
from seewhy.models.features import Features, FeatureSpec, extract_features
from seewhy.models.trunk_tail import TrunkTail, split_backbone
from seewhy.training import fit as fit_module
from seewhy.training import module
from seewhy.training.fit import FitResult, fit
from seewhy.training.loaders import CachedViews, EpochBatches, ImageViews, TrainingContext, TrainingData, training_data
from seewhy.training.module import FitModule, StandardisedLinear, cosine_with_warmup

Setup = tuple[ImageSet, Split, Backbone, TrunkTail]


def test_cosine_by_hand() -> None:
    # 4 steps of warm-up at 1/5, 2/5, 3/5, 4/5; then half a cosine over the remaining 8.
    assert [cosine_with_warmup(step, 4, 12) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert cosine_with_warmup(4, 4, 12) == 1.0
    assert cosine_with_warmup(8, 4, 12) == pytest.approx(0.5)
    assert cosine_with_warmup(6, 4, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine_with_warmup(12, 4, 12) == pytest.approx(0.0)


def test_parameter_groups_fall_by_stage_and_spare_norms() -> None:
    backbone = create_backbone("resnet18", 3, "none")
    split_backbone(backbone, 2)
    config = make_config(data="x", unfreeze=2, lr=1e-2, weight_decay=0.1, layer_decay=0.5)
    groups = module.parameter_groups(backbone, config.resolved())
    rates = {(group["lr"], group["weight_decay"]): sum(p.numel() for p in group["params"]) for group in groups}
    assert set(rates) == {(1e-2, 0.0), (1e-2, 0.1), (5e-3, 0.0), (5e-3, 0.1), (2.5e-3, 0.0), (2.5e-3, 0.1)}
    assert rates[(1e-2, 0.1)] == 512 * 3
    assert rates[(1e-2, 0.0)] == 3
    layer4 = backbone.model.get_submodule("layer4")
    assert rates[(5e-3, 0.1)] == sum(p.numel() for p in layer4.parameters() if p.ndim > 1)


def test_inverse_size_weights_are_scikit_learns_balanced() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(module.inverse_size_weights(labels, 3).numpy(), expected, rtol=1e-6)


def test_batches_are_a_new_permutation_each_epoch_and_repeat_themselves() -> None:
    batches = EpochBatches(10, 4, seed=3)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(chain(*first)) == list(range(10))
    assert sorted(chain(*second)) == list(range(10, 20))
    assert [[i - 10 for i in batch] for batch in second] != first
    again = EpochBatches(10, 4, seed=3)
    again.set_epoch(1)
    assert list(again) == second


@pytest.mark.parametrize(
    ("n", "size", "steps", "left_out"), [(10, 1, 3, 0), (9, 1, 2, 1), (1, 1, 1, 0), (11, 2, 2, 3), (12, 2, 3, 0), (3, 2, 1, 0)]
)
def test_processes_make_the_steps_of_one(n: int, size: int, steps: int, left_out: int) -> None:
    shares = [list(EpochBatches(n, 4, seed=0, rank=rank, size=size)) for rank in range(size)]
    assert {len(share) for share in shares} == {steps} == {len(EpochBatches(n, 4, 0, 0, size))}
    whole = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
    alone = [sorted(batch) for batch in EpochBatches(n, 4, seed=0)][:steps]
    assert whole == alone
    assert n - len(list(chain(*whole))) == left_out


def test_cached_views_take_turns() -> None:
    # Row 10 n + v holds the number itself: image n, view v.
    rows = np.array([[10 * n + v for v in range(3)] for n in range(4)])
    data = CachedViews(Features(np.arange(40, dtype=np.float32)[:, None], rows, 0), np.arange(4))
    seen = {n: [] for n in range(4)}
    for epoch in range(3):
        values, labels = data.__getitems__([epoch * 4 + n for n in range(4)])
        for value, label in zip(values[:, 0].tolist(), labels.tolist(), strict=True):
            seen[label].append(value - 10 * label)
    assert all(sorted(views) == [0, 1, 2] for views in seen.values())
    assert seen[0] != seen[1]  # not all images show the same view in the same epoch


def test_standardised_linear_folds_into_the_classifier() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    head = StandardisedLinear(linear)
    batches = torch.randn(4, 16, 5) * torch.tensor([1.0, 10, 0.1, 3, 100]) + torch.tensor([0.0, 5, -1, 2, 300])
    head.train()
    for batch in batches:
        head(batch)
    # momentum=None: the plain mean of the batches' means.
    assert head.norm.running_mean is not None
    torch.testing.assert_close(head.norm.running_mean, batches.mean(dim=(0, 1)))
    head.eval()
    expected = head(batches[0])
    head.fold()
    torch.testing.assert_close(linear(batches[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def setup(make_folder: Callable[..., Path], cache: Path) -> Callable[[int | str], Setup]:
    folder = make_folder({"ant": 12, "bee": 12, "cow": 12})
    images = open_images(str(folder))
    split = split_images(images, seed=1)

    def make(unfreeze: int | str) -> Setup:
        backbone = create_backbone("test_resnet.r160_in1k", 3, "none", seed=1)
        return images, split, backbone, split_backbone(backbone, unfreeze)

    return make


def run_fit(setup: Setup, folder: Path, cached: bool, **options: object) -> tuple[FitResult, dict[str, torch.Tensor]]:
    images, split, backbone, cut = setup
    values = {"data": "x", "backbone": backbone.name, "epochs": 3, "batch_size": 8, "seed": 1, "workers": 0, "views": 3}
    values |= {"ema_decay": 0.0, **options}
    config: TrainConfig = make_config(**values).resolved()
    train_data: CachedViews | ImageViews
    val_data: CachedViews | ImageViews
    if cached:
        spec = FeatureSpec("torch")
        train_data = CachedViews(extract_features(images, split.train, 3, cut, backbone.preprocessing, spec), images.labels[split.train])
        val_data = CachedViews(extract_features(images, split.val, 1, cut, backbone.preprocessing, spec), images.labels[split.val])
    else:
        train_data = ImageViews(images, split.train, backbone.preprocessing, config.views, 1, config.augment)
        val_data = ImageViews(images, split.val, backbone.preprocessing, 1, 1, "standard")
    data = TrainingData(train_data, val_data, images.labels[split.train], 3)
    result = fit(TrainingContext(images, split, backbone, cut, config), data, folder)
    return result, {k: v.clone() for k, v in backbone.model.state_dict().items()}


@pytest.mark.parametrize("unfreeze", [0, 1, 2])
def test_cached_and_uncached_are_the_same_mathematics(setup: Callable[[int], Setup], tmp_path: Path, unfreeze: int) -> None:
    options = {"unfreeze": unfreeze, "ema_decay": 0.9}
    one, _ = run_fit(setup(unfreeze), tmp_path / "cached", cached=True, **options)
    two, _ = run_fit(setup(unfreeze), tmp_path / "uncached", cached=False, **options)
    for name in ("train_loss", "val_loss"):
        np.testing.assert_allclose([r[name] for r in one.history], [r[name] for r in two.history], atol=1e-4)
    losses = [row["train_loss"] for row in one.history]
    assert losses[-1] < losses[0]  # it did learn something meanwhile


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_the_same_mathematics(setup: Callable[[int], Setup], tmp_path: Path) -> None:
    options = {"unfreeze": 1, "ema_decay": 0.9, "epochs": 2}
    one, weights = run_fit(setup(1), tmp_path / "eager", cached=True, **options)
    two, others = run_fit(setup(1), tmp_path / "compiled", cached=True, compile=True, **options)
    for name in ("train_loss", "val_loss"):
        np.testing.assert_allclose([r[name] for r in one.history], [r[name] for r in two.history], atol=1e-4)
    assert weights.keys() == others.keys()


def test_compiling_without_a_compiler_is_refused(setup: Callable[[int], Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="compile=true needs a C"):
        run_fit(setup(1), tmp_path, cached=True, unfreeze=1, compile=True)


def test_frozen_stages_do_not_move_and_the_others_do(setup: Callable[[int], Setup], tmp_path: Path) -> None:
    parts = setup(1)
    before = {k: v.clone() for k, v in parts[2].model.state_dict().items()}
    _, after = run_fit(parts, tmp_path, cached=True, unfreeze=1)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"layer4", "fc"}


@pytest.mark.parametrize("unfreeze", [0, 1])
def test_a_copy_with_synchronised_batch_norm_trains_the_network(
    setup: Callable[[int], Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfreeze: int
) -> None:
    """What several GPUs train shares parameters alone with the network; here with its own layers, the result is the same, bit for bit."""
    _, expected = run_fit(setup(unfreeze), tmp_path / "plain", cached=True, unfreeze=unfreeze)
    monkeypatch.setattr("seewhy.training.module.sync_batch_norm", lambda tail: copy.deepcopy(tail, {id(p): p for p in tail.parameters()}))
    _, found = run_fit(setup(unfreeze), tmp_path / "copy", cached=True, unfreeze=unfreeze)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_best_epoch_is_restored(setup: Callable[[int], Setup], tmp_path: Path) -> None:
    parts = setup(0)
    images, split, backbone, cut = parts
    result, _ = run_fit(parts, tmp_path, cached=True, unfreeze=0, epochs=12, lr=0.5, patience=2)
    losses = [row["val_loss"] for row in result.history]
    assert result.best_epoch == 1 + int(np.argmin(losses))
    features = extract_features(images, split.val, 1, cut, backbone.preprocessing, FeatureSpec("torch"))
    logits = cut.tail(torch.from_numpy(features.get(np.arange(len(split.val)))))
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(images.labels[split.val])).item()
    assert loss == pytest.approx(min(losses), abs=1e-4)
    assert len(losses) <= result.best_epoch + 2  # patience


@pytest.mark.parametrize("own", [{"schedule": "cosine"}, {"schedule": "plateau"}, {"ema_decay": 0.9}])
def test_resumed_fit_ends_with_the_same_weights(
    setup: Callable[[int], Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, object]
) -> None:
    options = {"unfreeze": 1, "epochs": 4, **own}
    whole, expected = run_fit(setup(1), tmp_path / "whole", cached=True, **options)

    original = fit_module.ProgressCallback.on_train_batch_end
    calls = {"left": 2 * 4 + 2}  # 4 batches an epoch: in the middle of the third

    def stop(self: fit_module.ProgressCallback, *args: object, **kwargs: object) -> None:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    monkeypatch.setattr(fit_module.ProgressCallback, "on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        run_fit(setup(1), tmp_path / "internal_error", cached=True, **options)
    monkeypatch.setattr(fit_module.ProgressCallback, "on_train_batch_end", original)
    resumed, weights = run_fit(setup(1), tmp_path / "internal_error", cached=True, **options)
    assert [r["epoch"] for r in resumed.history] == [1, 2, 3, 4]
    assert [r["train_loss"] for r in resumed.history] == [r["train_loss"] for r in whole.history]
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_an_epoch_counts_each_image_once(setup: Callable[[int], Setup], weighted: bool) -> None:
    _, _, backbone, cut = setup(0)
    config = make_config(data="x", backbone=backbone.name, label_smoothing=0.0).resolved()
    weights = torch.tensor([1.0, 2.0, 5.0]) if weighted else None
    module = FitModule(backbone, cut, config, 3, weights, 1).eval()
    features = torch.randn(7, module.tail.linear.in_features, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    for batch in (slice(0, 5), slice(5, 7)):  # the short last batch weighs less
        module.validation_step((features[batch], labels[batch]), 0)
    expected = torch.nn.functional.cross_entropy(module(features)[0], labels, weight=weights)
    torch.testing.assert_close(module.metrics["val_loss"].compute(), expected.detach())


def test_random_state_of_the_caller_is_left_alone(setup: Callable[[int], Setup], tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_fit(setup(0), tmp_path, cached=True, unfreeze=0, epochs=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("options", [{"mixup": "mixup"}, {"mixup": "cutmix"}, {"augment": "randaugment"}, {"class_weights": True}])
def test_fresh_views_train_the_whole_network(setup: Callable[[str], Setup], tmp_path: Path, options: dict[str, object]) -> None:
    result, weights = run_fit(setup("all"), tmp_path, cached=False, unfreeze="all", views=0, epochs=2, optimizer="sgd", lr=0.01, **options)
    assert len(result.history) == 2
    assert all(math.isfinite(row["train_loss"]) for row in result.history)
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_cached_features_mix_too(setup: Callable[[int], Setup], tmp_path: Path, mix: str) -> None:
    plain, _ = run_fit(setup(1), tmp_path / "plain", cached=True, unfreeze=1, epochs=1)
    mixed, _ = run_fit(setup(1), tmp_path / "mixed", cached=True, unfreeze=1, epochs=1, mixup=mix)
    again, _ = run_fit(setup(1), tmp_path / "again", cached=True, unfreeze=1, epochs=1, mixup=mix)
    assert mixed.history[0]["train_loss"] != pytest.approx(plain.history[0]["train_loss"], abs=1e-6)
    assert mixed.history[0]["train_loss"] == again.history[0]["train_loss"]


def test_mixup_of_vectors_and_tokens_by_hand(setup: Callable[[int], Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, backbone, _ = setup(1)
    config = make_config(data="x", mixup="mixup").resolved()
    module = FitModule(backbone, TrunkTail(None, nn.Identity(), "input"), config, 3, None, 1).train()
    monkeypatch.setattr(module.mixer, "make_params", lambda inputs: {"lam": 0.75})
    # 0.75 of each and 0.25 of the one before it, the last for the first.
    vectors = torch.tensor([[4.0, 0.0], [8.0, 4.0], [0.0, 12.0]])
    mixed, targets = module(vectors, torch.tensor([0, 1, 2]))
    assert mixed.tolist() == [[3.0, 3.0], [7.0, 3.0], [2.0, 10.0]]
    assert targets.tolist() == [[0.75, 0.0, 0.25], [0.25, 0.75, 0.0], [0.0, 0.25, 0.75]]
    tokens = torch.stack([vectors, 2 * vectors], dim=1)  # (3, 2, 2)
    assert module(tokens, torch.tensor([0, 1, 2]))[0].tolist() == [[[3, 3], [6, 6]], [[7, 3], [14, 6]], [[2, 10], [4, 20]]]
    assert torch.equal(module.eval()(vectors, torch.tensor([0, 1, 2]))[0], vectors)


def test_mixup_trains_the_classifier_alone(setup: Callable[[int], Setup], tmp_path: Path) -> None:
    options = {"unfreeze": 0, "epochs": 10, "lr": 0.05}
    plain, _ = run_fit(setup(0), tmp_path / "plain", cached=True, **options)
    mixed, _ = run_fit(setup(0), tmp_path / "mixed", cached=True, mixup="mixup", **options)
    losses = [row["train_loss"] for row in mixed.history]
    assert losses[-1] < losses[0]
    assert losses[-1] > plain.history[-1]["train_loss"]  # mixed targets have an entropy, which no fit gets below


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "swin_tiny_patch4_window7_224.ms_in1k"])
def test_cutmix_of_what_is_no_map_is_refused(setup: Callable[[int], Setup], name: str) -> None:
    images, split, _, _ = setup(1)
    backbone = create_backbone(name, 3, "none")
    config = make_config(data="x", backbone=name, unfreeze=1, mixup="cutmix").resolved()
    with pytest.raises(ConfigError, match=r"^mixup=cutmix needs feature maps, which the trunk of .* does not give; use mixup=mixup"):
        training_data(TrainingContext(images, split, backbone, split_backbone(backbone, 1), config))


def test_fresh_views_differ_by_epoch_and_seed_but_repeat(setup: Callable[[str], Setup]) -> None:
    images, split, backbone, _ = setup("all")
    n = len(split.train)

    def square(seed: int, epoch: int, augment: str = "standard") -> torch.Tensor:
        data = ImageViews(images, split.train, backbone.preprocessing, 0, seed, augment)
        return data.__getitems__([epoch * n])[0]

    assert torch.equal(square(0, 0), square(0, 0))
    assert not torch.equal(square(0, 0), square(0, 1))
    assert not torch.equal(square(0, 0), square(1, 0))
    assert torch.equal(square(0, 0, "randaugment"), square(0, 0, "randaugment"))
    assert not torch.equal(square(0, 0, "randaugment"), square(0, 0))


def test_a_loss_that_explodes_is_one_clear_error(setup: Callable[[int], Setup], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower --lr"):
        run_fit(setup(1), tmp_path, cached=True, unfreeze=1, lr=1e30, optimizer="sgd", epochs=5, patience=5)


# ---------------------------------------------------------------- averaged weights, memory format


def test_averaged_weights_are_the_moving_average_of_the_steps(
    setup: Callable[[int], Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[torch.Tensor] = []
    original = fit_module.ProgressCallback.on_train_batch_end

    def look(self: fit_module.ProgressCallback, trainer: object, module: FitModule, *rest: object, **kwargs: object) -> None:
        steps.append(module.backbone.model.get_submodule("fc").weight.detach().clone())
        original(self, trainer, module, *rest, **kwargs)

    monkeypatch.setattr(fit_module.ProgressCallback, "on_train_batch_end", look)
    result, weights = run_fit(setup(1), tmp_path, cached=True, unfreeze=1, epochs=3, ema_decay=0.5)
    kept = steps[: 4 * result.best_epoch]  # 4 batches an epoch
    expected = kept[0]
    for n, step in enumerate(kept[1:], start=1):
        share = min(0.5, (1 + n) / (10 + n))  # 2/11, 3/12, ..., at most 0.5
        expected = share * expected + (1 - share) * step
    torch.testing.assert_close(weights["fc.weight"], expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(weights["fc.weight"], kept[-1], rtol=1e-3)


def test_depthwise_networks_train_in_channels_last() -> None:
    depthwise = split_backbone(create_backbone("efficientnet_lite0", 3, "none"), 1).tail
    plain = split_backbone(create_backbone("resnet18", 3, "none"), 1).tail
    assert module.best_memory_format(depthwise) is torch.channels_last
    assert module.best_memory_format(plain) is torch.contiguous_format


def test_memory_format_is_not_left_in_the_network(setup: Callable[[int], Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run_fit(setup(1), tmp_path / "plain", cached=True, unfreeze=1, epochs=2)
    monkeypatch.setattr("seewhy.training.module.best_memory_format", lambda tail: torch.channels_last)
    parts = setup(1)
    last, _ = run_fit(parts, tmp_path / "last", cached=True, unfreeze=1, epochs=2)
    np.testing.assert_allclose([r["train_loss"] for r in last.history], [r["train_loss"] for r in plain.history], atol=1e-4)
    assert all(parameter.is_contiguous() for parameter in parts[2].model.parameters())


def test_early_stopping_is_not_undone_by_a_resume(tmp_path: Path) -> None:
    """A checkpoint from after the last epoch of a stopped fit has nothing left to train, and brings its history."""
    history = fit_module.HistoryCallback(make_config(data="x").resolved())
    rows = [{"epoch": 1.0, "val_loss": 0.5}, {"epoch": 2.0, "val_loss": 0.6}]
    for waited, stopped in ((1, False), (2, True)):
        states = {"EarlyStopping{'monitor': 'val_loss'}": {"wait_count": waited, "patience": 2}, history.state_key: {"rows": rows}}
        torch.save({"callbacks": states}, tmp_path / "last.ckpt")
        assert fit_module._stopped_early(tmp_path / "last.ckpt", history) is stopped
    assert history.rows == rows
    assert not fit_module._stopped_early(tmp_path / "none.ckpt", history)
