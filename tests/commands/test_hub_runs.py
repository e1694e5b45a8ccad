"""Runs that begin on the Hub: --pretrained and --model hf://…, against a Hub on this machine."""

import json

import pytest
import torch
from hub_server import serve
from runs import SEQ_LEN, VOCAB, flags, metrics, run_command, weights, write_data

from open_lm.model import create_model
from open_lm.model.config import ModelConfig

SIZES = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB, "qk_norm": True}


@pytest.fixture
def hub(tmp_path):
    """`(endpoint environment, the model that the Hub has)`: a folder as DCLM's, and one that says nothing."""
    torch.manual_seed(5)
    model = create_model(ModelConfig(**SIZES))
    keys = {"dim": 16, **{name: value for name, value in SIZES.items() if name != "hidden_dim"}}
    for name, config in {"dclm": {"model_type": "openlm", "params_args_dict": keys}, "silent": {"any": 1}}.items():
        folder = tmp_path / "hub/lab" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        torch.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "model.pt")
    with serve(tmp_path / "hub") as (_, endpoint):
        env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        yield {**env, "HF_HUB_OFFLINE": "0"}, model


def arguments(tmp_path, *extra, **kwargs):
    manifest = write_data(tmp_path / "data") if not (tmp_path / "data").exists() else tmp_path / "data/manifest.jsonl"
    out = flags(tmp_path, str(manifest), *extra, **kwargs)
    at = out.index("--model")
    return out[:at] + out[at + 2 :]


def test_training_starts_from_a_models_weights_and_architecture_and_again_without_network(tmp_path, hub):
    env, model = hub
    more = ["--pretrained", "hf://lab/dclm@v1", "--lr", "1e-12", "--wd", "0"]
    done = run_command(arguments(tmp_path, *more, steps=2), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(weights(tmp_path), model.state_dict())
    offline = {**env, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = run_command(arguments(tmp_path, *more, steps=2, name="again"), env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(tmp_path, name="again") == metrics(tmp_path)


def test_model_from_the_hub_is_its_architecture_with_new_weights(tmp_path, hub):
    env, model = hub
    done = run_command(arguments(tmp_path, "--model", "hf://lab/dclm", "--lr", "1e-12", steps=1), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = weights(tmp_path)
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert not torch.equal(trained["output.weight"], model.output.weight)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pretrained", "hf://lab/nothing"], "hf://lab/nothing: no such model, or a private one"),
        (["--model", "hf://lab/silent"], "hf://lab/silent does not say which model it is of"),
        (["--model", "hf://name"], "hf://name: not a model on the Hub"),
        (
            ["--pretrained", "hf://lab/dclm", "--model", "open_lm_test_tiny"],
            "hf://lab/dclm is of another model: qk_norm True (here False)",
        ),
    ],
)
def test_what_cannot_be_had_is_named(tmp_path, hub, more, said):
    done = run_command(arguments(tmp_path, *more), env=hub[0])
    assert done.returncode not in (0, 1) and "Traceback" not in done.stderr
    assert said in done.stderr
