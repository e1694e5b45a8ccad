import json

import pytest
import torch
import torch.distributed as dist
from icl_setup import sample, task_of, tiny_model, tiny_tokenizer, write_rows

from open_lm.distributed import World
from open_lm.errors import DataError
from open_lm.evaluate.engine.generation import is_right, normalized
from open_lm.evaluate.engine.icl import IclEngine, evaluate_icl
from open_lm.evaluate.tasks.jobs import JobBook

KINDS = {
    "python_words": "language_modeling",
    "python_choices": "multiple_choice",
    "python_imports": "schema",
    "short_answers": "generation_task_with_answers",
}


def tasks():
    return [task_of(sample(name), kind, label=name, num_fewshot=[0, 2]) for name, kind in KINDS.items()]


def ran(model, tokenizer, task, max_seq_len=128, **settings):
    book = JobBook([task], **settings)
    engine = IclEngine(model, tokenizer, max_seq_len=max_seq_len)
    return {job.key: engine.run(job, book) for job in book.jobs}


def test_every_type_is_scored_in_one_call(model, tokenizer):
    found = evaluate_icl(model, tokenizer, tasks(), world=World(), max_seq_len=128)
    assert set(found) == {
        f"{name}/{shots}-shot/{metric}"
        for shots in (0, 2)
        for name, metric in zip(
            KINDS,
            ["InContextLearningLMAccuracy", *["InContextLearningMultipleChoiceAccuracy"] * 2,
             "InContextLearningGenerationExactMatchAccuracy"],
            strict=True,
        )
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in found.values())


def test_a_model_in_training_is_scored_in_eval_mode_and_given_back_training(model, tokenizer):
    model.train()
    ran(model, tokenizer, task_of(sample("python_words"), "language_modeling"))
    assert model.training
    model.eval()


def test_a_prompt_beyond_the_context_loses_its_start_and_is_counted(model, tokenizer, tmp_path):
    rows = [{"context": "word " * 300, "continuation": "end"}, {"context": "short", "continuation": "end"}]
    task = task_of(write_rows(tmp_path / "a.jsonl", rows), "language_modeling")
    (result,) = ran(model, tokenizer, task, max_seq_len=32).values()
    assert result.n_truncated == 1


def test_a_continuation_that_leaves_no_room_is_an_error_that_names_the_row(model, tokenizer, tmp_path):
    rows = [{"context": "a", "continuation": "b"}, {"context": "a", "continuation": "word " * 300}]
    task = task_of(write_rows(tmp_path / "a.jsonl", rows), "language_modeling")
    with pytest.raises(DataError, match=r"a.jsonl:2: a continuation of \d+ tokens, where 1 to 31 fit"):
        ran(model, tokenizer, task, max_seq_len=32)


def test_an_empty_context_is_an_error_that_says_what_to_do(model, tokenizer, tmp_path):
    task = task_of(write_rows(tmp_path / "a.jsonl", [{"context": "", "continuation": "b"}]), "language_modeling")
    with pytest.raises(DataError, match=r"a.jsonl:1: the context is empty.*prompt_string"):
        ran(model, tokenizer, task)


def test_categories_are_scored_one_by_one_in_order(model, tokenizer, tmp_path):
    rows = [{"context": f"c{i}", "continuation": "d", "category": "ba"[i % 2]} for i in range(5)]
    task = task_of(write_rows(tmp_path / "a.jsonl", rows), "language_modeling", has_categories=True)
    found = ran(model, tokenizer, task)
    assert {key: r.metrics["InContextLearningLMAccuracy"].n_questions for key, r in found.items()} == {
        "task/0-shot/a": 2,
        "task/0-shot/b": 3,
    }
    assert list(found) == ["task/0-shot/a", "task/0-shot/b"]


def test_a_subset_is_counted_in_batches_as_llm_foundry_counts_them(model, tokenizer):
    words = task_of(sample("python_words"), "language_modeling")
    choices = task_of(sample("python_choices"), "multiple_choice")
    book = JobBook([words, choices], subset_batches=3, batch_size=5)
    assert [book.n_questions(job) for job in book.jobs] == [15, 6]  # 5 questions a batch; 5 // 2 choices = 2


def test_generation_equals_greedy_decoding_of_the_whole_text(model, tokenizer):
    from open_lm.evaluate.engine.generation import AnswerWriter, EncodedPrompt, plan_generation

    engine = IclEngine(model, tokenizer, max_seq_len=128)
    texts = ["def f", "the list", "a"]
    prompts = [EncodedPrompt(n, tuple(tokenizer.encode(text)), False) for n, text in enumerate(texts)]
    texts = AnswerWriter(engine.scorer, engine.encoder, World()).write(
        plan_generation(prompts, 6, 64), 6, (), lambda n: None
    )
    for asked in prompts:
        ids = list(asked.ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
            if ids[-1] == tokenizer.eot_id:
                break
        expected = [i for i in ids[len(asked.ids) :] if i not in (tokenizer.eot_id, tokenizer.pad_id)]
        assert texts[asked.number].strip() == tokenizer.decode(expected).strip()


def test_answers_are_compared_as_triviaqa_does():
    task = task_of("x", "generation_task_with_answers", early_stopping_criteria=["\n\n", "Question:"])
    assert normalized("The  U.S._Navy‘s") == "u s navy s"
    assert is_right(" The Eiffel tower, in Paris\n\nno", ["eiffel tower"], task)
    assert not is_right("Big Ben Question: Eiffel", ["Eiffel"], task)
    exact = task_of("x", "generation_task_with_answers", do_normalization=False, cot_delimiter="####")
    assert is_right("so #### 12 apples", ["12"], exact)
    assert not is_right("so #### The answer", ["answer"], exact)


def wrapped(model, how):
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    tokenizer, book, found = tiny_tokenizer(folder / str(rank)), JobBook(tasks()), {}
    for how in ("plain", "ddp", "fsdp"):
        seen = []
        model = wrapped(tiny_model(), how)
        engine = IclEngine(model, tokenizer, max_seq_len=128, world=World(rank, 2))
        results = [engine.run(job, book, seen.append) for job in book.jobs]
        values = {f"{r.job.key}/{name}": metric.value for r in results for name, metric in r.metrics.items()}
        found[how] = {"values": values, "seen": sum(seen)}
        model.train()(torch.zeros(1, 5, dtype=torch.long))[0].sum().backward()  # what was scored can still be trained
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_agree_with_one_however_the_model_is_wrapped(tmp_path, model, tokenizer):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    expected = evaluate_icl(model, tokenizer, tasks(), world=World(), max_seq_len=128)
    book = JobBook(tasks())
    n_questions = sum(book.n_questions(job) for job in book.jobs)
    for how in ("plain", "ddp", "fsdp"):
        assert first[how]["values"] == second[how]["values"] == expected
        assert first[how]["seen"] + second[how]["seen"] == n_questions
        assert min(first[how]["seen"], second[how]["seen"]) > n_questions // 4
