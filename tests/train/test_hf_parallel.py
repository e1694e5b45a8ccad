"""A model of transformers under FSDP: the run of two ranks is that of one, split by the class of its blocks."""

import pytest
import torch
from runs import SEQ_LEN, VOCAB, flags, metrics, run_command, weights, write_data
from transformers import LlamaConfig, LlamaForCausalLM


def arguments(folder, manifest, published, *extra):
    out = flags(folder, manifest, "--hf-model", published, "--hf-seq-len", str(SEQ_LEN), *extra, steps=4)
    at = out.index("--model")
    return out[:at] + out[at + 2 :]


def test_two_sharded_ranks_train_as_one(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    manifest = write_data(tmp_path / "data")
    sharded = ["--fsdp", "--hf-fsdp-block", "LlamaDecoderLayer"]
    for name, ranks, extra in (("one", 1, []), ("two", 2, sharded)):
        done = run_command(arguments(tmp_path / name, manifest, str(tmp_path / "llama"), *extra), ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_a_block_that_it_does_not_have_is_named(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    ).save_pretrained(tmp_path / "llama")
    manifest = write_data(tmp_path / "data")
    more = ["--hf-fsdp-block", "GPT2Block", "--fsdp", "--force-distributed"]
    done = run_command(arguments(tmp_path, manifest, str(tmp_path / "llama"), *more))
    assert done.returncode != 0 and "--hf-fsdp-block GPT2Block" in done.stderr and "LlamaDecoderLayer" in done.stderr
