"""hf:// against a Hub on this machine: real urls and headers, cut downloads, refusals, offline, uploads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import published_folder
import pytest
import torch
from hub_server import TOKEN, serve
from tiny_models import make_model, save_checkpoint

import open_lm
from open_lm.errors import CheckpointError, ConfigError
from open_lm.hf.export import ExportConfig, export
from open_lm.weights.hub import HubModel

ROOT = Path(__file__).resolve().parents[2]
CUT_AT = 11_000_000  # bytes; huggingface_hub keeps what it has in steps of 10 MiB
CALLS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from open_lm.weights.hub import download, push
found = []
for call, *arguments in json.loads(sys.argv[2]):
    try:
        found.append(str({"download": download, "push": push}[call](*arguments)))
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


def call(calls, endpoint, cache, **env):
    """Results or errors of download and push, called in a fresh process (huggingface_hub reads its settings once)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(ROOT), json.dumps(calls)], capture_output=True, text=True,
        env={**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Repositories as people publish OpenLM models: a raw .pt, an exported folder, a bare config and weights."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("raw", "private", "gated", "mixin", "big"):
        (root / "lab" / name).mkdir(parents=True)
    model = make_model("own_published")
    save_checkpoint(model, root / "lab/raw/epoch_1.pt")
    export(ExportConfig(checkpoint=str(root / "lab/raw/epoch_1.pt"), out=str(root / "lab/exported")))
    (root / "lab/big/big.pt").write_bytes(os.urandom(CUT_AT + 1_000_000))
    (root / "lab/raw/README.md").write_text("# raw")
    (root / "lab/private/epoch_1.pt").write_bytes((root / "lab/raw/epoch_1.pt").read_bytes())
    (root / "lab/gated/epoch_1.pt").write_bytes(b"x")
    torch.save(model.state_dict(), root / "lab/mixin/pytorch_model.bin")
    (root / "lab/mixin/config.json").write_text(json.dumps({"any": "thing"}))
    return root


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.fixture(scope="module")
def first_session(repositories, tmp_path_factory):
    """`(answers, hub's requests, cache)` of one process that downloads everything, one file being cut half-way."""
    cache = tmp_path_factory.mktemp("cache")
    names = ["raw", "exported", "mixin", "raw@v1", "raw@nowhere", "missing", "private", "gated", "big"]
    with serve(repositories) as (hub, endpoint):
        hub.cut["big.pt"] = CUT_AT
        answers = call([["download", f"hf://lab/{name}"] for name in names], endpoint, cache)
        return dict(zip(names, answers, strict=True)), hub.requests, cache


@pytest.mark.parametrize("name", ["raw", "exported"])
def test_downloaded_repositories_load(first_session, name):
    assert same(open_lm.load_model(first_session[0][name]), make_model("own_published"))


def test_a_config_that_says_nothing_needs_the_model_named(first_session, tmp_path):
    folder, model = first_session[0]["mixin"], make_model("own_published")
    with pytest.raises(CheckpointError, match="give --model"):
        open_lm.load_model(folder)
    (tmp_path / "m.json").write_text(json.dumps(model.config.to_dict()))
    assert same(open_lm.load_model(folder, model=str(tmp_path / "m.json")), model)


def test_a_cut_download_goes_on_where_it_was_cut(repositories, first_session):
    ranges = [r for method, path, r in first_session[1] if method == "GET" and path.endswith("big.pt")]
    assert ranges[0] is None and len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= CUT_AT
    whole = (repositories / "lab/big/big.pt").read_bytes()
    assert (Path(first_session[0]["big"]) / "big.pt").read_bytes() == whole


def test_only_configs_and_weights_are_downloaded(first_session):
    assert not any(path.endswith("README.md") for _, path, _ in first_session[1])


def test_a_revision_is_the_one_asked_for(first_session):
    assert Path(first_session[0]["raw@v1"]).is_dir()
    assert first_session[0]["raw@nowhere"].startswith("StorageError: hf://lab/raw@nowhere: no such revision")


def test_what_cannot_be_had_says_why(first_session):
    answers = first_session[0]
    assert answers["missing"].startswith("StorageError: hf://lab/missing: no such model, or a private one")
    assert answers["private"].startswith("StorageError: hf://lab/private: no such model, or a private one")
    assert answers["gated"].startswith("StorageError: hf://lab/gated: access to it must be asked for")


def test_offline_the_cache_serves_what_it_has(first_session):
    answers, _, cache = first_session
    calls = [["download", "hf://lab/raw"], ["download", "hf://lab/private"]]
    found, missing = call(calls, "http://127.0.0.1:9", cache, HF_HUB_OFFLINE="1")
    assert found == answers["raw"]
    assert missing.startswith("StorageError: hf://lab/private: not in the cache, and the Hub cannot be reached")


def test_a_token_opens_private_models_and_uploads(repositories, tmp_path):
    with serve(repositories) as (_, endpoint):
        calls = [
            ["download", "hf://lab/private"],
            ["push", str(repositories / "lab/exported"), "me/mine"],
        ]
        opened, page = call(calls, endpoint, tmp_path, HF_TOKEN=TOKEN)
        (refused,) = call([["push", str(repositories / "lab/exported"), "me/other"]], endpoint, tmp_path)
    assert same(open_lm.load_model(opened), make_model("own_published"))
    assert page == f"{endpoint}/me/mine"
    assert json.loads((repositories / "me--mine.json").read_text())["visibility"] == "private"
    assert same(open_lm.load_model(repositories / "me/mine"), make_model("own_published"))
    assert refused.startswith("StorageError: --push me/other: ")


LOADED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import open_lm, torch
from open_lm.commands.download import main
from open_lm.hf import *
from transformers import AutoModelForCausalLM
folder = main(["lab/published"])
ids = torch.tensor([[5, 3, 8]])
with torch.inference_mode():
    ours, again = open_lm.load_model("hf://lab/published")(ids)[0], open_lm.load_model(folder)(ids)[0]
    theirs = AutoModelForCausalLM.from_pretrained("lab/published").eval()(ids).logits
print(json.dumps({"same": torch.equal(ours, again), "off": (ours - theirs).abs().max().item()}))
"""


def test_a_published_model_is_downloaded_and_loaded_by_its_name_everywhere(repositories, tmp_path):
    published_folder.make(repositories / "lab/published", nested=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with serve(repositories) as (_, endpoint):
        done = subprocess.run(
            [sys.executable, "-c", LOADED, str(ROOT)], capture_output=True, text=True,
            env={**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["off"] < 1e-4


@pytest.mark.parametrize("url", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf://../../etc"])
def test_urls_that_name_no_model_are_refused(url):
    with pytest.raises(ConfigError, match="not a model on the Hub"):
        HubModel.parse(url)


def test_urls_name_repository_and_revision():
    assert HubModel.parse("hf://mlfoundations/open_lm_1B@v1.0") == HubModel("mlfoundations/open_lm_1B", "v1.0")
    assert HubModel.parse("hf://a/b/") == HubModel("a/b", None)
