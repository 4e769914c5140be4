"""adapters.py COUNT: parameter counts of COUNT random Llama shapes with random adapters, by the stage's arithmetic and
by transformers and peft on the meta device (which holds shapes and no numbers)."""

import json
import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lib.training.config import Lora
from stages.vram import predict

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_case(draw):
    """(config, lora) of a small Llama: grouped heads, tied or untied tables, sometimes a head size of its own."""
    heads = draw.choice([1, 2, 4, 6, 8])
    width = draw.choice([2, 4, 8])
    config = {
        "vocab_size": draw.randint(10, 300),
        "hidden_size": heads * width,
        "intermediate_size": draw.randint(3, 50),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([one for one in range(1, heads + 1) if heads % one == 0]),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if draw.random() < 0.4:
        config["head_dim"] = draw.choice([2, 6, 16])
    return config, Lora(draw.randint(1, 9), 8, 0.1, draw.sample(MODULES, draw.randint(1, 7)))


def counted(config, lora):
    """{parameters, trainable, all} as the libraries count them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
        model.tie_weights()
        parameters = model.num_parameters()
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=lora.r, target_modules=lora.target_modules))
    trainable, everything = adapted.get_nb_trainable_parameters()
    return {"parameters": parameters, "trainable": trainable, "all": everything}


draw = random.Random(0)
cases = []
for _ in range(int(sys.argv[1])):
    config, lora = random_case(draw)
    found = predict(config, lora)["lora"]
    ours = {
        "parameters": predict(config, lora)["parameters"],
        "trainable": found["trainable_parameters"],
        "all": found["all_parameters"],
    }
    cases.append(
        {"config": config, "r": lora.r, "targets": lora.target_modules, "ours": ours, "theirs": counted(config, lora)}
    )
print(json.dumps(cases))
