"""make_2048: every token arrives, whatever the files and the number of workers; bad input is named."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard

from open_lm.data.manifest import read_manifest
from open_lm.data.shards import read_samples
from open_lm.errors import ConfigError, DataError, StorageError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--seqlen", "15", "--shard-size", "32", "--num-workers", "1"]


def samples_of(folder):
    manifest = read_manifest(f"{folder}/manifest.jsonl")
    return np.stack([tokens for shard in manifest for _, tokens in read_samples(shard.url)])


def tree(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def expected_tokens(tokenizer_json, texts):
    """Ids by the tokenizers library, text by text, each followed by end of text: id 0."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]


def test_every_token_arrives_once_and_the_ledger_says_so(make_2048, raw, tmp_path, tokenizer_json, texts):
    files = [raw("a.jsonl", texts[:50]), raw("b.jsonl.zst", texts[50:100]), raw("c.jsonl.gz", texts[100:])]
    out = tmp_path / "out"
    args = ["--input-files", *files, "--output-dir", str(out), "--tokenizer", str(tokenizer_json)]
    ledger = make_2048([*args, *SMALL])
    expected = expected_tokens(tokenizer_json, texts)
    n_tokens = sum(map(len, expected))
    assert ledger["documents"] == {"in": len(texts), "tokenized": len(texts), "rejected": {}}
    assert ledger["tokens"] == {"in": n_tokens, "in_shards": n_tokens - ledger["tokens"]["tail"], "tail": n_tokens % 16}
    found = samples_of(out)
    assert found.shape == (n_tokens // 16, 16)
    missing = Counter(t for ids in expected for t in ids)
    missing.subtract(Counter(found.ravel().tolist()))
    assert min(missing.values()) == 0 and sum(missing.values()) == n_tokens % 16
    assert json.loads((out / "ledger.json").read_bytes()) == ledger


def test_samples_are_the_documents_cut_in_order_then_shuffled(make_2048, raw, tmp_path, tokenizer_json, texts):
    out = tmp_path / "out"
    file = raw("a.jsonl.zst", texts)
    make_2048(["--input-files", file, "--output-dir", str(out), "--tokenizer", str(tokenizer_json), *SMALL])
    stream = [t for ids in expected_tokens(tokenizer_json, texts) for t in ids]
    cut = [tuple(stream[k : k + 16]) for k in range(0, len(stream) - 15, 16)]
    found = [tuple(row) for row in samples_of(out).tolist()]
    assert Counter(found) == Counter(cut)
    assert found != cut


def test_all_shards_but_the_last_are_full_and_the_manifest_finds_every_sample(
    make_2048, raw, tmp_path, tokenizer_json, texts
):
    out = tmp_path / "out"
    file = raw("a.jsonl", texts)
    make_2048(["--input-files", file, "--output-dir", str(out), "--tokenizer", str(tokenizer_json), *SMALL])
    shards = read_manifest(f"{out}/manifest.jsonl")
    assert {shard.n_sequences for shard in shards[:-1]} == {32}
    for shard in shards:
        content = Path(shard.url).read_bytes()
        first, step, size = shard.layout
        names = [name for name, _ in read_samples(shard.url)]
        assert len(names) == shard.n_sequences and len(content) == shard.size_bytes
        for k, (_, tokens) in enumerate(read_samples(shard.url)):
            assert content[first + k * step : first + k * step + size].endswith(tokens.tobytes())


def test_readers_and_writers_are_as_many_as_asked_for(make_2048, raw, tmp_path, tokenizer_json, texts, monkeypatch):

    from open_lm.preprocess import make

    seen, real = {}, make.run_tasks
    monkeypatch.setattr(make, "run_tasks", lambda *a, **k: seen.update({k["label"]: a[1]}) or real(a[0], 1, **k))
    args = ["--input-files", raw("a.jsonl", texts), "--output-dir", str(tmp_path / "out"), "--tokenizer"]
    make_2048([*args, str(tokenizer_json), "--seqlen", "15", "--num-workers", "5", "--num-consumers", "7"])
    assert seen == {"tokenize": 5, "write shards": 7}


@pytest.mark.parametrize("form", [[], ["--format", "npy-flat"]])
@pytest.mark.parametrize("n_lines", [1, 7])
def test_how_many_lines_are_parsed_together_changes_no_byte(
    make_2048, raw, tmp_path, tokenizer_json, texts, monkeypatch, n_lines, form
):
    from open_lm.preprocess import input as inputs
    from open_lm.preprocess import jsonl

    monkeypatch.setattr(inputs, "LONG_BYTES", 900)  # some documents are long ones, between short ones
    rows = [*texts[:30], {"id": 7, "text": ""}, {"no": "text"}, *texts[30:60]]
    files = [raw("a.jsonl", rows), raw("b.jsonl.zst", texts[::-1][:40])]
    args = ["--input-files", *files, "--tokenizer", str(tokenizer_json), "--on-bad-line", "skip", *SMALL, *form]
    ledger = make_2048([*args, "--output-dir", str(tmp_path / "whole")])
    monkeypatch.setattr(jsonl, "_BATCH_LINES", n_lines)
    assert make_2048([*args, "--output-dir", str(tmp_path / "parts")]) == ledger
    assert ledger["documents"]["rejected"] == {"empty": 1, "missing_key": 1}
    assert tree(tmp_path / "whole") == tree(tmp_path / "parts")


@pytest.mark.parametrize("n_workers", [2, 3])
def test_shards_do_not_depend_on_the_number_of_workers(make_2048, raw, tmp_path, tokenizer_json, texts, n_workers):
    files = [raw("a.jsonl", texts), raw("b.jsonl.zst", texts[::-1])]
    for n in (1, n_workers):
        args = ["--input-files", *files, "--output-dir", str(tmp_path / f"out{n}"), "--tokenizer", str(tokenizer_json)]
        make_2048([*args, *SMALL, "--num-workers", str(n)])
    assert tree(tmp_path / "out1") == tree(tmp_path / f"out{n_workers}")


def test_the_seed_decides_the_order_and_nothing_else(make_2048, raw, tmp_path, tokenizer_json, texts):
    file = raw("a.jsonl", texts)
    found = {}
    for seed in ("1", "2"):
        args = ["--input-files", file, "--output-dir", str(tmp_path / seed), "--tokenizer", str(tokenizer_json)]
        make_2048([*args, *SMALL, "--seed", seed])
        found[seed] = samples_of(tmp_path / seed).tolist()
    assert found["1"] != found["2"]
    assert sorted(found["1"]) == sorted(found["2"])


@pytest.mark.parametrize("key", ["txt", "json", "json.gz", "npy"])
def test_every_format_holds_the_same_ids(make_2048, raw, tmp_path, tokenizer_json, texts, key):
    file = raw("a.jsonl", texts)
    for name, wanted in (("reference", "npy"), ("out", key)):
        args = ["--input-files", file, "--output-dir", str(tmp_path / name), "--tokenizer", str(tokenizer_json)]
        make_2048([*args, *SMALL, "--data-key", wanted])
    assert np.array_equal(samples_of(tmp_path / "out"), samples_of(tmp_path / "reference"))


BAD_LINES = {
    "malformed json": b'{"text": "cut off',
    "no key 'text'": b'{"txt": "x"}',
    "'text' holds no text": b'{"text": 5}',
    "invalid utf8": b'{"text": "\xff"}',
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_stops_the_run_with_its_number_and_nothing_appears(make_2048, raw, tmp_path, tokenizer_json, what):
    file = raw("a.jsonl", ["good text"] * 40)
    with open(file, "ab") as more:
        more.write(BAD_LINES[what] + b"\n")
    args = ["--input-files", file, "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer_json)]
    with pytest.raises(DataError, match=rf"a\.jsonl, line 41: {what}.*--on-bad-line skip"):
        make_2048([*args, *SMALL])
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_skipped_and_counted_by_reason(make_2048, raw, tmp_path, tokenizer_json):
    file = raw("a.jsonl", ["good text"] * 40 + [""] * 3)
    with open(file, "ab") as more:
        more.write(b"\n".join(BAD_LINES.values()) + b"\n\n   \n" + b'{"text": "' + b"x" * 2000 + b'"}')
    args = ["--input-files", file, "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer_json)]
    ledger = make_2048([*args, *SMALL, "--on-bad-line", "skip", "--max-document-bytes", "1000"])
    reasons = {"empty": 3, "invalid_utf8": 1, "malformed_json": 1, "missing_key": 1, "not_text": 1, "too_long": 1}
    assert ledger["documents"] == {"in": 48, "tokenized": 40, "rejected": reasons}
    assert ledger["blank_lines"] == 2


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_archive_is_named_and_nothing_appears(make_2048, raw, tmp_path, tokenizer_json, texts, damage):
    file = raw("a.jsonl.zst", texts)
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[:-20] if damage == "cut" else content + b"garbage")
    args = ["--input-files", file, "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer_json)]
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: (cut off|damaged)"):
        make_2048([*args, *SMALL])
    assert not (tmp_path / "out").exists()


def test_several_zstd_frames_are_one_file(make_2048, raw, tmp_path, tokenizer_json):
    file = raw("a.jsonl.zst", ["one text"] * 30)
    Path(file).write_bytes(Path(file).read_bytes() + zstandard.compress(b'{"text": "more text"}\n' * 30))
    args = ["--input-files", file, "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer_json)]
    assert make_2048([*args, *SMALL])["documents"]["in"] == 60


def test_a_folder_that_is_not_empty_is_refused_and_replaced_only_on_request(make_2048, raw, tmp_path, tokenizer_json):
    args = ["--input-files", raw("a.jsonl", ["some text"] * 30), "--output-dir", str(tmp_path / "out")]
    args += ["--tokenizer", str(tokenizer_json), *SMALL]
    make_2048(args)
    before = tree(tmp_path / "out")
    with pytest.raises(ConfigError, match="--overwrite"):
        make_2048([*args, "--seed", "5"])
    assert tree(tmp_path / "out") == before
    make_2048([*args, "--seed", "5", "--overwrite"])
    assert tree(tmp_path / "out") != before
    assert make_2048([*args, "--seed", "5", "--resume"])["documents"]["in"] == 30


@pytest.mark.parametrize(
    ("flags", "error", "match"),
    [
        (["--input-files", "nowhere/*.jsonl"], StorageError, r"--input-files nowhere/\*\.jsonl: no file matches"),
        (["--input-files", __file__], DataError, r"--input-files .*test_make_2048\.py: need one of \.jsonl"),
        (["--output-dir", ""], ConfigError, "--output-dir"),
        (["--seqlen", "0"], ConfigError, "--seqlen 0"),
        (["--tokenizer", "nowhere/tokenizer.json"], ConfigError, "--tokenizer nowhere/tokenizer.json"),
        (["--seqlen", "100000"], DataError, "less than one sample of 100001 tokens"),
        (["--contnt-key", "x"], ConfigError, "did you mean --content-key"),
    ],
)
def test_what_cannot_be_done_is_said_with_the_flag(make_2048, raw, tmp_path, tokenizer_json, flags, error, match):
    args = ["--input-files", raw("a.jsonl", ["x"]), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(error, match=match):
        make_2048([*args, "--tokenizer", str(tokenizer_json), *SMALL, *flags])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(make_2048, raw, tmp_path, tokenizer_json, capsys):
    args = ["--input-files", raw("a.jsonl", ["x"]), "--output-dir", str(tmp_path / "out")]
    make_2048([*args, "--tokenizer", str(tokenizer_json), "--dry-run"])
    assert not list(tmp_path.glob("out*"))
    assert "1 files" in capsys.readouterr().out


def command(raw_files, out, tokenizer_json, *more):
    script = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py"), "--input-files", *raw_files]
    return [*script, "--output-dir", str(out), "--tokenizer", str(tokenizer_json), *SMALL, *more]


def test_the_command_runs_from_any_folder_and_prints_the_ledger(raw, tmp_path, tokenizer_json, texts):
    line = command([raw("a.jsonl", texts)], tmp_path / "out", tokenizer_json)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(line, cwd="/", env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"documents  {len(texts)} in = {len(texts)} tokenized + 0 rejected" in done.stdout


def test_an_error_is_one_line_and_a_code(raw, tmp_path, tokenizer_json):
    line = command(["nowhere.jsonl"], tmp_path / "out", tokenizer_json)
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == StorageError.exit_code
    assert done.stderr.startswith("error: --input-files nowhere.jsonl") and "Traceback" not in done.stderr


def tar_with(tmp_path, name, members):
    import io
    import tarfile

    with tarfile.open(tmp_path / name, "w") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(tmp_path / name)


@pytest.mark.parametrize("key", ["txt", "json:t"])
def test_tars_of_text_give_the_samples_of_lines_of_text(make_2048, raw, tmp_path, tokenizer_json, texts, key):
    encode = {"txt": str.encode, "json:t": lambda text: json.dumps({"t": text}).encode()}[key]
    members = [(f"{k:04d}.{key.split(':')[0]}", encode(text)) for k, text in enumerate(texts)]
    found = {}
    for file, name in ((raw("a.jsonl", texts), "text"), (tar_with(tmp_path, "a.tar", members), key)):
        args = ["--input-files", file, "--output-dir", str(tmp_path / name), "--tokenizer", str(tokenizer_json)]
        make_2048([*args, *SMALL, "--content-key", name])
        found[name] = Counter(map(tuple, samples_of(tmp_path / name).tolist()))
    assert found["text"] == found[key]


def test_tars_of_ids_are_packed_as_they_are_and_negative_ids_count_from_the_end(make_2048, tmp_path, tokenizer_json):
    import io

    def npy(ids):
        held = io.BytesIO()
        np.save(held, np.array(ids))
        return held.getvalue()

    vocab = tokenizers.Tokenizer.from_file(str(tokenizer_json)).get_vocab_size(with_added_tokens=True)
    file = tar_with(tmp_path, "a.tar", [("1.npy", npy([5, 6, -1, 0])), ("2.npy", npy(range(1, 28)))])
    args = ["--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer_json), *SMALL, "--content-key", "npy"]
    ledger = make_2048(["--input-files", file, *args])
    assert sorted(samples_of(tmp_path / "out").tolist()) == sorted(
        [[5, 6, vocab - 1, 0, *range(1, 13)], [*range(13, 28), 0]]
    )
    assert ledger["documents"]["in"] == 2 and ledger["tokens"]["in"] == 32
    bad = tar_with(tmp_path, "b.tar", [("1.npy", npy([5, vocab]))])
    with pytest.raises(DataError, match=rf"b\.tar, member at byte 0: no vector of ids below {vocab}"):
        make_2048(["--input-files", bad, *args, "--overwrite"])
