import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from icl_setup import tiny_model

from open_lm.evaluate.engine.batching import plan_batches
from open_lm.evaluate.engine.encode import Choice, Question
from open_lm.evaluate.engine.metrics import measure
from open_lm.evaluate.engine.scoring import Score, Scorer
from open_lm.evaluate.engine.token_stats import token_stats
from open_lm.evaluate.tasks.task import LM_ACCURACY, LM_CALIBRATION, MC_ACCURACY, MC_CALIBRATION
from open_lm.model import create_model
from open_lm.model.architecture import MambaConfig
from open_lm.precision import Precision

ids = st.lists(st.integers(0, 399), min_size=1, max_size=9).map(tuple)
endings = st.one_of(st.just(()), st.lists(st.integers(0, 399), min_size=1, max_size=5).map(tuple))
questions = st.builds(
    lambda context, choices: Question(tuple(Choice(context + ending, c) for ending, c in choices), 0, False),
    ids,
    st.one_of(
        st.lists(st.tuples(st.just(()), ids), min_size=1, max_size=4),
        st.lists(st.tuples(endings, ids), min_size=1, max_size=4),
    ),
)
"""Choices of one context, or of several that begin alike."""


def reference(model, context, continuation):
    """One sequence alone, all its logits, in fp64 from the logits on."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]))[0][0].double()
    log_p = logits.log_softmax(-1)[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    chosen = log_p[torch.arange(len(target)), target]
    return Score(
        float(-chosen.mean()), bool((log_p.argmax(-1) == target).all()), float(chosen.exp().mean()),
        float(log_p.max(-1).values.exp().min()),
    )  # fmt: skip


def scores_of(model, asked, budget, share=True):
    scorer = Scorer(model, torch.device("cpu"), Precision("fp32", "cpu"))
    batches = plan_batches(asked, budget, share_beginnings=share)
    found = [scorer.score(batch) for batch in batches]
    assert sum(len(part) for part in found) == sum(len(question.choices) for question in asked)
    return {name: score for part in found for name, score in part.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(questions, min_size=1, max_size=6), st.sampled_from([1, 40, 4096]), st.booleans())
def test_every_continuation_scores_as_it_does_alone(model, asked, budget, share):
    scores = scores_of(model, asked, budget, share)
    for number, question in enumerate(asked):
        for index, choice in enumerate(question.choices):
            expected = reference(model, choice.context, choice.continuation)
            assert scores[number, index] == pytest.approx(expected, rel=2e-4, abs=1e-6)


KINDS = {
    "rotary": {"positional_embedding_type": "rotary", "qk_norm": True, "model_norm": "gain_only_layer_norm"},
    "head_rotary": {"positional_embedding_type": "head_rotary"},
    "none": {"positional_embedding_type": "none"},
    "window": {"sliding_window": 3, "n_kv_heads": 1},
    "relu": {"attn_name": "custom_attn", "attn_activation": "relu", "attn_seq_scalar": "none"},
    "experts": {"moe_freq": 1, "moe_num_experts": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_begin_alike_run_once_in_every_kind_of_model(kind):
    model = tiny_model(**KINDS[kind])
    same = tuple(Choice((5, 6, 7, 8), continuation) for continuation in ((8,), (9, 10, 11), (9, 10, 12, 13)))
    longer = tuple(Choice((5, 6, 7, 8, 9, *ending), (12, 13)) for ending in ((), (14,), (15, 16)))
    apart = tuple(Choice((1, *range(n, n + 9)), (7, 7)) for n in (20, 40, 60))
    chains = tuple(Choice((n, 3, 2), (n, *range(n % 7))) for n in range(30, 36))
    asked = [Question(choices, 0, False) for choices in (same, longer, apart, chains)]
    scores = scores_of(model, asked, 4096)
    for number, question in enumerate(asked):
        for index, choice in enumerate(question.choices):
            expected = reference(model, choice.context, choice.continuation)
            assert scores[number, index] == pytest.approx(expected, rel=2e-4)


def test_rows_of_several_lengths_score_as_each_alone_where_a_model_takes_whole_rows():
    torch.manual_seed(0)
    model = create_model(MambaConfig(d_model=24, n_layer=2, vocab_size=53, seq_len=40)).eval()
    choices = Choice((5, 6, 7), (8,)), Choice((9, 6), (9, 10, 11, 12)), Choice((3,), (4, 5, 6, 7, 8, 9, 10))
    asked = [Question((choice,), 0, False) for choice in choices]
    assert [len(batch.trees) for batch in plan_batches(asked, 4096, share_beginnings=False)] == [3]
    scores = scores_of(model, asked, 4096, share=False)
    for number, choice in enumerate(choices):
        expected = reference(model, choice.context, choice.continuation)
        assert scores[number, 0] == pytest.approx(expected, rel=2e-4)


def test_beginnings_of_all_questions_run_once():
    choices = [Choice((1, 2, 3, 4, n), (9, 9)) for n in range(2)]
    (batch,) = plan_batches([Question(tuple(choices), 0, False), Question((Choice((1, 2, 3), (4, 8)),), 0, False)], 100)
    (tree,) = batch.trees
    assert (tree.tree.tokens, tree.tree.depths) == ((1, 2, 3, 4, 0, 9, 1, 9), (0, 1, 2, 3, 4, 5, 4, 5))
    assert tree.tree.ends == (8, 8, 8, 8, 6, 6, 8, 8)
    places = dict(zip(tree.names, tree.places, strict=True))
    assert places == {(1, 0): (2, 3), (0, 0): (4, 5), (0, 1): (6, 7)}
    assert batch.n_questions == 2


def test_choices_of_one_token_add_nothing_to_their_context():
    asked = [Question(tuple(Choice((n, 1, 2), (c,)) for c in range(4)), 0, False) for n in range(3)]
    (batch,) = plan_batches(asked, 4096)
    assert [tree.tree.tokens for tree in batch.trees] == [(n, 1, 2) for n in range(3)]


def test_what_shares_too_little_with_a_large_tree_stays_by_itself():
    alike = [Choice((1, *range(1000 * n, 1000 * n + 600)), (9,)) for n in range(3)]
    (batch,) = plan_batches([Question(tuple(alike), 0, False)], 4096)
    assert [len(tree.tree.tokens) for tree in batch.trees] == [601] * 3


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Sequences of several blocks, even where there are few."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("open_lm.evaluate.engine.batching.BLOCK_TOKENS", 60)
        yield


few_ids = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
alike = st.lists(st.builds(Choice, few_ids, few_ids), min_size=1, max_size=4)


@given(st.lists(alike.map(lambda choices: Question(tuple(choices), 0, False)), max_size=20), st.integers(1, 60),
       st.booleans())  # fmt: skip
def test_batches_hold_every_choice_once_within_their_budget(asked, budget, share):
    batches = plan_batches(asked, budget, share_beginnings=share)
    names = [name for batch in batches for tree in batch.trees for name in tree.names]
    assert sorted(names) == sorted((n, c) for n, q in enumerate(asked) for c in range(len(q.choices)))
    for batch in batches:
        sizes = [len(tree.tree.tokens) for tree in batch.trees]
        assert sizes == [tree.n_nodes for tree in batch.planned]
        assert [tree.tree.is_chain for tree in batch.trees] == [tree.is_chain for tree in batch.planned]
        assert len(sizes) == 1 or (sum(sizes) if share else max(sizes) * len(sizes)) <= budget
        for tree in batch.trees:
            ways = set()
            for (number, index), places, targets in zip(tree.names, tree.places, tree.targets, strict=True):
                choice = asked[number].choices[index]
                way = tuple(n for n in range(places[-1] + 1) if tree.tree.ends[n] > places[-1])
                assert tuple(tree.tree.tokens[n] for n in way) == choice.context + choice.continuation[:-1]
                assert [tree.tree.depths[n] for n in way] == list(range(len(way)))
                assert places == way[len(choice.context) - 1 :] and targets == choice.continuation
                ways.update(way)
            assert ways == set(range(len(tree.tree.tokens)))


def measured(name, golds, *per_question):
    asked = [
        Question((Choice((1,), (1,)),) * len(scores), gold, False)
        for gold, scores in zip(golds, per_question, strict=True)
    ]
    flat = {(n, c): Score(*score) for n, scores in enumerate(per_question) for c, score in enumerate(scores)}
    return measure([name], asked, flat)[name]


def with_loss(*losses):
    return [(loss, False, 0.0, 0.0) for loss in losses]


def test_accuracies_by_hand():
    # least cross-entropy wins, of equals the first: right, wrong, right
    found = measured(MC_ACCURACY, [1, 1, 0], with_loss(2, 0), with_loss(1, 1), with_loss(3, 3.5))
    assert found.value == pytest.approx(2 / 3)
    assert found.stderr == pytest.approx(math.sqrt(2 / 9 / 2))
    found = measured(LM_ACCURACY, [0, 0], [(1, True, 0, 0)], [(1, False, 0, 0)])
    assert (found.value, found.n_questions) == (0.5, 2)


def test_calibration_errors_by_hand():
    # confidences 0.62 (right) and 0.68 (wrong) share the bucket around 0.65; 1.0 (right) falls in the last, around 0.95
    found = measured(LM_CALIBRATION, [0, 0, 0], [(1, True, 0, 0.62)], [(1, False, 0, 0.68)], [(1, True, 0, 1.0)])
    assert found.value == pytest.approx(2 / 3 * abs(0.5 - 0.65) + 1 / 3 * abs(1 - 0.95))
    # 0.3 of 0.4 together is a confidence of 0.75, and right
    found = measured(MC_CALIBRATION, [0], [(1, False, 0.3, 0), (1, False, 0.1, 0)])
    assert found.value == pytest.approx(0.25)


def test_overflowing_perplexities_are_equal_and_the_first_wins():
    assert measured(MC_ACCURACY, [0], with_loss(200, 100)).value == 1.0


def test_equal_logits_count_only_for_the_first_token(small_tiles):
    logits = torch.tensor([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    stats = token_stats(logits, torch.eye(3), torch.arange(3), torch.tensor([1, 2, 1]))
    assert stats[:, 1].tolist() == [1.0, 0.0, 0.0]
    assert stats[:, 3].tolist() == pytest.approx([math.e**2 / (1 + 2 * math.e**2)] * 2 + [math.e / (2 + math.e)])


@pytest.fixture(params=[(2, 1), (2, 2), (3, 4), (512, 2048)], ids=str)
def small_tiles(request, monkeypatch):
    """Chunks of so many positions and tiles of so many columns, down to those where every one is a case of its own."""
    monkeypatch.setattr("open_lm.evaluate.engine.token_stats.CHUNK_ROWS", request.param[0])
    monkeypatch.setattr("open_lm.evaluate.engine.token_stats.TILE_COLUMNS", request.param[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_judged_as_by_a_softmax_over_all_logits(small_tiles, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype) for size in [(7, 5), (11, 5)])
    weight[3] = weight[8]  # two tokens that are always equally likely
    rows = torch.arange(7).repeat_interleave(11)
    stats = token_stats(hidden, weight, rows, torch.arange(11).repeat(7)).view(7, 11, 4)
    logits = (hidden @ weight.T).double()
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(stats[..., 0].double(), -log_p, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[..., 2].double(), log_p.exp(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        stats[..., 3].double(), log_p.exp().amax(-1, keepdim=True).expand(7, 11), rtol=1e-5, atol=0
    )
    assert (stats[..., 1].argmax(-1) == logits.argmax(-1)).all()
    assert (stats[..., 1].sum(-1) == 1).all()


def test_forwards_are_counted_alike_for_ranks_that_idle(model):
    calls = itertools.count()
    handle = model.norm.register_forward_hook(lambda *_: next(calls))
    try:
        Scorer(model, torch.device("cpu"), Precision("fp32", "cpu")).idle(3)
    finally:
        handle.remove()
    assert next(calls) == 3
