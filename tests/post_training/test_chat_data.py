"""Chat data: exactly the answers and their ends are trained on, and every row and token is accounted for."""

import json

import numpy as np
import pytest

from open_lm.data.batch import IGNORED
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import ConfigError, DataError
from open_lm.post_training.chat.conversations import conversation_of, pair_of, prompt_of
from open_lm.post_training.chat.packing import pack
from open_lm.post_training.chat.template import BUILT_IN, ChatTemplate, load_template

CHAT = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."}, {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven, I think."},
]}  # fmt: skip
OTHERS = [
    {"prompt": "Say hi.", "response": "Hi!"},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "Name?"}, {"from": "gpt", "value": "None."}]},
    {"prompt": [{"role": "user", "content": "Go"}], "completion": [{"role": "assistant", "content": "Gone."}]},
]
ANSWERS = ["Four.", "Seven, I think.", "Hi!", "3", "None.", "Gone."]
ENDS = {"tulu": {"gpt2": "<|endoftext|>", "neox": "<|endoftext|>", "llama3": "<|eot_id|>"}, "chatml": "<|im_end|>"}


def batch_of(folder, n, *, form="samples", rows=1, seq_len=120):
    config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), workers=0)
    shape = {"vocab_size": 400, "seq_len": seq_len, "global_batch": n, "form": form, "rows": rows}
    return next(build_loader(config, **shape, rank=0, world_size=1, seed=0).batches(0, 1))


def trained_texts(batch, tokenizer):
    """The texts that are trained on: targets of neighbouring positions."""
    texts = []
    for row in batch.targets_BT.tolist():
        run = []
        for token in [*row, IGNORED]:
            if token != IGNORED:
                run.append(token)
            elif run:
                texts.append(tokenizer.decode(run))
                run = []
    return texts


@pytest.mark.parametrize("style", ["gpt2", "neox", "llama3"])
@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_the_answers_and_their_ends_are_trained_on_and_nothing_else(make_chat, tokenizer_of, style, packing):
    ledger, folder = make_chat([CHAT, *OTHERS], packing, style=style)
    batch = batch_of(folder, ledger["samples"])
    tokenizer = load_tokenizer(str(tokenizer_of(style)))
    end = ENDS["tulu"][style]
    assert sorted(trained_texts(batch, tokenizer)) == sorted(answer + end for answer in ANSWERS)
    assert int(batch.n_targets) == ledger["tokens"]["trained"]
    assert (batch.documents_BT is not None) == (packing == "--packing")


@pytest.mark.parametrize("template", ["chatml", "tulu", "plain"])
def test_a_template_without_marks_gives_the_labels_of_one_with(make_chat, tokenizer_of, template):
    bare = BUILT_IN[template].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = load_tokenizer(str(tokenizer_of("neox")))
    tokens = load_template(None, tokenizer).tokens | {"end": "<|im_end|>"}
    marked = ChatTemplate(BUILT_IN[template], tokens).render(CHAT["messages"])
    unmarked = ChatTemplate(bare, tokens).render(CHAT["messages"])
    assert not ChatTemplate(bare, tokens).marks_answers
    assert unmarked.text == marked.text
    assert unmarked.spans == marked.spans


def test_labels_equal_those_of_transformers(make_chat, tokenizer_of):
    from transformers import AutoTokenizer

    from open_lm.post_training.chat.labels import label_all

    theirs = AutoTokenizer.from_pretrained(str(tokenizer_of("neox")))
    ours = load_tokenizer(str(tokenizer_of("neox")))
    conversations = [conversation_of(row) for row in [CHAT, *OTHERS]]
    labelled = label_all(conversations, load_template("tulu", ours), ours)
    for conversation, one in zip(conversations, labelled, strict=True):
        options = {"chat_template": BUILT_IN["tulu"], "return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(conversation.messages, tokenize=True, **options)
        assert (one.tokens & ((1 << 28) - 1)).tolist() == expected["input_ids"]
        assert (one.tokens >> 28 == 0).astype(int).tolist() == expected["assistant_masks"]


def test_end_of_text_is_added_and_trained_where_a_template_forgets_it(make_chat, tokenizer_of, tmp_path):
    (tmp_path / "bare.jinja").write_text(BUILT_IN["plain"].replace("+ eos_token", ""))
    ledger, folder = make_chat([OTHERS[0]], "--chat-template", str(tmp_path / "bare.jinja"))
    assert ledger["end_of_text_added"] == 1
    tokenizer = load_tokenizer(str(tokenizer_of("neox")))
    assert trained_texts(batch_of(folder, 1), tokenizer) == ["Hi!<|endoftext|>"]


def test_the_books_balance_with_every_reason(make_chat):
    bad = [{"text": "x"}, {"messages": [{"role": "robot", "content": "x"}]}, {"prompt": "x", "response": 5}]
    bad += [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [5]}]
    long = [{"prompt": "word " * 120, "response": "y"}, {"prompt": "x", "response": "many words " * 100}]
    ledger, _ = make_chat([CHAT, *bad, *long], "--on-bad-line", "skip")
    rows, tokens = ledger["conversations"], ledger["tokens"]
    assert rows["rejected"] == {"no_answer": 1, "not_text": 2, "unknown_form": 1, "unknown_role": 1}
    assert rows["dropped"] == {"no_target_after_truncation": 1}
    assert (rows["in"], rows["used"], rows["truncated"]) == (8, 2, 1)
    assert tokens["in"] - tokens["cut_off"] + tokens["padding"] == tokens["in_shards"] == ledger["samples"] * 121


