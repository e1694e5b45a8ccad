"""Sizes of a ladder: the architecture of each, its parameter count, and the devices that it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from open_lm.errors import ConfigError
from open_lm.ladder.batches import DeviceMeshSpec
from open_lm.ladder.checked import checked, known_keys, whole
from open_lm.model.config import ModelConfig, ModelFlags, resolve_architecture
from open_lm.model.describe import model_size

COUNTINGS = {
    "non-embedding": "all parameters but the token embedding; the output head counts",
    "non-vocabulary": "all parameters but token embedding and output head",
    "total": "all parameters",
}
"""Ways to count N, the first OLMo-core's; a law fitted with one does not hold for another."""
SIZE_TOLERANCE = 0.05
"""Relative distance of N from the label of a size above which a plan warns."""


@dataclass(frozen=True)
class Preset:
    """A size of OLMo-core's ladder: its shape, the micro-batch of one H100 at sequence 8192, the least devices."""

    hidden_dim: int
    n_layers: int
    n_heads: int
    rank_microbatch_tokens: int
    min_devices: int = 8
    wide_ffn: bool = True


PRESETS = {
    "60M": Preset(384, 8, 8, 16_384),
    "100M": Preset(512, 12, 8, 16_384),
    "190M": Preset(768, 12, 12, 65_536),
    "370M": Preset(1024, 16, 16, 49_152),
    "600M": Preset(1280, 16, 16, 40_960),
    "760M": Preset(1536, 16, 16, 40_960),
    "1B": Preset(2048, 16, 16, 32_768),
    "3B": Preset(3328, 16, 16, 16_384),
    "7B": Preset(4096, 32, 32, 8_192, wide_ffn=False),
    "13B": Preset(5120, 40, 40, 8_192, min_devices=16, wide_ffn=False),
}
OLMO_VOCAB = 100_352
"""100,278 tokens of OLMo's tokenizer, padded to a multiple of 128."""
MICROBATCH_SCALES = {"h100": 1, "h200": 1, "b200": 2}
DEFAULT_MICROBATCH_TOKENS = 16_384
"""Micro-batch of a rank where neither the ladder file nor the table says one."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
_RULE_KEYS = {"hidden_dim", "n_layers", "n_heads", "ffn_multiplier", "ffn_dim"}
_COUNTS = ("hidden_dim", "n_layers", "n_heads", "ffn_dim", "rank_microbatch_tokens", "min_devices", "min_dp")
_SIZE_KEYS = (*_COUNTS, "ffn_multiplier", "model")


@dataclass(frozen=True)
class SizeSpec:
    """One size: what to build, the micro-batch of a rank, and the least devices."""

    name: str
    architecture: ModelConfig
    rank_microbatch_tokens: int
    mesh: DeviceMeshSpec = field(default_factory=DeviceMeshSpec)


def count_params(architecture: ModelConfig, counting: str) -> int:
    """N by one of `COUNTINGS`; a table that embedding and head share counts as the head."""
    size = model_size(architecture)
    if counting == "total":
        return size.parameters
    if counting == "non-vocabulary":
        return size.non_embedding_parameters
    tables = 1 if architecture.is_tied else 2
    return size.parameters - (tables - 1) * (size.embedding_parameters // tables)


def label_params(name: str) -> float | None:
    """The parameters that a name such as 190M or 1.5B promises; None for other names."""
    number, unit = name[:-1], name[-1:].upper()
    try:
        return float(number) * UNITS[unit]
    except (KeyError, ValueError):
        return None


def gated_ffn(hidden_dim: int, multiplier: float) -> int:
    """Hidden width of a gated layer: `multiplier` times 8/3 of the width, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(multiplier * int(8 * hidden_dim / 3)) / 256)


