"""
Prompts of an exact length for every load client: prompts.py TOKENIZER_DIR TOKENS COUNT SEED OUT

TOKENS is what a server counts: where the tokenizer puts a BOS in front of a text, that is one of them.
They are cut from the text that genai-perf takes its synthetic prompts from. Its own choice depends on the number of
CPUs; this one depends on tokenizer and seed alone. No two prompts begin alike, so no cache of prefixes helps.
Where the vocabulary is words (stages/workers/random_weights.py), they are drawn from it: the text has none of them.
"""

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer


def cut_prompt(tokenizer, words, start, tokens):
    """The words from `start` on that are exactly `tokens` tokens together, a BOS not counted; or None."""
    # No word is less than one token, so this many words are enough.
    text = " ".join(words[start : start + tokens])
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    if len(offsets) < tokens:
        return None
    text = text[: offsets[tokens - 1][1]].strip()
    # A cut inside a word may be other tokens than the word's were.
    return text if len(tokenizer.encode(text, add_special_tokens=False).ids) == tokens else None


def prompts(tokenizer, corpus, tokens, count, seed):
    words = corpus.split()
    starts = list(range(len(words) - tokens))
    random.Random(seed).shuffle(starts)
    texts = (cut_prompt(tokenizer, words, start, tokens) for start in starts)
    kept = []
    for text in texts:
        if text:
            kept.append(text)
        if len(kept) == count:
            return kept
    sys.exit(f"error: only {len(kept)} of {count} prompts of {tokens} tokens can be cut from the text; ask for less")


def draw_prompts(tokenizer, tokens, count, seed):
    """Prompts of `tokens` random words of a vocabulary of words, each with a first word of its own."""
    vocabulary, draw = tokenizer.get_vocab_size(), random.Random(seed)
    if count > vocabulary:
        sys.exit(f"error: {count} prompts cannot all begin with another of {vocabulary} words; ask for less")
    for first in draw.sample(range(vocabulary), count):
        ids = [first, *(draw.randrange(vocabulary) for _ in range(tokens - 1))]
        yield tokenizer.decode(ids)


def main():
    folder, tokens, count, seed, out = sys.argv[1:]
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    of_text = int(tokens) - tokenizer.num_special_tokens_to_add(is_pair=False)
    if of_text < 1:
        sys.exit(f"error: {folder} puts {int(tokens) - of_text} tokens in front of a text; ask for more than {tokens}")
    if type(tokenizer.model).__name__ == "WordLevel":
        texts = draw_prompts(tokenizer, of_text, int(count), int(seed))
    else:
        package = Path(find_spec("genai_perf").origin).parent
        corpus = (package / "inputs" / "retrievers" / "shakespeare.txt").read_text()
        texts = prompts(tokenizer, corpus, of_text, int(count), int(seed))
    # genai-perf and AIPerf read "text", vLLM "prompt".
    Path(out).write_text("".join(json.dumps({"text": text, "prompt": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
