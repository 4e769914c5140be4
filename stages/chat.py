"""
The writeup's eight prompts answered by the base model, by LoRA and by QLoRA (on the 4-bit base it was trained on):
sampled, as the writeup does, and greedily with chat.repetition_penalty, without which a small model repeats itself.

in:   chat.prompts, results/<profile>/base_model/model/, results/<profile>/finetune/{lora,qlora}/adapter/
out:  results/<profile>/chat/chat.json   one entry a prompt: {prompt, base, lora, qlora, greedy: {base, lora, qlora}}
      results/<profile>/chat/chat.md     the same as two tables
"""

from dataclasses import dataclass, replace
from pathlib import Path

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, load_yaml, need, read_json, read_params, results, run
from lib.markdown import table
from lib.model.answer import continuations, with_adapter
from lib.model.load import load_to_answer
from lib.text.templates import prompt_text
from lib.training.config import METHODS, check_both_methods


@dataclass
class Chat:
    prompts: str
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int

    def __post_init__(self):
        check_bounds("chat", self, {"max_new_tokens": 1, "temperature": 0, "repetition_penalty": 1, "seed": 0})
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
    """The model's continuation of each text, without special tokens; as continuations'."""
    tokens = continuations(model, tokenizer, texts, p, streamer)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def both_ways(model, tokenizer, texts, p):
    """(sampled, greedy) answers; at temperature 0 the first are greedy already."""
    greedy = answer(model, tokenizer, texts, replace(p, temperature=0.0))
    return answer(model, tokenizer, texts, p) if p.temperature else greedy, greedy


def as_markdown(rows):
    """The answers as a table."""
    cells = [[row[key] or "(nothing)" for key in ("prompt", "base", "lora", "qlora")] for row in rows]
    return table(["prompt", "base", "LoRA", "QLoRA"], cells) + "\n"


def main():
    p = read_params(Chat)
    prompts = read_prompts(p.prompts)

    check_both_methods(load_yaml("params.yaml")["finetune"]["variants"])
    for method in METHODS:
        need(results("finetune") / method / "adapter", f"finetune@{method}")

    data = read_json(results("dataset") / "metrics.json")
    texts = [prompt_text(data["template"], data["system_prompt"], prompt) for prompt in prompts]
    answers = {}
    for method in ("lora", "qlora"):
        model, tokenizer = load_to_answer(results("base_model") / "model", method)
        if method == "lora":
            answers["base"] = both_ways(model, tokenizer, texts, p)
            print("chat: the base model has answered", flush=True)
        model = with_adapter(model, results("finetune") / method / "adapter")
        answers[method] = both_ways(model, tokenizer, texts, p)
        print(f"chat: {method} has answered", flush=True)

    sampled, greedy = (
        [{"prompt": prompt, **{who: answers[who][way][n] for who in answers}} for n, prompt in enumerate(prompts)]
        for way in (0, 1)
    )
    rows = [{**row, "greedy": {who: other[who] for who in answers}} for row, other in zip(sampled, greedy, strict=True)]
    out = results("chat")
    base = read_json(results("base_model") / "metrics.json")
    how = {key: getattr(p, key) for key in ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed")}
    write_metrics(out / "chat.json", {"model": base["name"], "weights": base["weights"], **how, "prompts": rows})
    ways = (f"Temperature {p.temperature}, top-p {p.top_p}", f"Greedy, repetition penalty {p.repetition_penalty}")
    parts = [f"{way}:\n\n{as_markdown(rows)}" for way, rows in zip(ways, (sampled, greedy), strict=True)]
    (out / "chat.md").write_text("\n".join(parts))


if __name__ == "__main__":
    run(main)
