"""
Parameters of a fine-tuning run and their variants.
"""

from dataclasses import dataclass

from lib.core.stage import UserError, check_bounds, check_choice, patched

METHODS = ("lora", "qlora")
# transformers' names.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
             "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay")  # fmt: skip
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit",
              "paged_adamw_8bit", "adafactor", "sgd", "lion_32bit", "lion_8bit", "paged_lion_8bit")  # fmt: skip


@dataclass
class Lora:
    r: int
    alpha: int
    dropout: float
    target_modules: list

    def __post_init__(self):
        check_bounds("lora", self, {"r": 1, "alpha": 1, "dropout": 0})
        if self.dropout >= 1:
            raise UserError(f"params.yaml: lora.dropout is {self.dropout}; use a share below 1")
        if not self.target_modules or any(type(name) is not str for name in self.target_modules):
            raise UserError(f"params.yaml: lora.target_modules is {self.target_modules}; name at least one module")


@dataclass
class Finetune:
    variants: list
    definitions: dict
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
    fast_cpu: bool
    packing: int
    liger: bool
    compile: bool
    workers: int
    max_tokens: int
    eval_steps: int
    logging_steps: int
    seed: int

    def __post_init__(self):
        ones = ("epochs", "micro_batch", "accumulation", "gpus", "max_tokens", "eval_steps", "logging_steps")
        zeros = ("max_steps", "warmup_steps", "packing", "workers", "seed")
        check_bounds("finetune", self, dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0))
        if self.learning_rate <= 0:
            raise UserError(f"params.yaml: finetune.learning_rate is {self.learning_rate}; use a number above 0")
        check_choice("finetune", "schedule", self.schedule, SCHEDULES)
        check_choice("finetune", "optimizer", self.optimizer, OPTIMIZERS)


def with_variant(p, variant):
    """(method, parameters) of a variant; UserError names what there is when the variant or a patched key is unknown."""
    method, _, name = variant.partition("-")
    if method not in METHODS or (name and name not in p.definitions):
        known = [m for m in METHODS] + [f"{m}-{a}" for a in p.definitions for m in METHODS]
        raise UserError(f"params.yaml: finetune has no variant {variant!r}; use one of {', '.join(known)}")
    patch = p.definitions[name] if name else {}
    return method, patched(p, patch, f"finetune.definitions.{name}", ("variants", "definitions"))


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


def check_both_methods(variants):
    """UserError where a run leaves out LoRA or QLoRA: the answers of both stand beside each other."""
    if missing := [method for method in METHODS if method not in variants]:
        raise UserError(
            f"params.yaml: finetune.variants is {variants}; name {missing[0]} too: "
            "chat and style compare LoRA and QLoRA"
        )
