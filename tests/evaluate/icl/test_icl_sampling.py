"""Answers that are drawn: as transformers would draw them, the same in any batch, and what is not there is refused."""

import pytest
import torch
from icl_setup import sample, task_of

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.engine.generation import AnswerWriter, EncodedPrompt, plan_generation
from open_lm.evaluate.engine.icl import IclEngine
from open_lm.evaluate.engine.sampling import Sampling, sampling_of
from open_lm.evaluate.tasks.jobs import JobBook

KIND = "generation_task_with_answers"


def task(**kwargs):
    return task_of(sample("short_answers"), KIND, generation_kwargs=kwargs)


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {}])
def test_tokens_are_drawn_with_the_probabilities_of_transformers(settings):
    from transformers import GenerationConfig, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
    from transformers import TopPLogitsWarper as TopP

    logits = torch.randn(1, 80, generator=torch.Generator().manual_seed(0)) * 2
    defaults = GenerationConfig._get_default_generation_params()
    chain = [TemperatureLogitsWarper(float(settings.get("temperature", 1.0))),
             TopKLogitsWarper(settings.get("top_k", defaults["top_k"])),
             TopP(settings.get("top_p", 1.0)), MinPLogitsWarper(settings.get("min_p", 0.0))]  # fmt: skip
    expected = logits
    for warper in chain:
        expected = warper(None, expected)
    expected = expected.softmax(-1)[0]
    sampling = sampling_of(task(do_sample=True, **settings))
    n = 4000
    drawn = torch.bincount(sampling.choose(logits.expand(n, -1), range(n), 3), minlength=80) / n
    assert drawn[expected == 0].sum() == 0
    assert float((drawn - expected).abs().sum()) < 0.1  # total variation of 4000 draws among 50 tokens: about 0.06


def test_draws_do_not_depend_on_the_batch_and_do_on_seed_and_step():
    logits, draw = torch.zeros(6, 50), Sampling(draws=True, seed=1)
    together = draw.choose(logits, range(6), 0)
    assert together.tolist() == [int(draw.choose(logits[:1], [n], 0)) for n in range(6)]
    assert together.tolist() != draw.choose(logits, range(6), 1).tolist()
    assert together.tolist() != Sampling(draws=True, seed=2).choose(logits, range(6), 0).tolist()


def test_answers_of_a_task_are_repeatable_and_as_long_as_asked(model, tokenizer):
    engine = IclEngine(model, tokenizer, max_seq_len=128)
    asked = task(do_sample=True, temperature=1.5, max_new_tokens=3)
    book = JobBook([asked])
    prepared = engine.prepare(book.jobs[0], book)
    assert prepared.n_new == 3
    written = [
        AnswerWriter(engine.scorer, engine.encoder, World(), prepared.sampling).write(
            plan_generation(prepared.asked, 3, budget), 3, (), lambda n: None
        )
        for budget in (16, 4096)
    ]
    assert written[0] == written[1]
    greedy = AnswerWriter(engine.scorer, engine.encoder, World()).write(
        plan_generation(prepared.asked, 3, 4096), 3, (), lambda n: None
    )
    assert greedy != written[0]
    assert isinstance(prepared.asked[0], EncodedPrompt)


def test_without_do_sample_the_likeliest_is_taken_as_transformers_does(caplog):
    assert not sampling_of(task(temperature=0.5)).draws
    assert "temperature have no effect" in caplog.text
    assert sampling_of(task(use_cache=True, num_beams=1)) == sampling_of(task())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, r"num_beams: the native engine has .*--engine llm-foundry"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"do_sample": True, "temperature": 0}, "temperature: found 0, need more than 0"),
        ({"do_sample": True, "top_k": 1.5}, "top_k: found 1.5, need a whole number"),
        ({"max_new_tokens": "many"}, "max_new_tokens: found 'many'"),
    ],
)
def test_what_the_engine_does_not_have_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        sampling_of(task(**settings))
