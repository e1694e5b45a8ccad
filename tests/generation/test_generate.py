"""Generated texts, against transformers' on the same weights and against the definitions."""

import logging

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import open_lm
from open_lm.errors import ConfigError
from open_lm.generation import generate, sampling
from open_lm.generation.config import GenerateConfig
from open_lm.generation.padded import Repetition
from open_lm.generation.sampling import inverse_cdf, keep_min_p, keep_top_k, keep_top_p, next_tokens
from open_lm.model import create_model
from open_lm.model.config import ModelConfig


def theirs(llama, prompts, **settings):
    """Continuations by transformers, one prompt at a time, unpadded."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **settings)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def test_greedy_equals_transformers_token_for_token_in_a_batch_of_different_lengths(model, llama, prompts):
    ours = open_lm.generate(model, prompts, temperature=0, max_gen_len=30)
    assert ours == theirs(llama, prompts, max_new_tokens=30)


def test_greedy_with_repetition_penalty_equals_transformers(model, llama, prompts):
    ours = generate(model, prompts, temperature=0, max_gen_len=30, repetition_penalty=1.7)
    assert ours == theirs(llama, prompts, max_new_tokens=30, repetition_penalty=1.7)
    assert ours != generate(model, prompts, temperature=0, max_gen_len=30)


def test_without_a_cache_the_text_is_the_same(model, prompts):
    settings = {"temperature": 1.0, "max_gen_len": 12, "seed": 4}
    assert generate(model, prompts, **settings) == generate(model, prompts, use_cache=False, **settings)


def test_a_seed_repeats_itself_and_another_differs(model, prompts):
    first, again, other = (generate(model, prompts, max_gen_len=20, temperature=1.5, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_a_text_ends_before_a_stop_token_and_the_others_go_on(model, prompts):
    free = generate(model, prompts, temperature=0, max_gen_len=20)
    stop = free[1][4]
    stopped = generate(model, prompts, temperature=0, max_gen_len=20, stop_ids=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[1]) <= 4


def test_watch_sees_every_token_and_ends_its_row(model, prompts):
    seen = []

    def watch(row, tokens):
        seen.append((row, tokens[-1]))
        return row == 0 and len(tokens) == 3

    free = generate(model, prompts, temperature=0, max_gen_len=8)
    rows = generate(model, prompts, temperature=0, max_gen_len=8, watch=watch)
    assert rows == [free[0][:3], *free[1:]]
    assert [token for row, token in seen if row == 1] == free[1]


def test_writing_stops_at_the_end_of_the_context_and_says_so(model, prompts, caplog):
    with caplog.at_level(logging.WARNING):
        (row,) = generate(model, [prompts[1]], temperature=0, max_gen_len=1000)
    assert len(row) == 48 - 9
    assert "leaves room for 39 of 1000" in caplog.text


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([list(range(48))], "prompt 0 has 48 tokens"),
        ([[61]], "ids 61 to 61"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(model, bad, found):
    with pytest.raises(ConfigError, match=found):
        generate(model, bad)


@pytest.mark.parametrize("scalar", ["max", "avg"])
def test_attention_that_counts_keys_does_not_count_padding(prompts, scalar):
    custom = {"attn_name": "custom_attn", "attn_activation": "relu", "attn_seq_scalar": scalar}
    sizes = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 48, "vocab_size": 61}
    torch.manual_seed(0)
    model = create_model(ModelConfig(**sizes, **custom, attn_seq_scalar_alpha=0.7))
    alone = [generate(model, [prompt], temperature=0, max_gen_len=12)[0] for prompt in prompts]
    assert generate(model, prompts, temperature=0, max_gen_len=12) == alone
    assert len({tuple(row) for row in alone}) == 3


@pytest.mark.parametrize(
    "settings",
    [{"max_gen_len": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
     {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"num_beams": 0}, {"num_beams": 2, "use_cache": False}],
)  # fmt: skip
def test_settings_out_of_range_name_their_flag(settings):
    with pytest.raises(ConfigError, match="--" + next(iter(settings)).replace("_", "-")):
        GenerateConfig(**settings)


LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    ("ours", "warper"),
    [
        (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
        (lambda x: keep_top_p(x, 0.8), TopPLogitsWarper(0.8)),
        (lambda x: keep_min_p(x, 0.1), MinPLogitsWarper(0.1)),
    ],
)
def test_each_filter_keeps_what_transformers_keeps(ours, warper):
    expected = LogitsProcessorList([warper])(torch.zeros(5, 1, dtype=torch.long), LOGITS.clone())
    assert torch.equal(ours(LOGITS), expected)
    assert 0 < torch.isinf(expected).sum() < expected.numel()


def test_a_filter_keeps_the_likeliest_token_even_when_it_holds_the_whole_share():
    logits = torch.tensor([[100.0, 0.0, 0.0]])
    for kept in (keep_top_p(logits, 1e-6), keep_min_p(logits, 1.0), keep_top_k(logits, 1)):
        assert kept.isfinite().tolist() == [[True, False, False]]


def test_repetition_penalty_counts_text_but_not_padding():
    ids, mask = torch.tensor([[0, 3, 5], [0, 0, 2]]), torch.tensor([[False, True, True], [True, True, True]])
    ours = Repetition(1.5, ids, mask, 40).applied(LOGITS[:2])
    for row, text in enumerate([[3, 5], [0, 0, 2]]):
        expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([text]), LOGITS[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], expected)


def test_sampled_shares_are_those_of_the_tempered_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(40_000, 4)
    config = GenerateConfig(temperature=2.0, top_p=1.0)
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = torch.tensor(next_tokens(logits, [config] * len(logits), uniforms))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, (logits[0].double() / 2).softmax(-1).float(), atol=0.01)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_is_always_a_token_that_has_a_share(uniform):
    shares = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0, 1e-30]])
    assert inverse_cdf(shares, [uniform] * 2) == [1 if uniform < 0.3 else 3, 4]


FILTERS = [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7, "min_p": 0.2}, {"top_p": 0.999}]


@pytest.mark.parametrize("candidates", [4, 12, 512])
@pytest.mark.parametrize("settings", FILTERS)
def test_draws_from_a_few_candidates_are_those_from_all(monkeypatch, settings, candidates):
    """The whole vocabulary is sorted when the likeliest few do not hold what the filters leave."""
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    config = GenerateConfig(**{"temperature": 1.3, "top_p": 1.0, **settings})
    kept = keep_top_k(LOGITS / 1.3, config.top_k)
    kept = keep_min_p(keep_top_p(kept, config.top_p), config.min_p)
    share, order = kept.softmax(-1).sort(dim=-1, descending=True)
    for uniform in torch.linspace(0, 0.9999, 23).tolist():
        expected = order[torch.arange(5), torch.tensor(inverse_cdf(share, [uniform] * 5))].tolist()
        assert next_tokens(LOGITS, [config] * 5, [uniform] * 5) == expected


def test_rows_with_settings_of_their_own_are_chosen_as_alone():
    configs = [GenerateConfig(**s) for s in ({"temperature": 0}, {"top_p": 1.0}, *FILTERS[:3])]
    uniforms = [0.1, 0.9, 0.5, 0.99, 0.3]
    alone = [next_tokens(LOGITS[i : i + 1], [configs[i]], [uniforms[i]])[0] for i in range(5)]
    assert next_tokens(LOGITS, configs, uniforms) == alone


def test_a_tiny_temperature_takes_the_likeliest():
    config = GenerateConfig(temperature=1e-45, top_p=1.0)
    assert next_tokens(LOGITS, [config] * 5, [0.999] * 5) == LOGITS.argmax(-1).tolist()
