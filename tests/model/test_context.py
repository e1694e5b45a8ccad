"""Context parallelism without ranks: the parts of a sequence, computed one after the other, give the whole."""

import pytest
import torch

from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.model.context import SequencePart

BASE = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 24, "vocab_size": 53}
VARIANTS = {
    "rotary, shared keys": {"n_kv_heads": 2},
    "pairs, qk norm": {"positional_embedding_type": "llama_rotary", "qk_norm": True},
    "by head": {"positional_embedding_type": "head_rotary"},
    "window": {"sliding_window": 5},
    "custom": {"attn_name": "custom_attn", "attn_activation": "relu_squared"},
}


@pytest.mark.parametrize("n_parts", [1, 2, 4])
def test_every_position_is_in_one_part_and_causal_work_is_even(n_parts):
    parts = [SequencePart(r, n_parts, lambda x: x) for r in range(n_parts)]
    places = [part.positions(16, torch.device("cpu")) for part in parts]
    assert torch.cat(places).sort().values.tolist() == list(range(16 * n_parts))
    assert len({int(p.sum()) for p in places}) == 1


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_parts_computed_in_lockstep_give_the_logits_of_the_whole(name, documents):
    torch.manual_seed(0)
    model = create_model(ModelConfig(**BASE, **VARIANTS[name])).eval()
    ids_BT = torch.randint(0, 53, (2, 24))
    packed = {"documents_BT": torch.arange(24).expand(2, 24) // 9} if documents else {}
    whole = model(ids_BT, **packed)[0]
    parts = in_lockstep(model, ids_BT, packed, n_parts=2)
    for part, logits in parts:
        torch.testing.assert_close(logits, part.take(whole), atol=1e-5, rtol=1e-5)


def in_lockstep(model, ids_BT, packed, n_parts):
    """Each part's logits: rank r's keys of a layer are known once all parts have been through the layer before, so the
    passes are repeated until the keys no longer change."""
    known = [[None] * len(model.layers) for _ in range(n_parts)]
    for _ in range(len(model.layers) + 1):
        results = []
        for number in range(n_parts):
            layer = iter(range(len(model.layers)))

            def gathered(mine, number=number, layer=layer):
                at = next(layer)
                known[number][at] = mine
                return torch.cat([mine if other[at] is None else other[at] for other in known], dim=1)

            part = SequencePart(number, n_parts, gathered)
            results.append((part, model(part.take(ids_BT), part=part, **packed)[0]))
    return results
