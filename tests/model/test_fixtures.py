"""OpenLM's own checkpoints give OpenLM's own logits."""

from argparse import ArgumentParser

import pytest
import torch
from shared import SHARED, needs_shared

from open_lm.flags import add_group, read_group
from open_lm.model import create_model
from open_lm.model.config import ModelFlags
from open_lm.weights.file import clean_state_dict, load_file

FOLDER = SHARED / "fixtures" / "openlm_checkpoints"
NAMES = ["gain_only_qknorm", "gelu_lp", "head_rotary", "llama_rotary_rms", "rotary_layernorm"]


@pytest.fixture(params=NAMES)
def fixture(request):
    """A model with a fixture's weights, and what OpenLM computed with it."""
    if not FOLDER.is_dir():
        pytest.skip(f"no shared fixtures at {FOLDER}")
    expected = torch.load(FOLDER / f"{request.param}.logits.pt", weights_only=True)
    parser = ArgumentParser()
    add_group(parser, ModelFlags)
    flags = read_group(
        parser.parse_args(["--model", str(FOLDER / f"{request.param}.json"), *expected["flags"]]), ModelFlags
    )
    model = create_model(flags).eval()
    model.load_state_dict(clean_state_dict(load_file(str(FOLDER / f"{request.param}.pt"))))
    return model, expected


@needs_shared
def test_logits_are_those_of_openlm(fixture):
    model, expected = fixture
    with torch.no_grad():
        logits, hidden, past = model(expected["input_ids"])
    assert logits.dtype == torch.float32 and hidden.shape == (2, 48, 64) and past is None
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@needs_shared
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_logits_after_a_cache_are_those_of_openlm(fixture, kind):
    model, expected = fixture
    ids = expected["input_ids"]
    with torch.no_grad():
        past = model(ids[:, :40], model.new_cache(2, 41) if kind == "static" else None, use_cache=True)[2]
        logits = model(ids[:, 40:41], past, use_cache=True)[0]
    torch.testing.assert_close(logits, expected["kv_logits_at_40"], atol=1e-4, rtol=0)
