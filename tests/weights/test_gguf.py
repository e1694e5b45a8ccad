"""GGUF files hold the model: read back by a reader of another project and computed as llama.cpp does, logits agree."""

import gguf_reference
import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, make_model

from open_lm.errors import CheckpointError, ConfigError
from open_lm.weights.gguf_file import Entry, q8_0, read_gguf, write_gguf
from open_lm.weights.to_gguf import to_gguf

FAMILIES = [name for name in CONFIGS if not name.startswith(("own", "mistral"))]
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def written(tmp_path, name, dtype="float32"):
    model = make_model(name)
    write_gguf(tmp_path / "m.gguf", *to_gguf(model.config, model.state_dict(), dtype))
    return model, tmp_path / "m.gguf"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_the_file_are_ours(tmp_path, name):
    model, path = written(tmp_path, name)
    with torch.inference_mode():
        ours = model(torch.tensor([IDS]))[0][0]
    assert (gguf_reference.logits(*read_gguf(path), IDS) - ours).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_another_reader_finds_the_same_values_and_types(tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    _, path = written(tmp_path, "llama_pairs_gqa", dtype)
    metadata, tensors = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    assert {t.name for t in theirs.tensors} == set(tensors)
    for tensor in theirs.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tensors[tensor.name].shape)
        assert np.array_equal(values, tensors[tensor.name].numpy()), tensor.name
    kinds = {t.name: t.tensor_type.name for t in theirs.tensors}
    wide = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_q.weight"] == wide and kinds["blk.0.attn_norm.weight"] == "F32"
    assert theirs.get_field("llama.attention.head_count_kv").contents() == metadata["llama.attention.head_count_kv"] == 2


def test_q8_0_is_quantised_as_llama_cpp_does_it():
    gguf = pytest.importorskip("gguf")
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    x[2, :32] = 0
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert q8_0(x) == theirs.tobytes()


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.02), ("bfloat16", 0.2), ("q8_0", 0.2)])
def test_narrow_types_are_close(tmp_path, dtype, most):
    model, path = written(tmp_path, "llama", dtype)
    with torch.inference_mode():
        ours = model(torch.tensor([IDS]))[0][0]
    off = (gguf_reference.logits(*read_gguf(path), IDS) - ours).abs().max()
    assert 0 < off < most * ours.std()


def test_models_that_llama_cpp_lacks_and_damaged_files_are_refused(tmp_path):
    model = make_model("own_published")
    with pytest.raises(ConfigError, match="no architecture that computes"):
        to_gguf(model.config, model.state_dict(), "float32")
    with pytest.raises(ConfigError, match="sliding_window 7 below the context of 40"):
        written(tmp_path, "mistral")
    _, path = written(tmp_path, "llama")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="damaged"):
        read_gguf(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"ZIP!")
    with pytest.raises(CheckpointError, match="not a GGUF"):
        read_gguf(tmp_path / "other.gguf")


def test_every_tensor_begins_at_a_multiple_of_the_alignment(tmp_path):
    entries = [Entry(f"t{n}", (n,), "float32", lambda n=n: torch.arange(n).float()) for n in (1, 7, 8, 9)]
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "x", "a.list": ["é", ""], "a.flag": True}, entries)
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    assert metadata == {"general.architecture": "x", "a.list": ["é", ""], "a.flag": True}
    assert all(torch.equal(tensors[f"t{n}"], torch.arange(n).float()) for n in (1, 7, 8, 9))
