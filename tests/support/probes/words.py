"""
words.py FOLDER: a vocabulary of words as this environment reads it: is every id a text of its own, does a stream of ids
give a text at each, and what a chat and an unknown word become.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
size = json.loads((folder / "config.json").read_text())["vocab_size"]
ids = [random.Random(0).randrange(size) for _ in range(3000)]
stream = DecodeStream(skip_special_tokens=True)
pieces = [stream.step(tokenizer._tokenizer, one) for one in ids]
chat = [{"role": "user", "content": "w5 w7"}]
print(
    json.dumps(
        {
            "size": len(tokenizer),
            "special": tokenizer.all_special_ids,
            "back": tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"] == ids,
            "each": all(tokenizer.encode(tokenizer.decode([one])) == [one] for one in range(size)),
            "pieces": all(pieces),
            "streamed": "".join(pieces) == tokenizer.decode(ids),
            "chat": tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)),
            "unknown": tokenizer.encode("no such words"),
        }
    )
)
