"""
Requests to a running server: the text of each answer as it comes, and when. In the client environment, from
tools/remote.py and, for the stages, as: python -m stages.workers.stream_client ASK OUT

in:   ASK   [{client: one of CLIENTS, words: what it is made with, concurrency, requests: [Request]}], taken in turn
out:  OUT   [{wall_seconds, answers: what `timed` gives of each request, in their order}]
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.core.stage import UserError, run, write_json
from lib.streaming.http import Request, post
from lib.streaming.triton import TritonHttp, TritonStream, TritonText


class OpenAi:
    """/v1/completions as server-sent events, at vLLM: adapters are models of their own name."""

    streams, counts = True, "usage of the last event"

    def __init__(self, url, model_dir, adapters):
        self.url, self.adapters = url, adapters
        with post(f"{url}/v1/models", None) as response:
            self.base = json.load(response)["data"][0]["id"]

    def chosen(self, adapter):
        return {"model": adapter or self.base}

    def pieces(self, asked):
        body = {**self.chosen(asked.adapter), "prompt": asked.prompt, "max_tokens": asked.max_tokens,
                "temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        if asked.min_tokens:
            body |= {"min_tokens": asked.min_tokens, "ignore_eos": asked.min_tokens == asked.max_tokens}
        with post(f"{self.url}/v1/completions", body) as response:
            for event in events(response):
                if "error" in event:
                    raise UserError(f"{self.url}: {event['error'].get('message', event['error'])}")
                usage = event.get("usage") or {}
                if event["choices"] or usage:
                    text = event["choices"][0]["text"] if event["choices"] else ""
                    yield text, usage.get("completion_tokens")


class TrtLlm(OpenAi):
    """The same at trtllm-serve; adapters: name -> what a request says of it (servers.lora_request)."""

    def chosen(self, adapter):
        if adapter is None:
            return {"model": self.base}
        return {"model": self.base, "lora_request": self.adapters[adapter]}


# The servers of `make chat SERVER=...`, and TritonText for the stages.
CLIENTS = {"triton": TritonHttp, "triton-stream": TritonStream, "trtllm": TrtLlm, "vllm": OpenAi,
           "triton-text": TritonText}  # fmt: skip


def events(response):
    """The JSON of each server-sent event, up to [DONE]."""
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def timed(pieces, write=lambda text: None):
    """One answer as {ttft_seconds, seconds, tokens, text, stopped}; `write` gets each piece of text as it comes.

    The clock starts here; the first piece is the first token, for no client yields before it has one. Ctrl-C stops the
    answer, not the program.
    """
    begun, first, tokens, texts, stopped = time.monotonic(), None, None, [], False
    try:
        for text, so_far in pieces:
            first = time.monotonic() - begun if first is None else first
            tokens = tokens if so_far is None else so_far
            texts.append(text)
            write(text)
    except KeyboardInterrupt:
        stopped = True
    seconds = time.monotonic() - begun
    return {"ttft_seconds": first, "seconds": seconds, "tokens": tokens, "text": "".join(texts), "stopped": stopped}


def answers(client, requests, concurrency):
    """Every request answered, at most `concurrency` in flight; as `timed` gives them, in order."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda asked: timed(client.pieces(asked)), requests))


def main():
    ask, out = sys.argv[1:]
    results = []
    for load in json.loads(Path(ask).read_text()):
        client = CLIENTS[load["client"]](**load["words"])
        requests = [Request(**fields) for fields in load["requests"]]
        begun = time.monotonic()
        answered = answers(client, requests, load["concurrency"])
        results.append({"wall_seconds": time.monotonic() - begun, "answers": answered})
    write_json(out, results)


if __name__ == "__main__":
    run(main)
