"""told.py MODEL: what tools/chat.py is to answer, found by the way of stages/chat.py, for each adapter's template;
how rows of the dataset come out of a Stream with the tokenizers of MODEL and of the base model."""

import json
import sys

from transformers import AutoTokenizer

from lib.core.stage import read_params, results
from lib.model.answer import with_adapter
from lib.model.load import load_to_answer
from lib.text.rows import read_rows
from lib.text.templates import prompt_text
from stages.chat import Chat, answer
from tools.chat import Stream

QUESTIONS = ["犬は好き?", "caf?"]
ASKED = {"none": ("", "llama-2"), "lora": ("lora", "llama-2"), "lora-published": ("lora", "published"),
         "qlora": ("qlora", "llama-2")}  # fmt: skip


class Value(list):
    """What `generate` hands over is a tensor; only this of it is used."""

    def tolist(self):
        return list(self)


def answers(folder, template):
    model, tokenizer = load_to_answer(results("base_model") / "model", "qlora" if folder == "qlora" else "lora")
    if folder:
        model = with_adapter(model, results("finetune") / folder / "adapter")
    texts = [prompt_text(template, "", question) for question in QUESTIONS]
    return [answer(model, tokenizer, [text], read_params(Chat))[0] for text in texts]


def streamed(folder):
    """{rows, same, broken, pieces, characters} of 100 rows' outputs, streamed token by token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {"rows": 0, "same": 0, "broken": 0, "pieces": 0, "characters": 0}
    for row in read_rows("data/persona.jsonl")[:100]:
        pieces = []
        stream = Stream(tokenizer, pieces.append)
        stream.put(Value())
        for token in tokenizer(row["output"], add_special_tokens=False)["input_ids"]:
            stream.put(Value([token]))
        found["rows"] += 1
        found["same"] += "".join(pieces) == row["output"].strip()
        found["broken"] += sum("\ufffd" in piece for piece in pieces)
        found["pieces"] += len(pieces)
        found["characters"] += len(row["output"])
    return found


print(
    json.dumps(
        {
            "answers": {adapter: answers(*asked) for adapter, asked in ASKED.items()},
            "streamed": [streamed(folder) for folder in (sys.argv[1], results("base_model") / "model")],
        }
    )
)
