"""Test push and pull: complete or not at all, equal predictions afterwards, readable by timm, safe against hostile content."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import seewhy
from seewhy.api import Run
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.deploy import hub as hub_module
from seewhy.errors import OutputError, RunError
from seewhy.models.transforms import eval_view, render
from tests.cheap_run import cheap_run, normalised

OWN = set(hub_module.FILES)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    """A run of a tiny network, for tests that do not ask what it answers."""
    folder = tmp_path_factory.mktemp("small")
    for number, name in enumerate(("ant", "bee", "cow")):
        (folder / "images" / name).mkdir(parents=True)
        for n in range(10):
            noise = np.random.default_rng([number, n]).integers(0, 90, size=(40, 40, 3)).astype(np.uint8)
            noise[..., number] += 150
            Image.fromarray(noise).save(folder / "images" / name / f"{n}.png")
    options = {"backbone": "test_resnet.r160_in1k", "weights": "none", "epochs": 1, "workers": 0, "group_by": "exact", "tracker": "none"}
    return seewhy.train(folder / "images", out=folder / "demo", **options)


@pytest.fixture
def shared(small_run: Run, tmp_path: Path) -> Path:
    """The small run, pushed to a folder."""
    return Path(small_run.push(tmp_path / "share" / "animals"))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def data_config(model: Any) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in timm.data.resolve_model_data_config(model).items()}


# ---------------------------------------------------------------- folders


def test_pushed_and_pulled_it_says_the_same(demo_run: Run, tmp_path: Path, demo_images: list[Path]) -> None:
    shared = Path(demo_run.push(tmp_path / "share" / "animals"))
    assert files_of(shared) == {*OWN, *hub_module.REPORT, "config.json"}
    pulled = seewhy.pull(shared, tmp_path / "mine")
    assert files_of(pulled.path) == OWN
    assert sorted(os.listdir(tmp_path)) == ["mine", "share"]  # no work folder, no lock
    assert sorted(os.listdir(shared.parent)) == ["animals"]
    images = [str(path) for path in demo_images]
    expected, found = demo_run.predict(images), pulled.predict(images)
    np.testing.assert_array_equal(found.probs, expected.probs)
    assert found.ood.tolist() == expected.ood.tolist()
    assert pulled.threshold_for(0.9) == demo_run.threshold_for(0.9)
    assert pulled.manifest == json.loads((demo_run.path / "run.json").read_text())
    # Pushed once more, it is the same folder; the report is taken where asked for.
    again = Path(seewhy.pull(shared, tmp_path / "report", report=True).push(tmp_path / "again"))
    for name in files_of(shared):
        assert (again / name).read_bytes() == (shared / name).read_bytes(), name


def test_the_card_is_hugging_face_s(shared: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(shared / "README.md")
    assert card.data.library_name == "seewhy"
    assert card.data.pipeline_tag == "image-classification"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == round(json.loads((shared / "run.json").read_text())["metrics"]["test"]["accuracy"], 4)
    head = yaml.safe_load((shared / "README.md").read_text().split("---\n")[1])
    assert head["model-index"][0]["name"] == "demo"


def test_timm_loads_it_and_gives_its_logits(demo_run: Run, tmp_path: Path, demo_images: list[Path]) -> None:
    shared = demo_run.push(tmp_path / "share")
    model = timm.create_model(f"local-dir:{shared}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == list(demo_run.classes)
    assert not demo_run.config.tta_flip  # one direction, as timm's
    images = [Image.open(path).convert("RGB") for path in demo_images]
    preprocessing = demo_run.backbone.preprocessing
    sizes = (preprocessing.size, preprocessing.size)
    squares = np.stack([render(p, eval_view(*p.size, preprocessing), sizes, preprocessing.interpolation) for p in images])
    inputs = torch.from_numpy(normalised(squares, preprocessing))
    with torch.inference_mode():
        logits = model(inputs)
        torch.testing.assert_close(logits, demo_run.backbone.model(inputs), rtol=0, atol=0)
    expected = demo_run.predict([str(path) for path in demo_images])
    probs = torch.softmax(logits / demo_run.temperature, dim=1).numpy()
    np.testing.assert_allclose(probs, expected.probs, atol=1e-4)
    # And by timm's own way from image to input, which rounds elsewhere.
    config = data_config(model)
    assert config == {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        theirs = model(torch.stack([transform(image) for image in images]))
    assert (theirs.argmax(1) == logits.argmax(1)).all()
    assert (theirs - logits).abs().max() < 0.25


@pytest.mark.parametrize(
    ("name", "resize", "size"),
    [("resnet18", "crop", 96), ("test_vit.r160_in1k", "squash", 160), ("test_efficientnet.r160_in1k", "squash", 64)],
)
def test_timm_s_config_fits_other_networks(name: str, resize: str, size: int, tmp_path: Path) -> None:
    run = cheap_run(name, size=size, resize=resize)
    state = {key: value.contiguous() for key, value in run.backbone.model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub_module.timm_config(run)))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    inputs = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs), run.backbone.model(inputs))
    config = data_config(model)
    assert (config["input_size"], config["crop_mode"]) == ((3, size, size), {"crop": "center", "squash": "squash"}[resize])
    assert config["crop_pct"] == (run.backbone.preprocessing.crop if resize == "crop" else 1.0)


# ---------------------------------------------------------------- refused


def test_nothing_is_replaced(small_run: Run, shared: Path, tmp_path: Path) -> None:
    before = {name: (shared / name).read_bytes() for name in files_of(shared)}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # leads to nothing yet
    for place in (shared, tmp_path / "mine", tmp_path / "link"):
        with pytest.raises(OutputError, match="exists already"):
            small_run.push(place)
        with pytest.raises(OutputError, match=r"exists already; remove it, or choose another --out"):
            seewhy.pull(shared, place)
    assert {name: (shared / name).read_bytes() for name in files_of(shared)} == before
    assert files_of(tmp_path / "mine") == {"precious.txt"}
    assert not (tmp_path / "elsewhere").exists()


def spoil_manifest(folder: Path) -> None:
    content = json.loads((folder / "run.json").read_text())
    content["backbone"]["timm"] = "hf-hub:someone/else"
    (folder / "run.json").write_text(json.dumps(content))


def spoil_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(sorted(state)[0])
    save_file(state, folder / "model.safetensors")


def link(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        secret = folder.parent / "secret"
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
            secret.mkdir()
        else:
            (folder / name).unlink()
            secret.write_text("secret")
        (folder / name).symlink_to(secret)

    return make


def pipe(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    os.mkfifo(folder / "metrics.json")


def huge(folder: Path) -> None:
    with (folder / "README.md").open("r+b") as file:
        file.truncate(10**7 + 1)  # a hole: it takes no room


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_manifest, r"backbone\.timm: .*not the name of a network"),
        (spoil_weights, "not the weights of"),
        (lambda folder: (folder / "run.json").unlink(), r"not a run \(it has no run\.json\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"it has no model\.safetensors"),
        (link("metrics.json"), "a link; only regular files"),
        (link("figures"), "figures: a link; only regular files"),
        (link("run.json"), "a link; only regular files"),
        (pipe, "not a regular file"),
        (huge, "more than such a file of a run can have"),
    ],
)
def test_what_is_no_whole_run_is_refused_and_nothing_is_left(
    shared: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(shared)
    with pytest.raises(RunError, match=words) as refused:
        seewhy.pull(shared, tmp_path / "new" / "mine")
    assert str(shared) in str(refused.value)
    assert "-mine" not in str(refused.value)  # not the work folder's name
    assert not (tmp_path / "new").exists()


def test_only_files_of_runs_are_taken(shared: Path, tmp_path: Path) -> None:
    (shared / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    (shared / "figures" / "evil.html").write_text("<script>")
    (shared / ".hidden").symlink_to("/")
    (shared / "loop").symlink_to(shared)
    assert files_of(seewhy.pull(shared, tmp_path / "mine").path) == OWN


def test_a_run_that_is_damaged_is_not_pushed(small_run: Run, tmp_path: Path) -> None:
    run = seewhy.load(shutil.copytree(small_run.path, tmp_path / "run"))
    (run.path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="damaged"):
        run.push(tmp_path / "share")
    assert not (tmp_path / "share").exists()


def test_a_full_disk_leaves_nothing(small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "write_json", full)
    with pytest.raises(OutputError, match=r"share/x: cannot be written \(No space left on device\); choose another destination"):
        small_run.push(tmp_path / "share" / "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("address", ["s3://bucket/run", "hf://name", "hf://a/b/c", "hf://../etc", "hf://a/..", "hf://a/b@x y"])
def test_invalid_addresses(small_run: Run, address: str, tmp_path: Path) -> None:
    for ask in (lambda: small_run.push(address), lambda: seewhy.pull(address, tmp_path / "x")):
        with pytest.raises(OutputError, match="unknown kind of address"):
            ask()


def test_the_commands(small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_guarded(lambda: call(["push", str(small_run.path), "share/my run"])) == 0
    assert run_guarded(lambda: call(["pull", "share/my run", "--json"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{small_run.path} -> share/my run"
    assert json.loads(lines[1])["run"] == "runs/my_run"
    assert run_guarded(lambda: call(["pull", "share/my run"])) == 2
    assert run_guarded(lambda: call(["pull", "nowhere"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "seewhy: runs/my_run: exists already; remove it, or choose another --out",
        "seewhy: nowhere: no such folder; name a folder that `seewhy push` has written, or hf://USER/NAME",
    ]


# ---------------------------------------------------------------- the hub


class Hub(ThreadingHTTPServer):
    """What huggingface_hub's client asks of a hub, answered from memory: repositories, commits of plain files, downloads."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.sizes: dict[str, int] = {}  # what is claimed of files, where not the truth
        self.downloads: list[str] = []

    def sha(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[name].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.refuse(401, "Unauthorized")
        elif path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(data)["content"].split("---\n")[1])["library_name"] == "seewhy"
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repos:
                self.answer({"error": "You already created this model repo", "url": f"http://{self.headers['Host']}/{name}"}, 409)
                return
            self.server.repos[name] = {".gitattributes": b""}
            self.server.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
            self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/main", path):
            files = json.loads(data)["files"]
            self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", path):
            lines = [json.loads(line) for line in data.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            self.server.repos[found[1]] |= files
            self.server.commits.append({"repo": found[1], "summary": lines[0]["value"]["summary"], "files": sorted(files)})
            sha = self.server.sha(found[1])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{sha}", "commitOid": sha})
        else:
            self.refuse(404, "EntryNotFound")

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.server.repos.get(name)
        if files is None or (self.server.private[name] and self.headers.get("Authorization") != "Bearer hf_right"):
            self.refuse(401, "RepoNotFound")  # as the hub does, which does not say which
            return
        sha = self.server.sha(name)
        sizes = {file: self.server.sizes.get(file, len(content)) for file, content in files.items()}
        if re.fullmatch(rf"/api/models/{name}(/revision/(main|{sha}))?", path):
            blobs = "blobs" in parse_qs(url.query)
            listed = [{"rfilename": file} | ({"size": size} if blobs else {}) for file, size in sizes.items()]
            self.answer({"id": name, "sha": sha, "private": self.server.private[name], "siblings": listed})
        elif path == f"/api/models/{name}/tree/{sha}":
            tree = [{"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in sizes.items()]
            self.answer(tree)
        elif path.startswith(f"/{name}/resolve/{sha}/"):
            file = path.removeprefix(f"/{name}/resolve/{sha}/")
            if self.command == "GET":
                self.server.downloads.append(file)
            self.answer(files[file], X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"')
        else:
            self.refuse(404, "RevisionNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_goes_to_a_hub_and_comes_back(small_run: Run, hub: Hub, tmp_path: Path, demo_images: list[Path]) -> None:
    url = small_run.push("hf://ann/animals")
    assert url == f"{os.environ['HF_ENDPOINT']}/ann/animals"
    assert hub.private == {"ann/animals": True}
    (commit,) = hub.commits  # one commit: there whole, or not at all
    assert commit == {"repo": "ann/animals", "summary": "demo, pushed by seewhy", "files": sorted(OWN | {"config.json", "report.html"})}
    assert hub.repos["ann/animals"]["model.safetensors"] == (small_run.path / "model.safetensors").read_bytes()
    hub.repos["ann/animals"] |= {"pytorch_model.bin": b"\x80", "../../outside": b"no", "figures/x.html": b"no"}
    pulled = seewhy.pull("hf://ann/animals", tmp_path / "mine")
    assert set(hub.downloads) == OWN  # nothing else was even asked for
    assert files_of(tmp_path) == {f"mine/{name}" for name in OWN}
    images = [str(path) for path in demo_images]
    np.testing.assert_array_equal(pulled.predict(images).probs, small_run.predict(images).probs)
    sha = hub.sha("ann/animals")
    assert seewhy.pull(f"hf://ann/animals@{sha}", tmp_path / "other").manifest == pulled.manifest
    with pytest.raises(OutputError, match=r"hf://ann/animals: has \S+ already"):
        small_run.push("hf://ann/animals")
    assert len(hub.commits) == 1


def test_a_repository_that_everybody_sees_takes_a_run_only_if_told_so(small_run: Run, hub: Hub) -> None:
    hub.repos["ann/open"], hub.private["ann/open"] = {"README.md": b"soon"}, False
    with pytest.raises(OutputError, match="the repository is public; add --public"):
        small_run.push("hf://ann/open")
    assert hub.commits == []
    small_run.push("hf://ann/open", public=True)
    small_run.push("hf://ann/fresh", public=True)
    assert hub.private["ann/fresh"] is False
    assert [commit["repo"] for commit in hub.commits] == ["ann/open", "ann/fresh"]


def test_what_a_hub_refuses_is_one_line(small_run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"hf://ann/none: access denied; run `hf auth login`"):
        seewhy.pull("hf://ann/none", tmp_path / "x")
    hub.repos["ann/empty"], hub.private["ann/empty"] = {"README.md": b""}, False
    with pytest.raises(RunError, match=r"hf://ann/empty: not a run \(it has no run.json\)"):
        seewhy.pull("hf://ann/empty", tmp_path / "x")
    with pytest.raises(RunError, match="no such repository"):
        seewhy.pull("hf://ann/empty@nothing", tmp_path / "x")
    hub.repos["ann/huge"], hub.private["ann/huge"] = {"run.json": b"{}", "model.safetensors": b""}, False
    hub.sizes["model.safetensors"] = 10**12
    with pytest.raises(RunError, match="1,000,000 MB, more than such a file of a run can have"):
        seewhy.pull("hf://ann/huge", tmp_path / "x")
    assert hub.downloads == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OutputError, match=r"hf://ann/new: access denied; run `hf auth login`"):
        small_run.push("hf://ann/new")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OutputError, match="not logged in"):
        small_run.push("hf://ann/new")
    assert not list(tmp_path.iterdir())


def test_no_hub_is_one_line(small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(OutputError, match=r"the hub cannot be reached \(.*refused.*\); check the network, or name a folder"):
        small_run.push("hf://ann/new")
    with pytest.raises(RunError, match=r"the hub cannot be reached \(.*refused.*\); check the network, or name a folder"):
        seewhy.pull("hf://ann/new", tmp_path / "x")
    assert os.listdir(tmp_path) == []
