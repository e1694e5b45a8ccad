"""Tiny tokenizers of the common styles, with templates, and the command that makes chat data."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers

ROOT = Path(__file__).resolve().parents[2]
STYLES = {
    "gpt2": {"eos": "<|endoftext|>", "pad": None},
    "neox": {"eos": "<|endoftext|>", "pad": "<|padding|>"},
    "llama3": {"eos": "<|eot_id|>", "pad": "<|finetune_right_pad_id|>"},
}
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory):
    """`tokenizer_of(style)`: the folder of a tokenizer with that style's special tokens; llama3 has a template."""

    def make(style):
        special = {t for t in STYLES[style].values() if t} | {"<|im_start|>", "<|im_end|>"}
        if style == "llama3":
            special |= {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"}
        trained = tokenizers.Tokenizer(tokenizers.models.BPE())
        trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=sorted(special), initial_alphabet=alphabet, show_progress=False
        )
        trained.train_from_iterator([(ROOT / "CONTRIBUTING.md").read_text()], trainer)
        folder = tmp_path_factory.mktemp(style)
        trained.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STYLES[style]["eos"]}
        config |= {"pad_token": STYLES[style]["pad"]} if STYLES[style]["pad"] else {}
        if style == "llama3":
            config |= {"bos_token": "<|begin_of_text|>", "chat_template": LLAMA3}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return functools.cache(make)


@pytest.fixture
def make_chat(tmp_path, tokenizer_of):
    """`make_chat(rows, *flags, style=, name=)` runs make_assistant_data; returns its ledger and folder."""
    spec = importlib.util.spec_from_file_location("make_assistant_data", ROOT / "datapreprocess/make_assistant_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def made(rows, *flags, style="neox", name="out"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = ["--input-files", str(path), "--output-dir", str(tmp_path / name), "--seqlen", "120"]
        return module.main([*args, "--tokenizer", str(tokenizer_of(style)), *flags]), tmp_path / name

    return made