def test_long_rows_can_be_dropped(make_chat):
    ledger, _ = make_chat([OTHERS[0], {"prompt": "x", "response": "many words " * 100}], "--on-long", "drop")
    assert ledger["conversations"]["dropped"] == {"too_long": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "unknown form"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "no answer"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
    ],
)
def test_a_bad_row_stops_with_its_line_and_nothing_appears(make_chat, tmp_path, row, reason):
    with pytest.raises(DataError, match=rf"out\.jsonl, line 2: {reason}"):
        make_chat([CHAT, row])
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("out")]


def test_a_template_that_renders_nothing_for_the_assistant_is_refused(make_chat, tmp_path):
    (tmp_path / "deaf.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="line 1: nothing rendered"):
        make_chat([CHAT], "--chat-template", str(tmp_path / "deaf.jinja"))
    (tmp_path / "later.jinja").write_text("{{ messages | length }}: {% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match="depends on those after it"):
        make_chat([CHAT], "--chat-template", str(tmp_path / "later.jinja"))
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match="line 1: template refuses"):
        make_chat([CHAT], "--chat-template", str(tmp_path / "strict.jinja"))


PAIRS = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5", "score_chosen": 8.0, "score_rejected": 5.5},
    {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: Who asks?"},
]  # fmt: skip


def test_pairs_hold_one_prompt_and_two_answers(make_chat, tokenizer_of):
    ledger, folder = make_chat(PAIRS, "--form", "pairs")
    batch = batch_of(folder, 3, form="pairs", rows=2)
    tokenizer = load_tokenizer(str(tokenizer_of("neox")))
    assert (batch.group, len(batch)) == (2, 6)
    sides = trained_texts(batch, tokenizer)
    expected = [("4", "5"), ("Hello", "No"), ("Because.", "Who asks?")]
    assert set(zip(sides[::2], sides[1::2], strict=True)) == {tuple(f"{t}<|endoftext|>" for t in p) for p in expected}
    margins = np.load(folder / "margins.npy")
    assert sorted(margins.tolist()) == [0.0, 0.0, 2.5]
    assert ledger["pairs"]["used"] == 3


def test_a_pair_whose_sides_are_equal_is_refused_and_counted(make_chat):
    equal = {"prompt": "2+2?", "chosen": "4", "rejected": "4"}
    with pytest.raises(DataError, match="line 2: equal sides"):
        make_chat([PAIRS[0], equal], "--form", "pairs")
    late = {"prompt": "x", "chosen": "many words " * 120 + "a", "rejected": "many words " * 120 + "b"}
    ledger, _ = make_chat([PAIRS[0], equal, late], "--form", "pairs", "--on-bad-line", "skip", name="skip")
    assert ledger["pairs"]["rejected"] == {"equal_sides": 1}
    assert ledger["pairs"]["dropped"] == {"equal_sides_after_truncation": 1}


def test_sides_that_only_the_template_makes_equal_are_counted_as_such(make_chat):
    trimmed = {"prompt": "2+2?", "chosen": "4", "rejected": "4  "}
    with pytest.raises(DataError, match="line 1: equal sides"):
        make_chat([trimmed, PAIRS[0]], "--form", "pairs", style="llama3")
    ledger, _ = make_chat([trimmed, PAIRS[0]], "--form", "pairs", "--on-bad-line", "skip", style="llama3", name="skip")
    assert ledger["pairs"]["rejected"] == {"equal_sides": 1} and ledger["pairs"]["used"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": 5, "output": "x"}, "not text"),
        ({"instruction": "a", "input": ["b"], "output": "x"}, "not text"),
        ({"instruction": "a", "output": None}, "not text"),
        ({"prompt": "a", "response": " \n "}, "no answer"),
    ],
)
def test_rows_whose_fields_are_no_texts_or_blank_are_named(make_chat, row, reason):
    with pytest.raises(DataError, match=f"line 1: {reason}"):
        make_chat([row])


