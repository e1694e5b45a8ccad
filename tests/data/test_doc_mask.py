"""--doc-mask: where documents end is known from the manifest or said; ranks do not change the run; or a refusal."""

import json
from pathlib import Path

import pytest
from runs import flags, metrics, run, run_command, write_data

from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader, validation_batches
from open_lm.errors import ConfigError


def first_batch(manifest, **more):
    config = DataConfig(dataset_manifest=(manifest,), doc_mask=True, workers=0, **more)
    return next(
        build_loader(config, vocab_size=16, seq_len=16, global_batch=4, rank=0, world_size=1, seed=0).batches(0, 1)
    )


def numbered(inputs_BT, end):
    """Numbers of documents, counted token by token."""
    rows = []
    for row in inputs_BT.tolist():
        numbers, document = [], 0
        for token in row:
            numbers.append(document)
            document += token == end
        rows.append(numbers)
    return rows


def with_end_in_manifest(manifest, eot_ids):
    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    rows = [{**row, "eot_id": eot} for row, eot in zip(rows, eot_ids, strict=True)]
    Path(manifest).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_documents_end_where_the_flag_the_manifest_or_openlm_says(tmp_path):
    manifest = write_data(tmp_path / "a")
    for found, end in ((first_batch(manifest), 0), (first_batch(manifest, doc_mask_token=5), 5)):
        assert found.documents_BT.tolist() == numbered(found.inputs_BT, end)
    with_end_in_manifest(manifest, [3, 3])
    batch = first_batch(manifest)
    assert batch.documents_BT.tolist() == numbered(batch.inputs_BT, 3)
    shapes = {"vocab_size": 16, "seq_len": 16, "batch": 4, "rank": 0, "world_size": 1}
    config = DataConfig(doc_mask=True)
    held_out = next(validation_batches(f"{tmp_path}/a/{{00000000..00000001}}.tar", **shapes, config=config))
    assert held_out.documents_BT.tolist() == numbered(held_out.inputs_BT, 3)
    with_end_in_manifest(manifest, [3, 4])
    with pytest.raises(ConfigError, match="--doc-mask-token"):
        first_batch(manifest)


@pytest.mark.parametrize("extra", [["--fsdp", "--grad-checkpointing"], ["--accum-freq", "2"]], ids=["fsdp", "ddp"])
def test_ranks_do_not_change_a_masked_run(tmp_path, extra):
    manifest = write_data(tmp_path / "data")
    held_out = ["--val-data", f"{tmp_path}/data/00000000.tar", "--doc-mask"]
    run(tmp_path, manifest, *held_out, name="one", steps=4)
    run(tmp_path, manifest, *held_out[:2], name="across", steps=4)
    done = run_command(flags(tmp_path, manifest, *held_out, *extra, name="two", steps=4), ranks=2)
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "valid/loss"):
        one, two, across = (list(metrics(tmp_path, name, key).values()) for name in ("one", "two", "across"))
        assert two == pytest.approx(one, abs=1e-5)
        assert one and all(abs(a - b) > 1e-5 for a, b in zip(one, across, strict=True))


@pytest.mark.parametrize(("model", "name"), [("mamba", "a Mamba"), ("hf", "--hf-model")])
def test_models_that_cannot_keep_documents_apart_are_refused_by_name(tmp_path, model, name):
    manifest = write_data(tmp_path / "data")
    (tmp_path / "mamba.json").write_text(json.dumps({"d_model": 16, "n_layer": 1, "vocab_size": 16, "seq_len": 16}))
    asked = ["--model", str(tmp_path / "mamba.json")]
    if model == "hf":
        from transformers import LlamaConfig

        LlamaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
        asked = ["--hf-model", str(tmp_path), "--hf-seq-len", "16"]
    arguments = flags(tmp_path, manifest, *asked, "--doc-mask")
    if model == "hf":
        arguments = [a for k, a in enumerate(arguments) if a != "--model" and arguments[k - 1] != "--model"]
    from open_lm.main import main

    with pytest.raises(ConfigError, match=f"--doc-mask: not with {name}"):
        main(arguments)


def test_a_token_without_the_mask_is_refused():
    with pytest.raises(ConfigError, match="--doc-mask-token 0"):
        DataConfig(doc_mask_token=0)
