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


@pytest.mark.parametrize("name", ["llama", "stablelm", "gpt_neox", "olmoe"])
def test_the_epsilon_of_the_norms_is_the_models(name):
    model = make_model(name, norm_eps=3e-4)
    metadata, _ = to_gguf(model.config, model.state_dict(), "float32")
    assert [value for key, value in metadata.items() if key.endswith("epsilon")] == [3e-4]


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
    assert (
        theirs.get_field("llama.attention.head_count_kv").contents() == metadata["llama.attention.head_count_kv"] == 2
    )


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


def save_tokenizer(folder, pre_tokenizer, normalizer=None):
    """A byte-level tokenizer of code and prose with that way to split a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["The machine's learning: it's 1234 of them!", "def f(x):\n    return x"] * 20, trainer)
    made.add_tokens(["    "])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


NASTY = [
    "", " ", "  \n\t x", "It's we'LL they're'd", "12345 1,234.50 x²", "naïve café — “quotes” …", "你好，世界 🙂",
    "👩‍👩‍👧",
    "def f(x):\n    return x  # tail\r\n\r\n", "<|endoftext|>a<|endoftext|>", "\u00a0nbsp\u2003em\ufeff", "a" * 300,
    "\x00\x7f",
]  # fmt: skip


def from_metadata(metadata):
    """A tokenizer made of the file's metadata alone."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    from open_lm.weights.gguf_tokenizer import LLAMA3

    names, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == 1}
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind in (3, 4):
            vocab[name] = i
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab, merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bytes_only]),
    }[metadata["tokenizer.ggml.pre"]]
    made.add_special_tokens([names[i] for i, kind in enumerate(kinds) if kind == 3])
    made.add_tokens([AddedToken(names[i], normalized=False) for i, kind in enumerate(kinds) if kind == 4])
    return made


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe"])
def test_the_command_writes_a_file_whose_tokens_are_ours_on_a_nasty_corpus(tmp_path, name):
    from tiny_models import BASE, save_checkpoint
    from tokenizers import Regex, pre_tokenizers

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.hf.export import main
    from open_lm.model import create_model
    from open_lm.model.config import ModelConfig
    from open_lm.weights.gguf_tokenizer import LLAMA3

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }[name]
    path = save_tokenizer(tmp_path, split)
    model = create_model(ModelConfig(**{**BASE, "vocab_size": 430, "model_norm": "rms_norm"}))
    checkpoint = save_checkpoint(model, tmp_path / "e.pt")
    flags = ["--to", "gguf", "--tokenizer", str(path), "--dtype", "q8_0"]
    main(["--checkpoint", checkpoint, "--out", str(tmp_path / "m.gguf"), *flags])
    metadata, _ = read_gguf(tmp_path / "m.gguf")
    assert metadata["tokenizer.ggml.pre"] == name and len(metadata["tokenizer.ggml.tokens"]) == 430
    assert metadata["tokenizer.ggml.eos_token_id"] == 0 and metadata["tokenizer.ggml.token_type"][-1] == 5
    ours, theirs = load_tokenizer(str(path)), from_metadata(metadata)
    for text in NASTY:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_tokenizers_that_split_in_ways_without_a_name_are_refused(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.weights.gguf_tokenizer import gguf_tokenizer

    for pre, normalizer in (
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel()]), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
    ):
        path = save_tokenizer(tmp_path, pre, normalizer)
        with pytest.raises(ConfigError, match="no name known here"):
            gguf_tokenizer(load_tokenizer(str(path)), 430)


@pytest.mark.parametrize("as_sequence", [False, True])
def test_what_a_tokenizer_puts_around_a_text_is_in_the_file_however_it_says_so(tmp_path, as_sequence):
    from tokenizers import Tokenizer, pre_tokenizers, processors

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.weights.gguf_tokenizer import gguf_tokenizer

    path = save_tokenizer(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    found = []
    for template in ("$A", "<|padding|> $A", "<|padding|> $A <|endoftext|>"):
        made = Tokenizer.from_file(str(path))
        special = [(name, made.token_to_id(name)) for name in ("<|padding|>", "<|endoftext|>")]
        post = processors.TemplateProcessing(single=template, special_tokens=special)
        steps = [processors.ByteLevel(trim_offsets=False), post]  # as in Llama 3's tokenizer.json
        made.post_processor = processors.Sequence(steps) if as_sequence else post
        made.save(str(tmp_path / "around.json"))
        metadata = gguf_tokenizer(load_tokenizer(str(tmp_path / "around.json")), 430)
        found.append(tuple(metadata[f"tokenizer.ggml.{key}"] for key in ("add_bos_token", "add_eos_token")))
        assert metadata["tokenizer.ggml.bos_token_id"] == (made.token_to_id("<|padding|>") if found[-1][0] else 0)
    assert found == [(False, False), (True, False), (True, True)]
