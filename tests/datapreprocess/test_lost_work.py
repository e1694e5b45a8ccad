"""Nothing is lost between the stages: whatever intermediate file disappears or is cut off, is named and made again."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from open_lm.data.manifest import read_manifest
from open_lm.data.shards import read_samples
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import DataError
from open_lm.preprocess import shuffle, workers
from open_lm.preprocess.job import Job
from open_lm.preprocess.make import Destination, build_data_set, destination


def make_job(files, tokenizer_json, **settings):
    tokenizer = load_tokenizer(str(tokenizer_json))
    job = Job(
        inputs=tuple((f, os.path.getsize(f)) for f in files), tokenizer=str(tokenizer_json),
        tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eot_token="<|endoftext|>",
        eot_id=0, seq_len=15, shard_size=100, data_key="npy", content_key="text", seed=1, on_bad_line="stop",
        max_document_bytes=1 << 20, block_bytes=1500,
    )  # fmt: skip
    return replace(job, **settings)


@pytest.fixture
def job(raw, tokenizer_json, texts, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return make_job([raw("a.jsonl", texts[:14]), raw("b.jsonl.zst", texts[14:28])], tokenizer_json)


def build(job, folder, **options):
    text = Path(job.tokenizer).read_text()
    return build_data_set(job, destination(str(folder)), text, **({"n_workers": 1} | options))


def tree(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def then(harm, label):
    """A runner that does harm after all tasks of one stage have run, once."""
    done = []

    def run(tasks, n_workers, /, **options):
        workers.run_tasks(tasks, n_workers, **options)
        if options["label"] == label and not done:
            done.append(harm())

    return run


def removed(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [removed, cut])
@pytest.mark.parametrize("ending", [".bin", ".json"])
def test_a_block_lost_after_its_stage_is_named_and_made_again(job, tmp_path, caplog, harm, ending):
    ledger = build(job, tmp_path / "straight")
    if (harm, ending) == (cut, ".json"):
        pytest.skip("a record is written whole or not at all")

    def lose():
        harm(sorted((tmp_path / "out.unfinished").glob(f"block-*{ending}"))[1])

    assert build(job, tmp_path / "out", run=then(lose, "tokenize")) == ledger
    assert "missing or cut off; made again" in caplog.text
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


@pytest.mark.parametrize("harm", [removed, cut])
def test_a_shard_lost_before_publication_is_written_again(job, tmp_path, caplog, harm):
    build(job, tmp_path / "straight")

    def lose():
        harm(sorted((tmp_path / "out.unfinished" / "shards").glob("*.tar"))[1])

    build(job, tmp_path / "out", run=then(lose, "write shards"))
    assert "00000001.tar is missing or cut off" in caplog.text
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_blocks_lost_between_a_kill_and_its_resume_are_made_again(job, tmp_path):
    class Stop(Exception):
        pass

    def stop(tasks, n_workers, /, **options):
        workers.run_tasks(tasks, n_workers, **options)
        raise Stop

    ledger = build(job, tmp_path / "straight")
    with pytest.raises(Stop):
        build(job, tmp_path / "out", run=stop)
    for path in sorted((tmp_path / "out.unfinished").glob("block-*.bin"))[::3]:
        path.unlink()
    assert build(job, tmp_path / "out", resume=True) == ledger
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_something_that_keeps_deleting_is_an_error_and_no_endless_loop(job, tmp_path):
    def run(tasks, n_workers, /, **options):
        workers.run_tasks(tasks, n_workers, **options)
        for path in (tmp_path / "out.unfinished").glob("block-*.bin"):
            path.unlink()

    with pytest.raises(DataError, match="finished work disappears"):
        build(job, tmp_path / "out", run=run)


def test_merging_in_rounds_changes_no_byte(job, tmp_path, monkeypatch):
    build(job, tmp_path / "straight")
    monkeypatch.setattr(shuffle, "FAN_IN", 2)
    monkeypatch.setattr(shuffle, "MOST_RUNS", 1)
    labels = []

    def run(tasks, n_workers, /, **options):
        labels.append(options["label"])
        workers.run_tasks(tasks, n_workers, **options)

    build(job, tmp_path / "merged", run=run)
    assert labels.count("merge") >= 2
    assert tree(tmp_path / "merged") == tree(tmp_path / "straight")


def test_reads_of_stage_2_grow_with_the_data_and_not_with_its_square(tmp_path, raw, tokenizer_json, texts, monkeypatch):
    from open_lm.preprocess.shuffle import SortedRuns

    monkeypatch.setattr(shuffle, "FAN_IN", 4)
    monkeypatch.setattr(shuffle, "MOST_RUNS", 8)
    reads, real = [], SortedRuns._bytes
    monkeypatch.setattr(SortedRuns, "_bytes", lambda self, *place: reads.append(place) or real(self, *place))
    counts = []
    for times in (1, 4):
        reads.clear()
        file = raw(f"{times}.jsonl", texts[:30] * times)
        build(make_job([file], tokenizer_json, block_bytes=800), tmp_path / f"out{times}")
        counts.append(len(reads))
    assert counts[1] < 6 * counts[0]


def test_many_small_files_are_few_tasks_and_each_is_read_once(tmp_path, raw, tokenizer_json, texts):
    from open_lm.preprocess.job import text_tasks

    files = [raw(f"{k:03d}.jsonl", [texts[k % 20]]) for k in range(60)]
    job = make_job(files, tokenizer_json, block_bytes=20_000)
    tasks = text_tasks(job, 2)
    assert len(tasks) < 20
    assert [f for task in tasks for f in range(task.first, task.last + 1)] == list(range(60))
    assert build(job, tmp_path / "out")["documents"]["in"] == 60


def test_a_task_carries_no_list_of_all_inputs(tokenizer_json, raw, texts, tmp_path):
    import pickle

    job = make_job([raw("a.jsonl", texts)], tokenizer_json)
    job = replace(job, inputs=tuple((f"s3://bucket/{k}", 10**9) for k in range(10_000)))
    sizes = []

    def run(tasks, n_workers, /, **options):
        sizes.extend(len(pickle.dumps(task)) for task in tasks[:10])
        raise InterruptedError

    with pytest.raises(InterruptedError):
        build(job, tmp_path / "out", run=run)
    assert max(sizes) < 2000


@pytest.mark.parametrize(("n_files", "n_workers"), [(2, 2), (16, 16), (100, 128)])
def test_a_packed_file_is_read_once_where_there_are_files_enough(tokenizer_json, raw, texts, n_files, n_workers):
    from open_lm.preprocess.job import text_tasks

    job = make_job([raw("a.jsonl", texts)], tokenizer_json)
    job = replace(job, inputs=tuple((f"{k}.zst", 10**9) for k in range(n_files)))
    assert len(text_tasks(job, n_workers)) == n_files


def test_text_and_markdown_files_are_a_document_each(tmp_path, raw, tokenizer_json, make_2048):
    import tokenizers

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("first line\n\nsecond, of the same document\n")
    (folder / "b.md").write_text("# Title\n")
    (folder / "empty.txt").write_text(" \n")
    ledger = make_2048([
        "--input-files", str(folder), "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer_json),
        "--seqlen", "3", "--num-workers", "1",
    ])  # fmt: skip
    assert ledger["documents"] == {"in": 3, "tokenized": 2, "rejected": {"empty": 1}}
    encode = tokenizers.Tokenizer.from_file(str(tokenizer_json)).encode
    expected = [*encode("first line\n\nsecond, of the same document\n").ids, 0, *encode("# Title\n").ids, 0]
    assert ledger["tokens"]["in"] == len(expected)


def test_overwriting_in_a_store_keeps_the_old_set_whole_until_the_new_one_is(job, tmp_path, raw, tokenizer_json, texts):
    import fsspec

    from open_lm import storage
    from open_lm.data.sources import open_source

    to = Destination("memory://overwrite/out", str(tmp_path / "work"))
    text = Path(job.tokenizer).read_text()
    build_data_set(job, to, text, n_workers=1)
    old = {
        shard.name: list(read_samples(shard.url)) for shard in read_manifest("memory://overwrite/out/manifest.jsonl")
    }
    smaller = make_job([raw("c.jsonl", texts[:5])], tokenizer_json)

    class Killed(Exception):
        pass

    def killed(tasks, n_workers, /, **options):
        workers.run_tasks(tasks, n_workers, **options)
        if options["label"] == "write shards":
            raise Killed

    with pytest.raises(Killed):
        build_data_set(smaller, to, text, n_workers=1, overwrite=True, run=killed)
    for shard in read_manifest("memory://overwrite/out/manifest.jsonl"):
        found = list(read_samples(shard.url))
        assert [n for n, _ in found] == [n for n, _ in old[shard.name]]
    ledger = build_data_set(smaller, to, text, n_workers=1, overwrite=True)
    assert open_source("memory://overwrite/out/*.tar").n_sequences == ledger["samples"]
    assert len(storage.glob("memory://overwrite/out/*.tar")) == ledger["shards"]
    fsspec.filesystem("memory").rm("/overwrite", recursive=True)


def test_ids_that_do_not_fit_the_type_are_an_error_and_never_wrap():
    import numpy as np
    import tokenizers

    from open_lm.data.formats import token_dtype
    from open_lm.data.tokenizer import Tokenizer
    from open_lm.preprocess.encoding import DocumentEncoder

    model = tokenizers.models.BPE(vocab={"a": 0, "b": 65_600, "</s>": 1}, merges=[])
    gaps = tokenizers.Tokenizer(model)
    gaps.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(gaps, "gaps")
    assert tokenizer.vocab_size == 65_601 and token_dtype(tokenizer.vocab_size) == np.uint32
    assert DocumentEncoder(tokenizer, "tokenizers", token_dtype(65_601)).encode(["ab"])[0].tolist() == [0, 65_600, 1]
    with pytest.raises(DataError, match="gives id 65600"):
        DocumentEncoder(tokenizer, "tokenizers", np.dtype("<u2")).encode(["ab"])
