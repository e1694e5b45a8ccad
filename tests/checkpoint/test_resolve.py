"""One place says what a checkpoint's name means; facts cost no weights, and no file is hashed twice."""

import json

import pytest
import torch
from checkpoint.states import CONFIG, STATS, NoData, make_checkpoints, make_state, take_steps
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file

import open_lm
from open_lm.checkpoint import checksum, consolidate, read
from open_lm.checkpoint.describe import describe
from open_lm.checkpoint.read import read_checkpoint, read_facts, stored_config
from open_lm.checkpoint.resolve import resolve
from open_lm.errors import CheckpointError
from open_lm.evaluate.eval_model import load_eval_model


@pytest.fixture(params=["consolidated", "sharded"])
def run(request, tmp_path):
    """A run folder with one checkpoint after 2 steps."""
    checkpoints = make_checkpoints(tmp_path / "run" / "checkpoints", checkpoint_format=request.param, async_save=False)
    state = make_state()
    take_steps(state, 2)
    assert checkpoints.save(state, NoData(), label="1", stats=STATS)
    return tmp_path / "run"


@pytest.fixture
def cost(monkeypatch):
    """Counts of the hashes of each file, and of the bytes of weights read out of shards."""
    hashed, read_tensors = checksum.record_of, read.read_tensors
    seen = {"hashed": [], "weights": 0}

    def counting_hash(path, algorithm):
        seen["hashed"].append(path)
        return hashed(path, algorithm)

    def counting_read(*words):
        tensors = read_tensors(*words)
        seen["weights"] += sum(t.numel() * t.element_size() for t in tensors.values())
        return tensors

    monkeypatch.setattr(checksum, "record_of", counting_hash)
    monkeypatch.setattr(read, "read_tensors", counting_read)
    return seen


def test_the_architecture_is_read_without_weights_and_without_hashing_them(run, cost):
    assert stored_config(str(run))["model"] == CONFIG.to_dict()
    assert read_facts(str(run))["step"] == 2
    assert cost["weights"] == 0
    assert not any(path.endswith(("epoch_1.pt", ".distcp", "optimizer_1.pt")) for path in cost["hashed"])


def test_a_model_is_loaded_with_every_file_hashed_once_and_the_optimizer_not_at_all(run, cost):
    open_lm.load_model(run)
    assert len(cost["hashed"]) == len(set(cost["hashed"]))
    assert not any("optimizer_" in path for path in cost["hashed"])


def test_every_name_of_a_checkpoint_means_the_same(run, tmp_path):
    found = resolve(str(run))
    for name in (run / "checkpoints", run / "checkpoints" / "epoch_1.commit.json", found.path, found, tmp_path / "run"):
        assert resolve(name).path == found.path and resolve(name).commit == found.commit
    if found.kind == "shards":
        assert resolve(str(run / "checkpoints" / "epoch_1.pt")).path == found.path
    by_name = read_checkpoint(str(run))["state_dict"]
    assert all(torch.equal(tensor, by_name[name]) for name, tensor in read_checkpoint(found)["state_dict"].items())
    assert describe(str(run))["step"] == 2


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_flipped_bit_in_the_weights_is_found_before_use_and_one_elsewhere_does_not_matter(run, part):
    found = resolve(str(run))
    pattern = {"weights": "epoch_1.pt", "optimizer": "optimizer_1.pt"}[part] if found.kind == "file" else "*/*.distcp"
    path = next((run / "checkpoints").glob(pattern))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    if part == "optimizer" and found.kind == "file":
        open_lm.load_model(run)
        with pytest.raises(CheckpointError, match="does not have the hash"):
            resolve(found, "all")
    else:
        with pytest.raises(CheckpointError, match="damaged"):
            open_lm.load_model(run)
        with pytest.raises(CheckpointError, match="does not have the hash"):
            open_lm.load_model(found.path)


def test_an_evaluation_takes_sharded_checkpoints_and_folders_of_several_files(run, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    from tokenizers import Tokenizer, models

    words = {word: number for number, word in enumerate(["<|endoftext|>", "<|padding|>", "a", "b"])}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tokenizer))
    cpu = torch.device("cpu")
    model = load_eval_model(str(run), str(tokenizer), {}, cpu, None)
    assert model.about.name == "run/epoch_1" and model.about.step == 2

    weights = {name: t for name, t in model.model.state_dict().items() if "inv_freq" not in name}
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "open_lm", **CONFIG.to_dict()}))
    where = {name: f"model-0000{k % 2 + 1}-of-00002.safetensors" for k, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in weights if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    published = load_eval_model(str(folder), str(tokenizer), {}, cpu, None)
    assert torch.equal(published.model.output.weight, model.model.output.weight)
    assert describe(str(folder))["parameters"] == sum(w.numel() for w in weights.values())


def test_consolidated_weights_have_the_format_of_their_name(run, tmp_path):
    if resolve(str(run)).kind == "file":
        pytest.skip("consolidated already")
    expected = read_checkpoint(str(run))["state_dict"]
    for name in ("out.safetensors", "out.pt"):
        consolidate.main([str(run), "--out", str(tmp_path / name)])
        content = (
            torch.load(tmp_path / name)["state_dict"] if name.endswith(".pt") else load_safetensors(tmp_path / name)
        )
        assert all(torch.equal(tensor, content[key]) for key, tensor in expected.items())
