"""Beam search, against every text there is and against transformers."""

import pytest
import torch

from open_lm.generation import generate
from open_lm.generation.beams import beam_search

STOP = 7


def log_probability(model, prompt, tokens):
    logits = model(torch.tensor([[*prompt, *tokens]]))[0].double().log_softmax(-1)
    return sum(logits[0, len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens))


@torch.inference_mode()
def test_with_as_many_beams_as_texts_it_finds_the_likeliest_of_all(model):
    prompt = [3, 4, 5]
    first = model(torch.tensor([prompt]))[0][0, -1].double().log_softmax(-1)
    second = model(torch.tensor([[*prompt, t] for t in range(61)]))[0][:, -1].double().log_softmax(-1)
    scores, places = (first[:, None] + second).flatten().topk(3)
    ((*found,),) = beam_search(model, [prompt], num_beams=61, max_gen_len=2, length_penalty=0.0)
    assert [beam.tokens for beam in found[:3]] == [[place // 61, place % 61] for place in places.tolist()]
    assert [beam.score for beam in found[:3]] == pytest.approx(scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("n_beams", [2, 5])
def test_it_writes_what_transformers_writes(model, llama, prompts, n_beams, length_penalty):
    ours = generate(model, prompts, num_beams=n_beams, max_gen_len=12, length_penalty=length_penalty, stop_ids=[STOP])
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=n_beams, max_new_tokens=12,
            length_penalty=length_penalty, eos_token_id=STOP, pad_token_id=0, early_stopping=False,
        )  # fmt: skip
        expected = out[0, len(prompt) :].tolist()
        assert row == (expected[: expected.index(STOP)] if STOP in expected else expected)


def test_scores_are_log_probabilities_of_the_tokens_best_first(model, prompts):
    ranked = beam_search(model, prompts, num_beams=4, max_gen_len=6, length_penalty=0.0)
    for prompt, beams in zip(prompts, ranked, strict=True):
        assert len(beams) == 4
        assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
        for beam in beams:
            assert beam.score == pytest.approx(log_probability(model, prompt, beam.tokens), abs=1e-4)
