"""Throughput of fine-tuning on packed conversations, ours and TRL's SFTTrainer, the same model and data, in turns.

python benchmarks/sft_peers.py [--rounds 4] [--steps 6]        # needs trl and datasets (requirements-dev.txt)

Each round trains both for some steps on one thread; the first step of each is not counted. What is compared is real
(not padding) tokens per second, in the median over all steps.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tokenizers
import torch

from open_lm.commands.prepare_chat import main as prepare_chat
from open_lm.main import main

VOCAB, SEQ_LEN, BATCH = 4096, 512, 8
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}


def write_llama(folder):
    """A Llama of transformers with weights drawn at random; both start from it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 1}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=SEQ_LEN, **SHAPE, **tokens)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder):
    """A word for each id."""
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(VOCAB - 2)} | {"<|endoftext|>": VOCAB - 2, "<|padding|>": VOCAB - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|padding|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|padding|>")
    made.save_pretrained(folder)
    return made


def conversations(n=1500):
    """Dialogues of 30 to 400 words."""
    draw = np.random.default_rng(0)
    said = lambda low, high: " ".join(f"w{k}" for k in draw.integers(0, VOCAB - 2, draw.integers(low, high)))  # noqa: E731
    return [{"question": said(10, 100), "answer": " " + said(20, 300)} for _ in range(n)]


def ours(folder, steps, number):
    """Seconds and real tokens of each step but the first."""
    run = main(
        ["--task", "sft", "--dataset-manifest", f"{folder}/packed/manifest.jsonl", "--pretrained", f"{folder}/llama",
         "--train-steps", str(steps), "--global-batch-size", str(BATCH), "--multiple-data-passes", "--lr", "1e-4",
         "--warmup", "1", "--wd", "0", "--grad-clip-norm", "1", "--device", "cpu", "--precision", "fp32",
         "--workers", "0", "--log-every-n-steps", "1", "--logs-dir", f"{folder}/logs", "--name", f"ours{number}"]
    )  # fmt: skip
    rows = [json.loads(line) for line in Path(run.folder, "metrics.jsonl").read_text().splitlines()][1:]
    return [(row["train/batch_time"], row["train/real_token_share"] * BATCH * SEQ_LEN) for row in rows]


def trls(folder, rows, steps, number):
    """The same of TRL, which packs by best fit, its documents apart by their positions."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/llama", dtype=torch.float32)
    found = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            found.append((time.perf_counter() - self.began, counted.pop()))

    config = SFTConfig(
        output_dir=f"{folder}/trl{number}", packing=True, max_length=SEQ_LEN, per_device_train_batch_size=BATCH,
        max_steps=steps, learning_rate=1e-4, max_grad_norm=1.0, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", logging_steps=1000,
    )  # fmt: skip
    words = [{"input_ids": [*tokenizer(row["question"] + row["answer"]).input_ids, VOCAB - 2]} for row in rows]
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(words),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    counted, step = [], trainer.training_step

    def counting(model, inputs, *args, **kwargs):
        counted.append(int((inputs["labels"] != -100).sum()))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counting
    trainer.train()
    return found[1:]


def rate(steps):
    """Tokens a second, the median over steps."""
    return statistics.median(tokens / seconds for seconds, tokens in steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_llama(f"{folder}/llama")
        write_tokenizer(f"{folder}/tokenizer")
        rows = conversations()
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_chat(
            ["--input-files", f"{folder}/rows.jsonl", "--output-dir", f"{folder}/packed", "--tokenizer",
             f"{folder}/tokenizer", "--chat-template", "plain", "--seqlen", str(SEQ_LEN)]
        )  # fmt: skip
        both = {"ours": [], "trl": []}
        for number in range(options.rounds):
            both["ours"] += ours(folder, options.steps, number)
            both["trl"] += trls(folder, rows, options.steps, number)
            print({name: round(rate(steps)) for name, steps in both.items()}, flush=True)
    ratio = rate(both["ours"]) / rate(both["trl"])
    tokens = {name: round(statistics.mean(t for _, t in steps)) for name, steps in both.items()}
    print(json.dumps({"ratio": round(ratio, 2), "real_tokens_per_step": tokens}))
