"""
One load of a server, and the requests that warm the server up before it.
"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lib.core.stage import UserError
from lib.core.web import open_url


@dataclass
class Load:
    """One point: the requests, their server, and the folder of the client's own files."""

    url: str  # http://HOST:PORT
    model: str  # as the server calls it
    concurrency: int
    requests: int
    warmup: int  # before them, not measured
    input_tokens: int  # of every prompt in the file
    output_tokens: int  # of every answer
    prompts: Path
    tokenizer: Path  # a folder with tokenizer.json
    seed: int
    folder: Path
    options: dict = field(default_factory=dict)  # genai-perf's, in place of those that follow from the fields above

    @property
    def pinned(self):
        """The fields of every request beside prompt, model and length."""
        return {"ignore_eos": True, "min_tokens": self.output_tokens, "temperature": 0}


def read_prompts(load):
    """The prompts of a load's file; UserError for too few, or for one that is repeated."""
    texts = [json.loads(line)["text"] for line in load.prompts.read_text().splitlines()]
    if len(texts) < load.requests + load.warmup:
        asked = f"{load.requests} requests and {load.warmup} to warm up"
        raise UserError(f"{load.prompts}: {len(texts)} prompts, {asked} need one each; make more")
    if len(set(texts)) < len(texts):
        raise UserError(f"{load.prompts}: {len(texts) - len(set(texts))} prompts stand there twice; make them unique")
    return texts


def warm_up(load):
    """Have the server answer `warmup` requests, as many at once as the load will; none of them is measured."""
    texts = read_prompts(load)

    def ask(text):
        body = {"model": load.model, "prompt": text, "max_tokens": load.output_tokens, **load.pinned}
        request = urllib.request.Request(
            f"{load.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with open_url(request) as response:
                response.read()
        except OSError as error:
            raise UserError(f"{load.url}: the server did not answer while it was warmed up: {error}") from None

    with ThreadPoolExecutor(load.concurrency) as pool:
        list(pool.map(ask, texts[len(texts) - load.warmup :]))
