"""
The writeup's eight prompts answered by the base model, by LoRA and by QLoRA (on the 4-bit base it was trained on).

in:   data/chat_prompts.txt, results/<profile>/base_model/model/, results/<profile>/finetune/{lora,qlora}/adapter/
out:  results/<profile>/chat/chat.json   one entry a prompt: {prompt, base, lora, qlora}
      results/<profile>/chat/chat.md     the same as a table
"""

from dataclasses import dataclass
from pathlib import Path

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, load_yaml, need, read_json, read_params, results, run
from lib.model.load import load_to_answer
from lib.text.templates import prompt_text
from lib.training.config import METHODS, check_both_methods


@dataclass
class Chat:
    prompts: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self):
        check_bounds("chat", self, {"max_new_tokens": 1, "temperature": 0, "seed": 0})
        if not 0 < self.top_p <= 1:
            raise UserError(f"params.yaml: chat.top_p is {self.top_p}; use a share above 0, at most 1")


def read_prompts(path):
    """One prompt a line; empty lines are left out."""
    if not Path(path).is_file():
        raise UserError(f"params.yaml: chat.prompts is {path}; there is no such file")
    prompts = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"params.yaml: chat.prompts names {path}, which holds no prompt")
    return prompts


def answer(model, tokenizer, texts, p, streamer=None):
    """The model's continuation of each text, without special tokens; greedy at temperature 0.

    streamer: gets the tokens of a single text as they are made.
    """
    import torch

    tokenizer.padding_side = "left"  # so that all continuations begin at the same column
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    sampling = {"do_sample": True, "temperature": p.temperature, "top_p": p.top_p} if p.temperature else {}
    torch.manual_seed(p.seed)
    with torch.inference_mode():
        output = model.generate(
            **batch,
            streamer=streamer,
            max_new_tokens=p.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling or {"do_sample": False}),
        )
    return [text.strip() for text in tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], True)]


def as_markdown(rows):
    """The answers as a table; line breaks and bars are kept out of the cells' way."""

    def cell(text):
        return text.replace("|", "\\|").replace("\n", "<br>") or "(nothing)"

    lines = ["| prompt | base | LoRA | QLoRA |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell(row[key]) for key in ("prompt", "base", "lora", "qlora")) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main():
    p = read_params(Chat)
    prompts = read_prompts(p.prompts)

    check_both_methods(load_yaml("params.yaml")["finetune"]["variants"])
    for method in METHODS:
        need(results("finetune") / method / "adapter", f"finetune@{method}")

    from peft import PeftModel

    data = read_json(results("dataset") / "metrics.json")
    texts = [prompt_text(data["template"], data["system_prompt"], prompt) for prompt in prompts]
    answers = {}
    for method in ("lora", "qlora"):
        model, tokenizer = load_to_answer(results("base_model") / "model", method)
        if method == "lora":
            answers["base"] = answer(model, tokenizer, texts, p)
            print("chat: the base model has answered", flush=True)
        model = PeftModel.from_pretrained(model, results("finetune") / method / "adapter")
        answers[method] = answer(model, tokenizer, texts, p)
        print(f"chat: {method} has answered", flush=True)

    rows = [
        {"prompt": prompt, **{who: answers[who][n] for who in ("base", "lora", "qlora")}}
        for n, prompt in enumerate(prompts)
    ]
    out = results("chat")
    base = read_json(results("base_model") / "metrics.json")
    write_metrics(out / "chat.json", {"model": base["name"], "weights": base["weights"], "prompts": rows})
    (out / "chat.md").write_text(as_markdown(rows))


if __name__ == "__main__":
    run(main)
