"""speedups.py FOLDER: a tiny GPT-2 of llm-jp's kind answers by the Transformers methods, in both variants, here:
tokens and seconds of each answer, and how many graphs torch.compile made."""

import json
import sys
from pathlib import Path

from torch._dynamo.utils import counters

from lib.speedups.methods import METHODS, PUBLISHED
from stages.workers.generate_one import answer
from stages.workers.random_weights import write, write_weights

CONFIG = json.loads(Path("data/shapes/llm-jp-1.3b.json").read_text()) | {
    "hidden_size": 64, "n_inner": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 500, "max_position_embeddings": 64,
}  # fmt: skip
folder = Path(sys.argv[1])
write(CONFIG, "bf16", folder / "model")
write_weights(CONFIG, "bf16", folder / "model", 0)
task = {
    "model": str(folder / "model"), "tokenizer": str(folder / "model"), "prompt": "w17 w3 w17 w8 w17 w3", "answers": 2,
    "warmup": 1, "max_new_tokens": 6, "lookup_tokens": 2, "seed": 1,
    "sampling": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1},
}  # fmt: skip
found = {}
for variant in ("published", "corrected"):
    for method in METHODS:
        if method == "vllm" or variant == "published" and method not in PUBLISHED:
            continue
        if (method, variant) == ("compile", "corrected"):  # compiles for 15 s; flash1-compile does the same and more
            continue
        counters.clear()
        name = f"{method}-{variant}"
        found[name] = answer(task | {"method": method, "variant": variant}, folder / f"{name}.json")
        found[name]["lines"] = len((folder / f"{name}.answers").read_text().splitlines())
print(json.dumps(found))
