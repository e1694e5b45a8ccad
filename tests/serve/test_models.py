"""Models that can be served: one as DCLM published it, from a folder and from a Hub, with its own tokenizer."""

import published_folder
import pytest
import torch
from hub_server import serve
from serve_setup import httpx, running, started


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`(folder, ids, fp64 logits)` of a model with norms of queries and keys."""
    return published_folder.make(tmp_path_factory.mktemp("hub") / "lab" / "DCLM-tiny", nested=False)


def check(url, ids, logits):
    """A served model's log-probabilities are those of the logits."""
    for row, expected in zip(ids.tolist(), logits.double().log_softmax(-1), strict=True):
        body = {"prompt": row, "max_tokens": 0, "echo": True, "logprobs": 0}
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
        own = expected[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
        assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)


def test_a_model_as_dclm_published_it_is_served(published):
    folder, ids, logits = published
    with running(folder, checkpoint=(str(folder),), tokenizer=None) as (url, state):
        assert list(state.models) == ["DCLM-tiny"] and state.first.service.model.config.qk_norm
        check(url, ids, logits)


@pytest.mark.slow
def test_a_model_of_the_hub_is_served(published, tmp_path):
    folder, ids, logits = published
    with serve(folder.parents[1]) as (_, endpoint):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        process, url = started(["--checkpoint", "hf://lab/DCLM-tiny"], **environment)
        try:
            check(url, ids, logits)
        finally:
            process.kill()
            process.stderr.close()
