"""Benchmark scores of a model of transformers: `openlm evaluate --hf-model`, from Python.

    python examples/evaluate_transformers.py FOLDER [MODEL]

MODEL is a hub id or a local folder; without it a small Llama with random weights is made.
"""

import sys
from pathlib import Path
from typing import Any

from open_lm.commands import evaluate


def make_model(folder: Path) -> str:
    """A folder with a small Llama and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=257, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    return str(folder)


def main(folder: Path, model: str | None = None) -> dict[str, Any]:
    """Score the model on the five small tasks that come with the package; `{task: score}`."""
    model = model or make_model(folder / "llama")
    results = evaluate.main(
        ["--hf-model", model, "--hf-seq-len", "512", "--tokenizer", model, "--eval-yaml", "quickstart"]
        + ["--device", "cpu", "--output-dir", str(folder / "scores")]
    )
    return {record.key: record.value for record in results.runs[0].records}


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), *sys.argv[2:3]))
