"""Setup of a check of µ-transfer: the models that it trains, and the sizes that it measures. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.model.architecture import ModelConfig

HEAD_DIM = 16
WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 4, 8, 16)


@dataclass(frozen=True)
class TransferSetup:
    """Settings that every model of a check shares; `lr` is the learning rate at `base_width` and `base_depth`."""

    parametrization: str = "completep"
    base_width: int = 64
    base_depth: int = 4
    lr: float = 1e-3
    steps: int = 10
    batch: int = 8
    seq_len: int = 32
    vocab_size: int = 64
    seed: int = 0

    def architecture(self, width: int, depth: int) -> ModelConfig:
        """A model of `width` and `depth` with heads of one width."""
        return ModelConfig(
            hidden_dim=width,
            n_layers=depth,
            n_heads=max(1, width // HEAD_DIM),
            seq_len=self.seq_len,
            vocab_size=self.vocab_size,
            ffn_dim=4 * width,
            model_norm="rms_norm",
            parametrization=self.parametrization,
            base_width=self.base_width,
            base_depth=self.base_depth,
        )


@dataclass(frozen=True)
class Coordinates:
    """Mean absolute size of a part's output after training, and of the change that training made to it."""

    width: int
    depth: int
    part: str
    size: float
    change: float
