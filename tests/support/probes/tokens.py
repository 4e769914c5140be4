"""tokens.py MODEL...: token ids of texts under this environment's tokenizer, and greedy answers."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import transformers

TEXTS = json.loads((Path(__file__).parent / "texts.json").read_text())
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
CHAT = [{"role": role, "content": text} for role, text in (("user", "Hi!"), ("assistant", "Yes?"), ("user", "Bye."))]


def tokenizer_of(folder):
    """The tokenizer as this environment's server or trainer loads it."""
    if find_spec("vllm"):
        from vllm.tokenizers import get_tokenizer

        return get_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def greedy(folder, tokenizer, text):
    """16 greedy tokens after the text; in fp32, where two implementations hardly differ."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = tokenizer([text], return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return output[0, batch["input_ids"].shape[1] :].tolist()


found = {"transformers": transformers.__version__, "models": []}
for folder in sys.argv[1:]:
    tokenizer = tokenizer_of(folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    entry = {
        "ids": ids,
        "keys": sorted(tokenizer("a").keys()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "back": [tokenizer.decode(one, skip_special_tokens=True) for one in ids],
        "chat": [tokenizer.apply_chat_template(CHAT[:n], tokenize=False) for n in (1, 3)],
        "one_by_one": [[tokenizer.decode([token]) for token in one] for one in ids],
    }
    entry["greedy"] = greedy(folder, tokenizer, QUESTION)
    entry["answer"] = tokenizer.decode(entry["greedy"], skip_special_tokens=True)
    found["models"].append(entry)
print(json.dumps(found))
