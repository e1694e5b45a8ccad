"""Export of a checkpoint: a folder for transformers, vLLM and lm-eval, or a GGUF file for llama.cpp."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.command import run
from open_lm.errors import CheckpointError, ConfigError, StorageError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.model.config import ModelFlags

TOLERANCE = 1e-3
"""Largest difference of logits (fp32) between the model here and the one loaded from the folder."""

DTYPES = ("float32", "bfloat16", "float16", "q8_0")


@dataclass(frozen=True)
class ExportConfig:
    """Export"""

    checkpoint: str = flag("", "Run folder (its newest checkpoint), weights file, or hf://owner/name.")
    out: str = flag("", "Folder to write, or with --to gguf the .gguf file; it must not exist.")
    to: str = flag("hf", "hf: a folder of transformers; gguf: one file for llama.cpp.", choices=("hf", "gguf"))
    tokenizer: str | None = flag(
        None,
        "Hub id, local folder or tokenizer.json that goes with it; none: leave it out. None: the one the checkpoint "
        "names.",
    )
    chat_template: str | None = flag(
        None,
        "Template to put into the tokenizer's files, for a model fine-tuned with it: a jinja file, or one of tulu, "
        "chatml, plain. None: that of the checkpoint's data, else the tokenizer's own.",
    )
    dtype: str | None = flag(
        None, "Type of the written weights; q8_0 (8 bits) with --to gguf. None: the checkpoint's.", choices=DTYPES
    )
    check: str = flag(
        "logits",
        "With --to hf, after writing. logits: load the folder in transformers and compare; needs memory for both "
        "models in fp32. weights: read every tensor back, one at a time. none: neither.",
        choices=("logits", "weights", "none"),
    )
    license: str | None = flag(None, "Licence of the weights on the card, as the Hub spells it: mit, apache-2.0, …")
    push: str | None = flag(None, "owner/name on the Hub to upload the folder to (made private if new).")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint is missing: give a run folder or an epoch_K.pt.")
        if not self.out:
            raise ConfigError("--out is missing: give the folder to write.")
        if self.push and len(self.push.split("/")) != 2:
            raise ConfigError(f"--push {self.push}: need owner/name.")
        if storage.is_remote(self.out):
            raise ConfigError(f"--out {self.out}: need a folder on this machine's disk. Copy it there afterwards.")
        if self.to == "hf" and self.out.endswith(".gguf"):
            raise ConfigError(
                f"--out {self.out}: a folder of transformers is written. Add --to gguf, or name a folder."
            )
        if self.to == "gguf" and (not self.out.endswith(".gguf") or self.push):
            raise ConfigError(
                f"--to gguf writes one file: --out {self.out} must end in .gguf, and --push is for --to hf."
            )
        if self.to == "hf" and self.dtype == "q8_0":
            raise ConfigError("--dtype q8_0 is a type of --to gguf. Choose float32, bfloat16 or float16.")


def main(argv: Sequence[str] | None = None) -> float | None:
    """Export as the flags ask; returns the largest difference of logits, if they were compared."""
    parser = Parser(prog="open_lm.hf.export", description=__doc__)
    for group in (ExportConfig, ModelFlags):
        add_group(parser, group)
    args = parser.parse_args(argv)
    flags = read_group(args, ModelFlags)
    given = {name: value for name, value in vars(flags).items() if value != getattr(ModelFlags(), name)}
    return export(read_group(args, ExportConfig), **given)


def export(config: ExportConfig, **architecture: Any) -> float | None:
    """Write the folder or the file; returns the largest difference of logits after reloading, if they were compared.

    Raises:
        ConfigError: `out` exists, the model cannot be exported, or its tokenizer is not found.
        CheckpointError: the reloaded model differs; nothing is then left behind.
        StorageError: it cannot be written, as on a full disk; nothing is left behind either.
    """
    from open_lm.checkpoint.load_model import load_model
    from open_lm.checkpoint.read import read_facts
    from open_lm.checkpoint.resolve import resolve
    from open_lm.hf.tokenizer_files import tokenizer_of, with_chat_template

    out = Path(config.out).expanduser()
    if out.exists():
        raise ConfigError(f"--out {config.out} exists: choose another one, or remove it.")
    found = resolve(config.checkpoint, "weights")
    facts = read_facts(found)
    plain, stored = tokenizer_of(config.tokenizer, facts, config.checkpoint), (facts.get("config") or {})
    tokenizer = with_chat_template(plain, config.chat_template, stored.get("chat_template"), marked=config.to == "hf")
    dtype = None if config.dtype == "q8_0" else config.dtype
    model = load_model(found, dtype=dtype, **architecture)
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: "
            "give the one it was trained with."
        )
    with whole(out) as part:
        if config.to == "gguf":
            difference = None
            write_gguf_file(model, tokenizer, config.dtype, part)
        else:
            difference = write_folder(config, model, facts, tokenizer, part)
    if config.push:
        from open_lm.weights.hub import push

        print(f"pushed to {push(out, config.push)}", flush=True)
    return difference


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path beside `out` that becomes `out` when the block has ended well, and is gone otherwise.

    Raises:
        StorageError: the disk is full, or nothing can be written there.
    """
    from safetensors import SafetensorError

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            yield Path(temporary) / out.name
            os.rename(Path(temporary) / out.name, out)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) is None and "I/O error" not in str(error):
            raise  # not the disk's: transformers raises an OSError for much else
        raise StorageError(f"--out {out}: cannot write there ({error}). Make room, or choose another place.") from error


