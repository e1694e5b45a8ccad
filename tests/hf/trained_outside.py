"""Run by an interpreter that cannot import open_lm: what people do with an exported folder.

`python trained_outside.py FOLDER REFERENCE` prints JSON of what was found.
"""

import json
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
folder, reference = sys.argv[1], torch.load(sys.argv[2])
ids = reference["ids"]


def load():
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


class Rows(torch.utils.data.Dataset):
    """24 rows, of which each other one has half of its labels masked."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        row = torch.randint(2, 53, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": row, "labels": torch.where(torch.arange(16) < 8 * (i % 2), -100, row)}


def trained(batch, accumulation, **flags):
    """Losses and the last weights of 3 steps of HF's Trainer over the same 8 rows a step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3,
            learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, optim="sgd", max_grad_norm=1e9, train_sampling_strategy="sequential",
            **flags,
        ) if hasattr(TrainingArguments, "train_sampling_strategy") else TrainingArguments(
            out, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3,
            learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, optim="sgd", max_grad_norm=1e9, **flags,
        )  # fmt: skip

        class InOrder(Trainer):
            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        model = load()
        trainer = InOrder(model, arguments, train_dataset=Rows())
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(checkpointing):
    model = load().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def lora(found):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    model = load()
    targets = [
        name for name in ("in_proj", "q_proj", "query_key_value") if any(name in n for n, _ in model.named_modules())
    ]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = wrapped(ids, labels=ids).loss
    before.backward()
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p -= 0.05 * (p.grad if p.grad is not None else 0)
    found["lora_learns"] = wrapped(ids, labels=ids).loss.item() < before.item()
    merged = wrapped.merge_and_unload()
    found["lora_merges"] = merged(ids).logits.shape == reference["logits"].shape


model = load().eval()
with torch.inference_mode():
    out = model(ids, output_hidden_states=True)
    found = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "off": (out.logits - reference["logits"]).abs().max().item(),
        "hidden": len(out.hidden_states),
        "tuple": isinstance(model(ids, return_dict=False), tuple),
        "kept": model(ids, logits_to_keep=2).logits.shape[1],
        "kept_by_index": model(ids, logits_to_keep=torch.tensor([0, 3])).logits.shape[1],
        "generated": model.generate(ids[:, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 5:].tolist(),
        "meta": [n for n, p in model.named_parameters() if p.is_meta],
    }
plain, again = gradients(False), gradients(True)
found["checkpointing_off"] = (plain - again).abs().max().item()
runs = [trained(*shape) for shape in ((8, 1), (2, 4), (1, 8))]
found["losses"] = [losses for losses, _ in runs]
found["weights_off"] = max((weights - runs[0][1]).abs().max().item() for _, weights in runs[1:])
lora(found)
with tempfile.TemporaryDirectory() as saved:
    model.save_pretrained(saved)
    back = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
    with torch.inference_mode():
        found["saved_off"] = (back(ids).logits - reference["logits"]).abs().max().item()
print(json.dumps(found))
