"""
Proof that the settings of a fine-tune took effect, read from the trainer itself before the first step: a recipe that
silently trains something else is the commonest complaint about recipes. Each fact is written beside the numbers;
one that contradicts params.yaml stops the stage.
"""

from lib.core.stage import UserError


def prove(trainer, p, lora, method):
    """Facts about a trainer that is ready to train, as {"trainable_parameters", ..., "proofs": {...}}.

    p, lora: the parameters in force; method: lora or qlora. Raises UserError for the first setting without effect.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    trainable, total = trainer.model.get_nb_trainable_parameters()
    row = trainer.train_dataset[0]
    labels = trainer.data_collator([row])["labels"][0].tolist()
    learned = [token for token in labels if token != -100]
    facts = {
        "four_bit_modules": sum(is_four_bit(module) for module in model.modules()),
        "lora_modules": sum(hasattr(module, "lora_A") for module in model.modules()),
        "checkpointing_modules": sum(bool(getattr(m, "gradient_checkpointing", False)) for m in model.modules()),
        "leading_bos": leading(row["input_ids"], tokenizer.bos_token_id),
        "wanted_bos": 0 if tokenizer.bos_token_id is None else 1,  # Qwen's tokenizers have none
        "prompt_tokens_learned": sum(
            label != -100 for label, mask in zip(labels, row["completion_mask"], strict=True) if not mask
        ),
        "completion_tokens_learned": len(learned),
        "ends_with_eos": bool(learned) and learned[-1] == tokenizer.eos_token_id,
        "optimizer": type(optimizer_of(trainer)).__name__,
        "effective_batch_rows": trainer.args.train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.accelerator.num_processes,
        # TRL 0.25 hands checkpointing to peft under QLoRA and then sets its own flag to False: the hooks above count.
        "trainer_says_checkpointing": trainer.args.gradient_checkpointing,
        "seed": trainer.args.seed,
    }
    check_answers(trainer.train_dataset, p)
    check(facts, p, lora, method)
    return {
        "trainable_parameters": trainable,
        "all_parameters": total,
        "trainable_percent": 100 * trainable / total,
        "proofs": facts,
    }


def check_answers(rows, p):
    """UserError where rows have no token of their answer within finetune.max_tokens: nothing is learned from them."""
    if p.packing or "completion_mask" not in rows.column_names:
        return
    empty = [number for number, mask in enumerate(rows["completion_mask"], start=1) if not any(mask)]
    if empty:
        raise UserError(
            f"finetune: {len(empty)} of {len(rows)} rows (the first is row {empty[0]}) have no token of their answer "
            f"within finetune.max_tokens = {p.max_tokens}; raise it or remove the rows"
        )


def check(facts, p, lora, method):
    """Raise UserError for the first fact that contradicts params.yaml."""
    claims = [
        (facts["lora_modules"] > 0, f"no module matches lora.target_modules {lora.target_modules}"),
        ((facts["four_bit_modules"] > 0) == (method == "qlora"), f"{facts['four_bit_modules']} modules are in 4 bits"),
        (
            (facts["checkpointing_modules"] > 0) == p.gradient_checkpointing,
            f"gradient checkpointing is on in {facts['checkpointing_modules']} modules",
        ),
        (
            facts["leading_bos"] == facts["wanted_bos"] or p.template == "published",
            f"a row begins with {facts['leading_bos']} BOS tokens, not {facts['wanted_bos']}",
        ),
        (facts["prompt_tokens_learned"] == 0, "the prompt's tokens are learned too"),
        (facts["completion_tokens_learned"] > 0, "no token of the completion is learned"),
        (facts["ends_with_eos"] or p.packing > 0, "a row does not end with EOS"),  # packing cuts rows anywhere
        (
            facts["effective_batch_rows"] == p.micro_batch * p.accumulation * p.gpus,
            f"a step takes {facts['effective_batch_rows']} rows, not {p.micro_batch} x {p.accumulation} x {p.gpus}",
        ),
    ]
    for holds, what in claims:
        if not holds:
            raise UserError(f"finetune: a setting had no effect: {what}")


def is_four_bit(module):
    """True for bitsandbytes' own 4-bit layer (peft's wrapper around it has the same class name)."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


def leading(ids, token):
    """How many times `token` stands at the start of `ids`."""
    return next((n for n, each in enumerate(ids) if each != token), len(ids))


def optimizer_of(trainer):
    """The optimiser that the trainer will use, made now so that its class can be seen."""
    optimizer = trainer.create_optimizer()
    if trainer.is_fsdp_enabled:
        trainer.optimizer = None  # it holds the whole weights: the trainer makes its own, of their parts
    return getattr(optimizer, "optimizer", optimizer)
