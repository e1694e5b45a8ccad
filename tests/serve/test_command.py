"""`openlm serve` as a process: what it says, what it refuses, and how it ends."""

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from serve_setup import httpx, started

from open_lm.errors import ConfigError
from open_lm.serve.__main__ import main, require_device

ROOT = Path(__file__).resolve().parents[2]


def served(folder, *flags):
    """The process that serves the first model, and its url."""
    files = ["--checkpoint", folder / "first.pt", "--tokenizer", folder / "tokenizer.json"]
    return started([*files, *flags], cwd=folder)


def test_an_empty_key_is_refused(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"--api-key .* is empty"):
        main(["--checkpoint", str(folder / "first.pt"), "--api-key", ""])
    monkeypatch.setenv("OPENLM_API_KEY", " ")
    with pytest.raises(ConfigError, match=r"OPENLM_API_KEY.* is empty"):
        main(["--checkpoint", str(folder / "first.pt")])


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(folder, stream):
    process, url = served(folder, "--slots", "2")
    body = {"prompt": "a long story", "max_tokens": 243, "temperature": 0, "n": 12, "stream": stream}
    found = {}

    def ask():
        found["answer"] = httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    asking = threading.Thread(target=ask)
    try:
        asking.start()
        while "openlm_texts_running" not in (text := httpx.get(f"{url}/metrics").text) or " 2\n" not in text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{url}/v1/completions", json={**body, "n": 1}, timeout=5)
        asking.join(timeout=60)
        assert found["answer"].status_code == 200
        if stream:
            lines = [line for line in found["answer"].text.splitlines() if line]
            assert lines[-1] == "data: [DONE]"
            ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
            assert ends.count("length") == 12
        else:
            assert len({choice["text"] for choice in found["answer"].json()["choices"]}) == 1
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_what_takes_longer_than_the_grace_is_told_that_the_server_shut_down(folder, stream):
    process, url = served(folder, "--slots", "1", "--grace-seconds", "0.2", "--max-queue", "200")
    body = {"prompt": "a long story", "max_tokens": 243, "temperature": 0, "n": 120, "stream": stream}
    threading.Timer(1.0, process.send_signal, [signal.SIGTERM]).start()
    try:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == (200 if stream else 503)
        assert '"message":"The server shut down before this was written."' in answer.text
        assert process.wait(timeout=20) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def test_a_port_that_is_taken_is_an_error_before_any_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"--port \d+: .*in use"):
        main(["--checkpoint", "nowhere", "--port", str(taken.getsockname()[1])])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "x", "--port", "70000"], "--port 70000"),
        (["--checkpoint", "x", "y", "--adapter", "z"], "--adapter belongs to one"),
        (["--checkpoint", "x", "--slots", "0"], "--slots 0"),
        (["--checkpoint", "x", "--hots", "0"], "did you mean --host"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, says):
    with pytest.raises(ConfigError, match=says):
        main(flags)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ConfigError, match=f"--device {device}: .* Give cpu"):
        require_device(device)


def test_without_its_packages_the_command_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match="pip install fastapi uvicorn"):
        main(["--checkpoint", "x"])


def test_models_have_names_of_their_own_and_adapters_are_merged(folder, tmp_path):
    from open_lm.checkpoint.load_model import load_model
    from open_lm.model.config import ModelFlags
    from open_lm.model.lora import adapt
    from open_lm.post_training.peft_format import save_adapter
    from open_lm.serve.__main__ import state_of_flags
    from open_lm.serve.config import ServeConfig

    model = load_model(str(folder / "first.pt"))
    adapt(model, 2, 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(model, model.config, tmp_path / "polite")
    config = ServeConfig(
        checkpoint=(str(folder / "first.pt"),), tokenizer=str(folder / "tokenizer.json"), device="cpu",
        adapter=(str(tmp_path / "polite"),),
    )  # fmt: skip
    state = state_of_flags(config, ModelFlags())
    assert list(state.models) == [f"{folder.name}-first", "polite"]
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(state.model("polite").service.model(ids)[0], model.eval()(ids)[0], atol=1e-4, rtol=1e-4)
    twice = ServeConfig(checkpoint=(str(folder / "first.pt"),) * 2, tokenizer=config.tokenizer, device="cpu")
    assert list(state_of_flags(twice, ModelFlags()).models) == [f"{folder.name}-first", f"{folder.name}-first-2"]
