"""
Parameters of a fine-tuning run and their variants.
"""

from dataclasses import dataclass

from lib.core.stage import UserError, patched

METHODS = ("lora", "qlora")


@dataclass
class Lora:
    r: int
    alpha: int
    dropout: float
    target_modules: list


@dataclass
class Finetune:
    variants: list
    arms: dict
    template: str
    epochs: int
    max_steps: int
    micro_batch: int
    accumulation: int
    gpus: int
    sharded: bool
    learning_rate: float
    schedule: str
    warmup_steps: int
    optimizer: str
    gradient_checkpointing: bool
    padding_free: bool
    packing: int
    liger: bool
    compile: bool
    workers: int
    max_tokens: int
    eval_steps: int
    logging_steps: int
    seed: int


def with_arm(p, variant):
    """(method, parameters) of a variant; UserError names what there is when the variant or a patched key is unknown."""
    method, _, arm = variant.partition("-")
    if method not in METHODS or (arm and arm not in p.arms):
        known = [m for m in METHODS] + [f"{m}-{a}" for a in p.arms for m in METHODS]
        raise UserError(f"params.yaml: finetune has no variant {variant!r}; use one of {', '.join(known)}")
    return method, patched(p, p.arms[arm] if arm else {}, f"finetune.arms.{arm}", ("variants", "arms"))


def check_sharded(p, variant):
    """Raise UserError for settings that a model in parts cannot have."""
    for wrong, key, value, advice in (
        (p.gpus < 2, "gpus", p.gpus, "use 2 or more"),
        (p.compile, "compile", "true", "use false"),
        # bitsandbytes keeps moments in another shape than the weights', which FSDP cannot gather for a checkpoint.
        (not p.optimizer.startswith("adamw_torch"), "optimizer", p.optimizer, "use adamw_torch or adamw_torch_fused"),
    ):
        if p.sharded and wrong:
            raise UserError(f"params.yaml: finetune.{key} is {value} where {variant} is sharded; {advice}")
