"""Attention under windows, documents and padding equals fp64 attention under a mask written out pair by pair."""

import math

import pytest
import torch

from open_lm.errors import ConfigError
from open_lm.model import attend_masked
from open_lm.model.architecture import ModelConfig
from open_lm.model.attention_core import build_attend
from open_lm.model.mask import WHOLE, Mask, Reach

B, S, H, G, K = 2, 37, 4, 2, 16
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 20 + [3] * 11, [0] * 30 + [1] * 7])
REAL = torch.arange(S)[None] >= torch.tensor([[0], [9]])


class Chunks(Reach):
    """Another shape, as a change to the package would add it: keys of the same chunk of `window`."""

    def rule(self):
        return lambda query, key: (key <= query) & (key // self.window == query // self.window)

    def first_key(self, query):
        return query // self.window * self.window


RULES = {
    "causal": {},
    "window": {"reach": Reach(6)},
    "window of one": {"reach": Reach(1)},
    "window beyond the sequence": {"reach": Reach(50)},
    "documents": {"documents_BS": DOCUMENTS},
    "documents and window": {"documents_BS": DOCUMENTS, "reach": Reach(6)},
    "padding and window": {"real_BS": REAL, "reach": Reach(6)},
    "chunks": {"reach": Chunks(7)},
}
BACK_ENDS = {"auto": {}, "torch_attn": {}, "custom_attn": {"attn_activation": "softmax"}}


def sees(row, query, key, reach=WHOLE, documents_BS=None, real_BS=None):
    if isinstance(reach, Chunks):
        near = key // reach.window == query // reach.window
    else:
        near = reach.window is None or query - key < reach.window
    seen = key <= query and near
    if documents_BS is not None:
        seen = seen and documents_BS[row, query] == documents_BS[row, key]
    return (seen and (real_BS is None or real_BS[row, key])) or (real_BS is not None and key == query)


def expected(q, k, v, rule):
    """(B, T, H, K) in fp64, one query at a time; the queries are the last of the keys."""
    out, first = torch.zeros(q.shape, dtype=torch.float64), k.shape[1] - q.shape[1]
    for b in range(B):
        for t in range(q.shape[1]):
            keys = [s for s in range(k.shape[1]) if sees(b, first + t, s, **rule)]
            for h in range(H):
                g = h // (H // G)
                weights = (k[b, keys, g].double() @ q[b, t, h].double() / math.sqrt(K)).softmax(0)
                out[b, t, h] = weights @ v[b, keys, g].double()
    return out


def qkv(n_queries=S):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, n_queries, H, K), (B, S, G, K), (B, S, G, K))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attend_masked, "QUERY_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n_queries", [S, 11, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_every_back_end_equals_the_definition(name, rule, n_queries):
    config = ModelConfig(H * K, 1, H, S, 16, n_kv_heads=G, attn_name=name, **BACK_ENDS[name])
    q, k, v = qkv(n_queries)
    mixed = build_attend(config)(q, k, v, Mask(n_queries, S, q.device, **RULES[rule]))
    torch.testing.assert_close(mixed.detach().double(), expected(q, k, v, RULES[rule]), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rule", ["window", "documents and window"])
def test_gradients_equal_those_of_the_dense_mask(rule):
    mask = Mask(S, S, torch.device("cpu"), **RULES[rule])
    blocked, dense = qkv(), qkv()
    attend_masked.in_blocks(*blocked, mask).square().sum().backward()
    attend_masked.attention(*dense, visible=mask.dense()).square().sum().backward()
    for one, other in zip(blocked, dense, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("rule", "n_queries"), [*((rule, S) for rule in list(RULES)[1:]), ("documents and window", 11)]
)
def test_flex_attention_is_given_the_same_mask(rule, n_queries):
    q, k, v = (x.detach() for x in qkv(n_queries))
    mask = Mask(n_queries, S, q.device, **RULES[rule])
    found = attend_masked.by_flex(q, k, v, mask, compiled=False)
    torch.testing.assert_close(found.double(), expected(q, k, v, RULES[rule]), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_read_only_keys_that_are_seen():
    mask = Mask(S, S, torch.device("cpu"), **RULES["documents and window"])
    ranges = [mask.keys_seen(slice(start, min(start + 8, S))) for start in range(0, S, 8)]
    assert [(keys.start, keys.stop) for keys in ranges] == [(0, 8), (3, 16), (11, 24), (19, 32), (27, 37)]
    documents = Mask(S, S, torch.device("cpu"), documents_BS=DOCUMENTS[:1])
    assert documents.keys_seen(slice(32, 37)) == slice(26, 37)


def test_a_window_costs_what_its_positions_see():
    def flops(window):
        return ModelConfig(64, 1, 4, 100, 16, sliding_window=window).mixing_flops_per_token

    seen = [sum(min(t + 1, w) for t in range(100)) / 100 for w in (10, 100)]
    assert flops(None) == flops(100) == flops(500) == 12 * 64 * 50
    assert flops(10) == pytest.approx(12 * 64 * seen[0], rel=0.06)


def test_a_window_must_be_a_count_and_excludes_scaling_by_length():
    with pytest.raises(ConfigError, match="sliding_window"):
        ModelConfig(64, 1, 4, 100, 16, sliding_window=0)
    scaled = {"attn_name": "custom_attn", "attn_activation": "relu", "attn_seq_scalar": "max"}
    with pytest.raises(ConfigError, match=r"sliding_window: not with --attn-seq-scalar max"):
        ModelConfig(64, 1, 4, 100, 16, sliding_window=8, attn_seq_scalar_alpha=1.0, **scaled)
