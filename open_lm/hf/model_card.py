"""Model card of an exported model: the facts its checkpoint holds, and how to load it."""

from __future__ import annotations

import json
import re
from typing import Any

from open_lm import text
from open_lm.model.architecture import MambaConfig
from open_lm.model.hf_config import HFConfig


def model_card(
    title: str, facts: dict[str, Any], model: Any, class_name: str, difference: float | None, license: str | None
) -> str:
    """The README.md of an exported model, with the metadata block that the Hub reads; no path or url of its making."""
    config = model.config
    n_parameters = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    own_code = ", trust_remote_code=True" if class_name == "OpenLMForCausalLM" else ""
    rows = [
        ("parameters", text.count(n_parameters)),
        *architecture_facts(config),
        ("context", f"{config.seq_len} tokens"),
        *training_facts(facts),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    terms = f"license: {json.dumps(license, ensure_ascii=False)}\n" if license else ""
    compared = (
        f"; its logits differ from OpenLM's own by at most {difference:.2g} (fp32)" if difference is not None else ""
    )
    return f"""---
{terms}library_name: transformers
pipeline_tag: text-generation
tags: [open_lm]
---
# {title}

A language model trained with OpenLM.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{own_code})
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Loaded as `{class_name}`{compared}.
{command(facts)}"""


def command(facts: dict[str, Any]) -> str:
    """Recipe to repeat the run: its flags as a file for --config; nothing where they are not known."""
    flags = (facts.get("config") or {}).get("flags") or {}
    given = {name: value for name, value in flags.items() if is_public(name, value)}
    if not given:
        return ""
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in sorted(given.items()))
    return f"""
Trained by `openlm train --config run.yaml` with flags for data and folders
beside `run.yaml`:

```yaml
{lines}
```
"""


PRIVATE = ("name", "logs", "wandb", "notes", "report_to", "address", "url", "tokenizer")
"""Parts of names of flags that say where and for whom a run was made, not how."""


def is_public(name: str, value: Any) -> bool:
    """Whether a flag is set and says how the model was made, and not where its files lie."""
    if value in (None, False, [], (), "") or any(part in name.split("_") for part in PRIVATE):
        return False
    words = value if isinstance(value, list | tuple) else [value]
    return not any(isinstance(word, str) and re.search(r"[/\\~@:]|\.(json|ya?ml|pt|tar)$", word) for word in words)


def plain_name(path: Any) -> str:
    """The last part of a path or url, without its ending."""
    return str(path).split("::")[0].rstrip("/").rpartition("/")[2].split(".")[0]


def architecture_facts(config: Any) -> list[tuple[str, str]]:
    """Facts of the architecture, as rows of the table."""
    size = ("layers × width", f"{config.n_layers} × {config.hidden_dim}")
    if isinstance(config, MambaConfig):
        return [size, ("kind", f"Mamba, {config.d_state} numbers of state per channel")]
    if isinstance(config, HFConfig):
        return [size, ("began as", config.hf_model)]
    parts = f"{config.model_norm}, {config.ffn_type}, {config.positional_embedding_type}"
    rows = [size, ("heads", str(config.n_heads)), ("norm, feed-forward, positions", parts)]
    if config.moe_freq:
        rows.append(("experts", f"{config.moe_top_k} of {config.moe_num_experts} in every {config.moe_freq}. layer"))
    return rows


def training_facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts of the training, as rows of the table; those that the checkpoint does not state are left out."""
    flags = (facts.get("config") or {}).get("flags") or {}
    rows = [
        ("run", facts.get("name")),
        ("steps", facts.get("step")),
        ("tokens seen", text.count(facts["tokens"]) if facts.get("tokens") else None),
        ("peak learning rate", flags.get("lr")),
        *((f"validation loss ({', '.join(map(plain_name, m.get('val_data') or []))})", f"{m['loss']:.4f}")
          for m in facts.get("evaluation_metrics") or [] if isinstance(m, dict) and "loss" in m),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in rows if value not in (None, "", [])]
