"""answers.py MODEL: the same questions asked one by one and together, greedily and sampled."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.text.templates import prompt_text
from stages.chat import Chat, answer

QUESTIONS = ["What is the capital of France?", "2+2?", "Name a colour of the sky on a clear day, in one word."]

# fp32: in bf16 a batch may round an even choice of two tokens the other way.
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = [prompt_text("chatml", "", question) for question in QUESTIONS]


def ask(texts, **changes):
    given = {
        "prompts": "",
        "max_new_tokens": 12,
        "temperature": 0.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "seed": 42,
    } | changes
    return answer(model, tokenizer, texts, Chat(**given))


print(
    json.dumps(
        {
            "together": ask(texts),
            "alone": [ask([text])[0] for text in texts],
            "sampled": [ask(texts[:1], temperature=1.5, seed=seed)[0] for seed in (1, 1, 2)],
        }
    )
)
