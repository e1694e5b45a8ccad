"""Attention inside documents: packed into one sequence, each gives the logits it gives alone, in every variant."""

import copy

import pytest
import torch
from model.reference import reference_logits

from open_lm.data.batch import Batch
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

BASE = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 24, "vocab_size": 53}
VARIANTS = {
    "rotary": {},
    "pairs, shared keys": {"positional_embedding_type": "llama_rotary", "n_kv_heads": 2},
    "by head": {"positional_embedding_type": "head_rotary", "qk_norm": True},
    "no positions": {"positional_embedding_type": "none", "model_norm": "rms_norm"},
    "custom": {"attn_name": "custom_attn", "attn_activation": "relu_squared"},
    "custom, scaled": {
        "attn_name": "custom_attn",
        "attn_activation": "relu",
        "attn_seq_scalar": "avg",
        "attn_seq_scalar_alpha": 0.5,
    },
}
END = 9
DOCUMENTS = [[1, 2, 3, END], [END], [4, 5, 6, 7, 8, 10, 11, 12, END], [13, END], [14, 15, 16, 17, 18, 19, 20, 21]]


def packed():
    ids_BT = torch.tensor([[token for document in DOCUMENTS for token in document]])
    return Batch(ids_BT, ids_BT).with_documents(END)


def test_documents_are_numbered_and_their_last_token_is_theirs():
    assert packed().documents_BT.tolist() == [[0] * 4 + [1] + [2] * 9 + [3] * 2 + [4] * 8]


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_give_the_logits_of_each_alone(name):
    torch.manual_seed(0)
    config = ModelConfig(**{**BASE, **VARIANTS[name]})
    model, batch = create_model(config), packed()
    expected = [reference_logits(model.state_dict(), config, torch.tensor(document)) for document in DOCUMENTS]
    found = model(batch.inputs_BT, **batch.model_inputs)[0][0]
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(model(batch.inputs_BT)[0][0], found, atol=1e-2)


def test_gradients_are_the_sums_of_those_of_each_document_alone():
    torch.manual_seed(0)
    model, batch = create_model(ModelConfig(**BASE)).double(), packed()
    alone = copy.deepcopy(model)
    model(batch.inputs_BT, **batch.model_inputs)[1].square().sum().backward()
    for document in DOCUMENTS:
        alone(torch.tensor([document]))[1].square().sum().backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_rows_of_a_batch_have_their_own_documents():
    torch.manual_seed(0)
    model = create_model(ModelConfig(**BASE))
    ids_BT = torch.tensor([[1, END, 2, 3], [1, 2, END, 3]])
    batch = Batch(ids_BT, ids_BT).with_documents(END)
    together = model(batch.inputs_BT, **batch.model_inputs)[0]
    for row, part in enumerate(batch.split(2)):
        torch.testing.assert_close(model(part.inputs_BT, **part.model_inputs)[0][0], together[row])
