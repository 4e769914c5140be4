"""
Answers of a model: prompts in, token ids out.
"""


def with_adapter(model, folder):
    """A model with the LoRA adapter of a folder; merged into its weights, but for 4-bit ones, which cannot take it."""
    from peft import PeftModel

    four_bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    model = PeftModel.from_pretrained(model, folder)
    return model.eval() if four_bit else model.merge_and_unload().eval()


def continuations(model, tokenizer, texts, p, streamer=None):
    """The token ids that follow each text, up to the end of sequence and with it; cut at p.max_new_tokens.

    p: max_new_tokens; temperature (0: greedy), top_p and seed; repetition_penalty of greedy answers.
    streamer: gets the tokens of a single text as they are made.
    """
    import torch

    tokenizer.padding_side = "left"  # so that all continuations begin at the same column
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    if p.temperature:
        how = {"do_sample": True, "temperature": p.temperature, "top_p": p.top_p}
    else:
        how = {"do_sample": False, "repetition_penalty": p.repetition_penalty}
    limits = {"max_new_tokens": p.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(p.seed)
    with torch.inference_mode():
        output = model.generate(**batch, **limits, **how, eos_token_id=tokenizer.eos_token_id, streamer=streamer)
    tokens = output[:, batch.input_ids.shape[1] :].tolist()
    return [ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids for ids in tokens]
