"""Test explanations of a network whose evidence is known: peaks, written files, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from seewhy.api import Run
from seewhy.config import make_config
from seewhy.errors import ConfigError, DataError, ImageError, OutputError
from seewhy.explain.explainer import class_index, display_view, explain
from seewhy.inference.predict import predict
from seewhy.models.backbones import Backbone
from seewhy.models.transforms import Preprocessing
from seewhy.models.trunk_tail import TrunkTail
from tests.cheap_run import CLASSES, UNCALIBRATED, cheap_run

COLOURS = ("red", "green", "blue")
PREPROCESSING = Preprocessing(56, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", 1.0)


class ColourNetwork(nn.Module):
    """Its three maps are how red, green and blue each of 7 x 7 places is; each class is the mean of its map."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.classifier.weight)

    def get_classifier(self) -> nn.Linear:
        return self.classifier

    def forward_features(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 8)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.classifier(features.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def colour_run(resize: str = "squash") -> Run:
    model = ColourNetwork().eval()
    backbone = Backbone("colours", "colours", model, replace(PREPROCESSING, resize=resize), (), "none")
    config = make_config(data="x", weights="none").resolved()
    return Run(Path("cheap"), config, COLOURS, backbone, TrunkTail(None, model, "input"), {"metrics": {}, "calibration": UNCALIBRATED})


@pytest.fixture
def left_red_right_blue(tmp_path: Path) -> Path:
    """240 x 80: a dark image with a red block in the left third and a smaller blue one at the bottom right."""
    image = Image.new("RGB", (240, 80), (20, 20, 20))
    image.paste((220, 20, 20), (0, 0, 80, 80))
    image.paste((20, 20, 220), (180, 40, 240, 80))
    image.save(tmp_path / "blocks.png")
    return tmp_path / "blocks.png"


def image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_map_lies_where_the_evidence_lies(left_red_right_blue: Path, method: str) -> None:
    run = colour_run()
    red = explain(run, [left_red_right_blue], method, target="red").maps[0]
    blue = explain(run, [left_red_right_blue], method, target="blue").maps[0]
    assert red.shape == blue.shape == (7, 7)
    assert red[:, :2].min() > 0.9  # 80 of 240 pixels are 2.3 of 7 columns
    assert red[:, 3:].max() < 0.15
    assert blue[4:, 6].min() > 0.9  # the lower half, 180 of 240 pixels from the left
    assert blue[:3].max() < 0.15
    assert blue[:, :5].max() < 0.15


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_map_is_the_map_of_the_class_over_its_maximum(left_red_right_blue: Path, method: str) -> None:
    # with one channel a class both methods only scale it: the weights of the other channels are 0
    found = explain(colour_run(), [left_red_right_blue], method, target="red").maps[0]
    image = Image.open(left_red_right_blue).resize((56, 56), Image.Resampling.BILINEAR)
    means = np.asarray(image, dtype=np.float64)[..., 0].reshape(7, 8, 7, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(found, means / means.max(), rtol=1e-5)


def test_without_a_target_the_predicted_class_is_explained(left_red_right_blue: Path) -> None:
    explanation = explain(colour_run(), [left_red_right_blue])
    assert explanation.targets.tolist() == [0]  # more red than blue
    assert explanation.method == "gradcam"
    np.testing.assert_array_equal(explanation.maps, explain(colour_run(), [left_red_right_blue], target="red").maps)
    assert explanation.maps.dtype == np.float32


def test_maps_of_a_real_network_are_scaled_and_probabilities_those_of_predict(tmp_path: Path) -> None:
    run = cheap_run()
    for n in range(3):
        noise = np.random.default_rng(n).integers(0, 256, size=(50, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.png")
    explanation, predictions = explain(run, [tmp_path]), predict(run, [tmp_path])
    assert explanation.paths == predictions.paths
    np.testing.assert_allclose(explanation.probs, predictions.probs, rtol=1e-3, atol=1e-5)
    assert explanation.targets.tolist() == predictions.probs.argmax(axis=1).tolist()
    np.testing.assert_allclose(explanation.maps.max(axis=(1, 2)), 1, rtol=1e-6)
    assert explanation.maps.min() >= 0
    other = explain(run, [tmp_path], target="cat")
    assert other.targets.tolist() == [CLASSES.index("cat")] * 3
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_more_images_than_a_batch_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, colour in enumerate(["blue", "red", "lime", "red", "blue"]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{n}.png")
    monkeypatch.setattr("seewhy.explain.explainer.BATCH", 2)
    explanation = explain(colour_run(), [tmp_path])
    assert explanation.targets.tolist() == [2, 0, 1, 0, 2]
    assert explanation.maps.shape == (5, 7, 7)
    assert explanation.probs.shape == (5, 3)


def test_each_image_may_have_a_class_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, colour in enumerate(["blue", "red", "lime", "red", "blue"]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{n}.png")
    monkeypatch.setattr("seewhy.explain.explainer.BATCH", 2)
    names = ["blue", "green", "green", "red", "red"]
    explanation = explain(colour_run(), [tmp_path], "gradcam", target=names)
    assert [COLOURS[target] for target in explanation.targets] == names
    assert explanation.maps.max(axis=(1, 2)).tolist() == [1, 0, 1, 1, 0]  # evidence where the image has that colour
    contrasted = explain(colour_run(), [tmp_path], "hirescam", target=names, contrast=["red", "red", "red", "blue", "blue"])
    assert contrasted.maps.max(axis=(1, 2)).tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(ConfigError, match="2 classes for 5 images; name one class, or one per image"):
        explain(colour_run(), [tmp_path], target=["red", "blue"])


def test_no_evidence_gives_an_empty_map_and_an_overlay_without_glow(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (255, 0, 0)).save(tmp_path / "red.png")
    explanation = explain(colour_run(), [tmp_path / "red.png"], target="blue")
    assert (explanation.maps == 0).all()
    overlay = np.asarray(explanation.overlay(0))
    assert (overlay == overlay[0, 0]).all()
    assert overlay[0, 0].tolist() == [round(0.55 * 255 + 0.25 * 85), 21, 21]


def test_records_name_the_explained_and_the_predicted_class(left_red_right_blue: Path) -> None:
    explanation = explain(colour_run(), [left_red_right_blue], "gradcam", target="blue")
    (record,) = json.loads(json.dumps(explanation.records()))
    assert record.pop("prob") == pytest.approx(explanation.probs[0, 2])
    assert record == {"path": str(left_red_right_blue), "class": "blue", "predicted": "red", "method": "gradcam"}


# ---------------------------------------------------------------- errors


def test_unknown_class_names_the_nearest(left_red_right_blue: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown class 'bleu'; did you mean blue\? \(the run has 3 classes\)"):
        explain(colour_run(), [left_red_right_blue], target="bleu")
    with pytest.raises(ConfigError, match="did you mean red or green or blue"):
        explain(colour_run(), [left_red_right_blue], target="zzz")
    assert class_index("blue", COLOURS) == 2


def test_unknown_method_lists_the_known_ones(left_red_right_blue: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'grad-cam'; use one of gradcam, gradcam\+\+"):
        explain(colour_run(), [left_red_right_blue], "grad-cam")


def test_missing_and_damaged_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, folder or pattern"):
        explain(colour_run(), [tmp_path / "none.png"])
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(ImageError, match=r"bad\.png: not an image"):
        explain(colour_run(), [tmp_path / "bad.png"])


# ---------------------------------------------------------------- overlays


def test_overlay_keeps_the_proportions_of_the_image(left_red_right_blue: Path) -> None:
    assert explain(colour_run("squash"), [left_red_right_blue]).overlay(0).size == (448, 149)  # 240 x 80
    assert explain(colour_run("crop"), [left_red_right_blue]).overlay(0).size == (448, 448)  # the centred square


def test_overlay_of_a_crop_shows_the_centre(left_red_right_blue: Path) -> None:
    shown = display_view(left_red_right_blue, replace(PREPROCESSING, resize="crop"), long_side=80)
    np.testing.assert_array_equal(shown, np.asarray(Image.open(left_red_right_blue))[:, 80:160])


def test_overlay_glows_where_the_map_is_hot(left_red_right_blue: Path) -> None:
    overlay = np.asarray(explain(colour_run(), [left_red_right_blue], target="blue").overlay(0)).astype(int)
    warmth = overlay[..., 0] - overlay[..., 2]  # red less blue
    hot, cold = warmth[100:140, 400:440], warmth[100:140, 180:300]
    assert hot.mean() > 0.55 * (20 - 220) + 100  # the blue block itself is cold; the glow over it is not
    assert abs(cold.mean()) < 10
    assert overlay[100:140, 400:440].mean() > 2 * overlay[100:140, 180:300].mean()


def test_overlays_are_saved_under_safe_names(left_red_right_blue: Path, tmp_path: Path) -> None:
    run = replace(colour_run(), classes=("dark red/\\: *", "green", "bläu"))
    odd = left_red_right_blue.rename(tmp_path / "my block; $(x).png")
    written = explain(run, [odd], "gradcam++").save(tmp_path / "out" / "deeper")
    assert [path.name for path in written] == ["my_block____x_.dark_red_____.gradcam__.png"]
    assert image_size(written[0]) == (448, 149)
    (other,) = explain(run, [odd], "gradcam", target="bläu").save(tmp_path / "out" / "deeper")
    assert other.name == "my_block____x_.bläu.gradcam.png"
    assert sorted((tmp_path / "out" / "deeper").iterdir()) == sorted([written[0], other])


def test_equal_names_in_two_folders_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for folder, size in (("a", (40, 20)), ("b", (20, 40)), ("c", (30, 30))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", size, "red").save(tmp_path / folder / "one.png")
    written = explain(colour_run(), [tmp_path / "a", tmp_path / "b", tmp_path / "c"]).save(tmp_path / "out")
    assert len(set(written)) == 3
    assert [image_size(path) for path in written] == [(448, 224), (224, 448), (448, 448)]


def test_unwritable_folder_is_one_line(left_red_right_blue: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match=r"overlays cannot be written.*--out") as caught:
            explain(colour_run(), [left_red_right_blue]).save(path)
        assert "\n" not in str(caught.value)


def test_flip_means_the_maps_of_both_directions(left_red_right_blue: Path) -> None:
    run = colour_run()
    flipping = replace(run, config=run.config.model_copy(update={"tta_flip": True}), executors={"network": {}, "maps": {}})
    # This network sees no difference between directions: the mirrored map, turned back, is the plain one.
    plain, both = (explain(r, [left_red_right_blue], "gradcam", target="blue") for r in (run, flipping))
    np.testing.assert_allclose(both.maps, plain.maps, atol=1e-5)
    np.testing.assert_allclose(both.probs, plain.probs, atol=1e-6)


def test_flip_explains_what_predict_answers(tmp_path: Path) -> None:
    run = cheap_run(tta_flip=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    np.testing.assert_allclose(explain(run, [tmp_path / "noise.png"]).probs, predict(run, [tmp_path / "noise.png"]).probs, atol=1e-5)


def noise_image(folder: Path, seed: int = 0) -> Path:
    path = folder / f"noise{seed}.png"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
@pytest.mark.parametrize("flip", [False, True])
def test_named_layers_explain_the_same_answer(tmp_path: Path, name: str, flip: bool) -> None:
    run = cheap_run(name, size=160 if name == "test_vit" else 64, tta_flip=flip)
    image = noise_image(tmp_path)
    layer, side = ("blocks.3.norm1", 10) if name == "test_vit" else ("layer3", 4)
    found = explain(run, [image], "layercam", layers=[layer])
    assert found.maps.shape == (1, side, side)
    np.testing.assert_allclose(found.probs, predict(run, [image]).probs, atol=1e-4)
    both = explain(run, [image], "layercam", layers=[layer, "blocks.5.norm1" if name == "test_vit" else "layer4"])
    assert both.maps.shape == (1, side, side)
    assert np.abs(both.maps - found.maps).max() > 0.01


def test_the_default_layer_by_name_is_the_default(tmp_path: Path) -> None:
    run, image = cheap_run(tta_flip=True), noise_image(tmp_path)
    default, named = (explain(run, [image], "gradcam++", layers=layers) for layers in ((), ("layer4",)))
    np.testing.assert_allclose(named.maps, default.maps, atol=1e-3)


def test_flip_explains_the_class_of_the_mean_also_where_a_direction_says_another(tmp_path: Path) -> None:
    run = cheap_run(tta_flip=True)
    straight = cheap_run()
    images = [noise_image(tmp_path, seed) for seed in range(12)]
    both = explain(run, images, "gradcam")
    assert both.targets.tolist() == predict(run, images).probs.argmax(axis=1).tolist()
    alone = predict(straight, images).probs.argmax(axis=1)
    differ = np.flatnonzero(alone != both.targets)
    assert len(differ) > 0  # else this test says nothing
    given = explain(run, [images[differ[0]]], "gradcam", target=CLASSES[both.targets[differ[0]]])
    np.testing.assert_allclose(both.maps[differ[0]], given.maps[0], atol=1e-4)


def test_against_takes_the_other_class_away(left_red_right_blue: Path) -> None:
    run = colour_run()
    red, not_blue = (explain(run, [left_red_right_blue], "gradcam", "red", contrast).maps[0] for contrast in (None, "blue"))
    assert red[0, 3] > 0  # the dark middle is a little red,
    assert not_blue[0, 3] == 0  # and as blue as it is red
    assert not_blue[0, 0] == 1
    assert not_blue[6, 6] == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"layers": ["layr4"]}, "unknown layer 'layr4'"), ({"contrast": "purple"}, "unknown class")]
)
def test_unknown_layer_or_other_class_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(cheap_run(), [noise_image(tmp_path)], **options)
