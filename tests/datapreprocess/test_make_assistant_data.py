"""make_assistant_data: only answers are trained on, every conversation is accounted for."""

import pytest

from open_lm.data.batch import IGNORED
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import ConfigError, DataError

CHAT = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."}, {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven, I think."},
]}  # fmt: skip
OTHERS = [
    {"prompt": "Say hi.", "response": "Hi!"},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "Name?"}, {"from": "gpt", "value": "None."}]},
]
ANSWERS = {" Four.", " Seven, I think.", " Hi!", " 3", " None."}


@pytest.fixture
def run(raw, tmp_path, tokenizer_json, script):
    main = script("datapreprocess/make_assistant_data.py").main

    def made(rows, *flags, name="out"):
        args = ["--input-files", raw("chat.jsonl", rows), "--output-dir", str(tmp_path / name)]
        return main([*args, "--tokenizer", str(tokenizer_json), "--seqlen", "80", *flags]), tmp_path / name

    return made


def test_training_targets_are_the_answers_and_end_of_text_and_nothing_else(run, tokenizer_json):
    ledger, folder = run([CHAT, *OTHERS])
    tokenizer = load_tokenizer(str(tokenizer_json))
    config = DataConfig(
        dataset_manifest=(f"{folder}/manifest.jsonl",),
        target_mask_left=ledger["mask_token_id"],
        squash_mask_left=True,
        target_mask_individual=ledger["pad_id"],
        workers=0,
    )
    shape = {"vocab_size": ledger["mask_token_id"] + 1, "seq_len": 80, "global_batch": 5}
    batch = next(build_loader(config, **shape, rank=0, world_size=1, seed=0).batches(0, 1))
    trained = [tokenizer.decode(row[row != IGNORED].tolist()) for row in batch.targets_BT]
    assert set(trained) == {f"{answer}<|endoftext|>" for answer in ANSWERS}
    assert ledger["mask_token_id"] not in batch.inputs_BT
    seen = [tokenizer.decode(row.tolist()) for row in batch.inputs_BT]
    whole = next(text for text in seen if "Seven" in text)
    assert whole.startswith(
        "System: Be brief.\nUser: What is two plus two?\nAssistant: Four.\nUser: And three?\nAssistant: Seven, I think."
    )


def test_the_books_balance_with_every_reason(run):
    bad = [{"text": "x"}, {"messages": [{"role": "robot", "content": "x"}]}, {"prompt": "x", "response": 5}]
    bad += [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [5]}]
    ledger, _ = run([CHAT, *bad, {"prompt": "word " * 100, "response": "y"}], "--on-bad-line", "skip")
    reasons = {"no_answer": 1, "not_text": 1, "unknown_form": 2, "unknown_role": 1}
    assert ledger["conversations"] == {"in": 7, "used": 2, "rejected": reasons}
    assert ledger["answers"] == {"in": 3, "samples": 2, "too_long": 1}


def test_a_bad_line_stops_with_its_number_and_nothing_appears(run, tmp_path):
    with pytest.raises(DataError, match=r"chat\.jsonl, line 2: unknown form"):
        run([CHAT, {"text": "x"}])
    assert not list(tmp_path.glob("out*"))


def test_an_existing_folder_is_left_alone(run):
    run([CHAT])
    with pytest.raises(ConfigError, match="exists already"):
        run([CHAT])


def test_without_a_single_sample_the_reasons_are_said(run):
    with pytest.raises(DataError, match=r"no conversation gives a sample .*unknown_form"):
        run([{"text": "x"}], "--on-bad-line", "skip")