def test_what_a_row_lacks_is_named(make_chat):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    longer = [*talk, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    with pytest.raises(DataError, match="line 1: no answer"):  # one side is the beginning of the other
        make_chat([{"chosen": talk, "rejected": longer}], "--form", "pairs")
    with pytest.raises(DataError, match="line 1: no common prompt"):
        make_chat([{"chosen": talk, "rejected": longer[2:]}], "--form", "pairs")
    with pytest.raises(DataError, match="line 1: no prompt"):
        make_chat([{"prompt": " "}], "--form", "prompts")


def test_prompts_keep_their_rows_and_end_where_the_answer_begins(make_chat, tokenizer_of):
    rows = [{"question": "1+1?", "answer": "2"}, {"messages": CHAT["messages"], "level": 3}]
    _, folder = make_chat(rows, "--form", "prompts")
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(str(tokenizer_of("neox")))
    texts = {tokenizer.decode(line["prompt_ids"]): line for line in lines}
    assert texts["<|user|>\n1+1?\n<|assistant|>\n"]["answer"] == "2"
    (longer,) = [line for text, line in texts.items() if "And three?\n<|assistant|>\n" in text and "Seven" not in text]
    assert longer["level"] == 3


def test_parquet_and_packed_jsonl_give_the_same_data(make_chat, tmp_path, tokenizer_of):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": CHAT["messages"]}] * 5
    _, plain = make_chat(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    _, other = make_chat(rows, "--input-files", str(tmp_path / "chat.parquet"), name="other")
    assert (plain / "00000000.tar").read_bytes() == (other / "00000000.tar").read_bytes()


def test_packing_is_best_fit_and_loses_nothing():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 3000)
    conversations = [np.full(n, k) for k, n in enumerate(lengths)]
    samples = list(pack(conversations, 64, n_open=200))
    assert sorted(one[0] for sample in samples for one in sample) == list(range(3000))
    assert all(sum(map(len, sample)) <= 64 for sample in samples)
    assert sum(lengths) / (64 * len(samples)) > 0.97
    assert len(list(pack([np.zeros(64)] * 3, 64))) == 3


def test_roles_and_forms_of_other_systems():
    assert conversation_of({"question": "a", "answer": "b"}).messages[1] == {"role": "assistant", "content": "b"}
    assert pair_of({"prompt": "a", "chosen": "b"}).reason == "unknown_form"
    assert pair_of({"chosen": [{"role": "user", "content": "a"}], "rejected": "x"}).reason in (
        "no_answer",
        "unknown_form",
    )
    assert prompt_of({"messages": [{"role": "assistant", "content": "a"}]}).reason == "no_prompt"


def test_a_url_gets_the_files_a_folder_gets_and_a_forbidden_one_is_found_first(make_chat, tmp_path, monkeypatch):
    import fsspec

    from open_lm import storage
    from open_lm.errors import StorageError
    from open_lm.post_training.chat import prepare

    _, folder = make_chat([CHAT, *OTHERS])
    make_chat([CHAT, *OTHERS], "--output-dir", "memory://bucket/chat")
    store = fsspec.filesystem("memory")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ledger.json"} == {
        path.rpartition("/")[2]: store.cat_file(path)
        for path in store.find("/bucket/chat")
        if not path.endswith("ledger.json")
    }
    with pytest.raises(ConfigError, match="exists already"):
        make_chat([CHAT], "--output-dir", "memory://bucket/chat")

    def forbidden(url, content):
        raise StorageError(f"cannot write {url}: forbidden.")

    monkeypatch.setattr(storage, "write_bytes", forbidden)
    monkeypatch.setattr(prepare, "_parsed", None)
    with pytest.raises(StorageError, match="forbidden"):
        make_chat([CHAT], "--output-dir", "memory://bucket/other")
