"""`--hf-model`: a transformers architecture, resolved to a config that a checkpoint keeps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from open_lm.errors import ConfigError

NOT_ARCHITECTURE = {"transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "problem_type"}
"""Keys of a config.json that say nothing about the model."""


def attention_flops(n_layers: int, width: int, seq_len: int, window: int | None = None) -> int:
    """Training FLOPs a token of scores and mixing in causal attention, over the mean number of keys a query sees."""
    window = min(window or seq_len, seq_len)
    return 12 * n_layers * width * (2 * seq_len - window) * window // (2 * seq_len)


@dataclass(frozen=True)
class HFConfig:
    """An AutoModelForCausalLM: where its first weights come from, and all that is needed to build it without them."""

    hf_model: str
    seq_len: int
    vocab_size: int
    hf_config: dict[str, Any] = field(hash=False)
    hf_fsdp_block: str | None = None

    kind: ClassVar[str] = "--hf-model"
    keeps_documents_apart: ClassVar[bool] = False

    @property
    def is_tied(self) -> bool:
        """Whether token embedding and output are one matrix."""
        return bool(self.hf_config.get("tie_word_embeddings"))

    @property
    def mixing_flops_per_token(self) -> int:
        """Training FLOPs of attention, counted as if the heads filled the width."""
        return attention_flops(self.n_layers, self.hidden_dim, self.seq_len)

    @property
    def hidden_dim(self) -> int:
        """Width of the residual stream."""
        return int(self._first_of("hidden_size", "n_embd", "d_model"))

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self._first_of("num_hidden_layers", "n_layer", "n_layers"))

    @property
    def moe_loss_weight(self) -> float:
        """Nothing: experts of other models balance themselves, or not at all."""
        return 0.0

    def has_experts(self, layer: int) -> bool:
        """Whether a block reports what its router did: none does."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values, readable by `ModelConfig.from_dict`."""
        return asdict(self)

    def _first_of(self, *names: str) -> Any:
        found = [self.hf_config[name] for name in names if self.hf_config.get(name) is not None]
        if not found:
            raise ConfigError(f"--hf-model {self.hf_model}: its config has none of {', '.join(names)}.")
        return found[0]


def resolve_hf(name: str, seq_len: int | None, block: str | None) -> HFConfig:
    """The config of a hub id or a local folder; no code of the model's own repository is run.

    Raises:
        ConfigError: there is none, it is no causal language model of transformers, or `seq_len` does not fit it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--hf-model {name}: {reason} Give a hub id or a folder with a config.json.") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"--hf-model {name}: {config.model_type} is no causal language model of transformers.")
    if seq_len is None or seq_len < 1:
        raise ConfigError(f"--hf-model {name} needs --hf-seq-len, the tokens of a sequence: found {seq_len}.")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise ConfigError(f"--hf-seq-len {seq_len}: {name} has positions for {longest}. Give at most that.")
    values = json.loads(config.to_json_string(use_diff=False))
    values = {key: value for key, value in values.items() if key not in NOT_ARCHITECTURE}
    return HFConfig(name, seq_len, config.get_text_config().vocab_size, values, block)