def write_folder(config: ExportConfig, model: Any, facts: dict[str, Any], tokenizer: Any, folder: Path) -> float | None:
    """The folder of transformers with tokenizer and card, checked as `config.check` says."""
    from open_lm.hf.classes import save, to_transformers
    from open_lm.hf.model_card import model_card
    from open_lm.hf.tokenizer_files import add_tokenizer

    folder.mkdir()
    theirs = to_transformers(model.config, model.state_dict())
    if tokenizer:
        add_tokenizer(tokenizer, theirs, folder)
    save(theirs, folder)
    class_name, difference = type(theirs).__name__, None
    if config.check == "weights":
        require_same_weights(theirs, folder)
    if config.check == "logits":
        del theirs
        difference = largest_difference(model, folder)
    card = model_card(Path(config.out).name, facts, model, class_name, difference, config.license)
    (folder / "README.md").write_text(card)
    found = "" if difference is None else f"; logits after reloading differ by at most {difference:.2g}"
    print(f"wrote {class_name} to {config.out}{found}", flush=True)
    return difference


def write_gguf_file(model: Any, tokenizer: Any, dtype: str | None, path: Path) -> None:
    """The GGUF file, with the tokenizer's vocabulary where there is one.

    Raises:
        ConfigError: llama.cpp has no such architecture, or no tokenizer that splits text alike.
    """
    from open_lm.weights.gguf_file import write_gguf
    from open_lm.weights.gguf_tokenizer import NO_TOKENIZER, gguf_tokenizer
    from open_lm.weights.to_gguf import to_gguf

    kind = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
    metadata, entries = to_gguf(model.config, model.state_dict(), kind)
    vocabulary = gguf_tokenizer(tokenizer, model.config.vocab_size) if tokenizer else NO_TOKENIZER
    write_gguf(path, metadata | vocabulary, entries)
    print(f"wrote {len(entries)} tensors as {kind} for llama.cpp's {metadata['general.architecture']}", flush=True)


def require_same_weights(theirs: Any, folder: Path) -> None:
    """Read every tensor of the folder back and compare it, one at a time.

    Raises:
        CheckpointError: one is missing or differs.
    """
    import torch
    from safetensors import safe_open

    stored: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  (not a dict)
                stored[name] = file
                if not torch.equal(content.get_tensor(name), theirs.state_dict()[name]):
                    raise CheckpointError(f"{file.name}: {name} is not what was written. Is the disk sound?")
    names = {p.data_ptr(): name for name, p in theirs.state_dict().items()}
    if missing := [name for name in names.values() if name not in stored]:
        tied = {p.data_ptr() for name, p in theirs.state_dict().items() if name in stored}
        missing = [name for name in missing if theirs.state_dict()[name].data_ptr() not in tied]
        if missing:
            raise CheckpointError(f"{folder}: {missing[0]} was not written. Please report the architecture.")


def largest_difference(model: Any, folder: Path) -> float:
    """Between the logits of `model` and of what transformers loads from `folder`, both in fp32, over random tokens.

    Raises:
        CheckpointError: it is above TOLERANCE.
    """
    import torch
    from transformers import AutoModelForCausalLM

    own_code = (folder / "modeling_openlm.py").exists()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own_code).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(64, model.config.seq_len))
    ids_BT = torch.randint(model.config.vocab_size, shape, generator=generator)
    with torch.inference_mode():
        difference = (model.float()(ids_BT)[0] - theirs(ids_BT).logits.float()).abs().max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the exported model differs: logits after reloading are off by {difference:.3g}, more than {TOLERANCE}. "
            "Nothing was written. Please report the architecture."
        )
    return difference


if __name__ == "__main__":
    run(main)