def _checked_size(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a size in a ladder file, checked; null stands for a key that is left out."""
    given = {key: value for key, value in values.items() if value is not None}
    known_keys(f"sizes.{name}.", given, _SIZE_KEYS)
    for key in set(_COUNTS) & set(given):
        whole(f"sizes.{name}.{key}", given[key], 1)
    if "model" in given:
        checked(f"sizes.{name}.model", given["model"], str)
    if checked(f"sizes.{name}.ffn_multiplier", given.get("ffn_multiplier", 1.0), float) <= 0:
        raise ConfigError(f"sizes.{name}.ffn_multiplier in the ladder file must be above 0.")
    return given


class ModelConfigurator:
    """Architectures by the rule of OLMo-core's ladder: RMSNorm, norms on queries and keys, a gated feed-forward layer.

    Subclass it, or pass architectures of your own in the ladder file, to climb with other models.
    """

    def __init__(
        self,
        sequence_length: int,
        vocab_size: int,
        *,
        device_type: str = "any",
        rank_microbatch_tokens: int | None = None,
        model: Mapping[str, Any] | None = None,
    ):
        """`model`: keys of an architecture that every size takes, such as parametrization.

        `rank_microbatch_tokens`: for sizes that do not say their own; None leaves it to the device.
        """
        self.sequence_length, self.vocab_size, self.model = sequence_length, vocab_size, dict(model or {})
        self.device_type, self.rank_microbatch_tokens = device_type.lower(), rank_microbatch_tokens

    def configure(
        self, hidden_dim: int, n_layers: int, n_heads: int, ffn_multiplier: float, ffn_dim: int | None = None
    ) -> ModelConfig:
        """The architecture of one rung; `ffn_dim` None: `ffn_multiplier` times 8/3 of the width."""
        values = {
            "hidden_dim": hidden_dim,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "seq_len": self.sequence_length,
            "vocab_size": self.vocab_size,
            "ffn_dim": ffn_dim or gated_ffn(hidden_dim, ffn_multiplier),
            "model_norm": "rms_norm",
            "qk_norm": True,
        }
        return ModelConfig.from_dict({**values, **self.model}, "model in the ladder file")

    def size(self, name: str, values: Mapping[str, Any] | None) -> SizeSpec:
        """The size `name`: a preset, a registered model, or what `values` of the ladder file say.

        Raises:
            ConfigError: no such size, or keys that do not make one.
        """
        values = _checked_size(name, {} if values is None else values)
        preset = PRESETS.get(name) if not (_RULE_KEYS | {"model"}) & set(values) else None
        if preset is not None:
            made = self.configure(preset.hidden_dim, preset.n_layers, preset.n_heads, 1.5 if preset.wide_ffn else 1.0)
        else:
            made = self._own(name, values)
        known = preset if self._scale() else None
        tokens = values.get("rank_microbatch_tokens") or self.rank_microbatch_tokens
        if tokens is None:
            tokens = known.rank_microbatch_tokens * self._scale() if known else DEFAULT_MICROBATCH_TOKENS
        devices = values.get("min_devices", known.min_devices if known else 1)
        return SizeSpec(name, made, tokens, DeviceMeshSpec(devices, values.get("min_dp")))

    def _scale(self) -> int:
        """Multiple of an H100's micro-batch that this kind of device holds; 0 for one that the table lacks."""
        return next((times for word, times in MICROBATCH_SCALES.items() if word in self.device_type), 0)

    def _own(self, name: str, values: dict[str, Any]) -> ModelConfig:
        if "hidden_dim" in values:
            missing = [key for key in ("hidden_dim", "n_layers") if key not in values]
            if missing or "model" in values:
                raise ConfigError(f"sizes.{name} in the ladder file: give hidden_dim and n_layers, or model, not both.")
            width = values["hidden_dim"]
            heads = values.get("n_heads") or max(1, width // 64)
            multiplier = values.get("ffn_multiplier", 1.5)
            return self.configure(width, values["n_layers"], heads, multiplier, values.get("ffn_dim"))
        stored = resolve_architecture(ModelFlags(model=values.get("model", name))).to_dict()
        own = {"seq_len": self.sequence_length, "vocab_size": self.vocab_size, **self.model}
        return ModelConfig.from_dict({**stored, **own}, f"sizes.{name} in the ladder file")
