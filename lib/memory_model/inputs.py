"""
The inputs of the memory simulation: the model's sizes, the settings of the fine-tuning, and a batch.
"""

from dataclasses import dataclass


@dataclass
class Shape:
    """A Llama-shaped model: sizes as in its config, `linear` as {module: (inputs, outputs)} of one block."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    linear: dict


@dataclass
class Setting:
    """The settings that decide the memory of a fine-tuning, besides the model."""

    method: str
    rank: int
    dropout: float
    targets: tuple
    optimizer: str
    gradient_checkpointing: bool
    padding_free: bool
    liger: bool
    compile: bool
    gpus: int


@dataclass
class Batch:
    """Rows of `width` tokens; padded: some of them are shorter."""

    rows: int
    width: int
    padded: bool

    @property
    def tokens(self):
        return self.rows * self.width


def round_up(number, to):
    return -(-number // to) * to
