"""asked.py MODEL: answers to one question and to one in Japanese, with room to end and without."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.text.templates import prompt_text
from stages.style import Style, ask, completion_losses

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
GREEDY = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
english, japanese = (prompt_text("chatml", "", text) for text in ("What is the capital of France?", "猫は好き?"))


def asked(prompts, tokens, batch):
    given = {"prompts": 0, "max_new_tokens": tokens, **GREEDY, "batch": batch, "bootstrap_samples": 100, "seed": 0}
    return [[answer.text, answer.cut] for answer in ask(model, tokenizer, prompts, Style(**given))]


def loss(completion):
    return completion_losses(model, tokenizer, [{"prompt": english, "completion": completion}])[0]


print(
    json.dumps(
        {
            "long": asked([english, japanese], 40, 2),
            "one by one": asked([english, japanese], 40, 1),
            "short": asked([english], 3, 1),
            # Where a character of several tokens is cut through, at one of these lengths at least.
            "japanese": [asked([japanese], tokens, 1)[0] for tokens in range(2, 10)],
            "likely": loss("The capital of France is Paris."),
            "unlikely": loss("Paris is France of capital the."),
            "end alone": loss(""),
        }
    )
)
