"""One question to a running server, in the terminal: `make chat SERVER=...` asks it instead of loading the model."""

import socket

from lib.core.stage import UserError, results
from lib.serving.answers import URL
from lib.serving.servers import SERVERS, lora_request
from lib.streaming.http import Request
from lib.trtllm.adapters import TASKS
from stages.workers.stream_client import CLIENTS, timed
from tools.terminal import pictured, say_dim, show

GRPC = "127.0.0.1:8001"
# Name -> the address it has unless URL=... says otherwise; a name's first part is the server behind it.
ADDRESSES = {"triton": URL, "triton-stream": GRPC, "trtllm": URL, "vllm": URL}


def connect(server, url, adapter, folder):
    """The client of stages/workers/stream_client.py for this server; UserError where nothing answers, or it has no
    such adapter."""
    if server not in ADDRESSES:
        raise UserError(f"SERVER is {server}; use one of {', '.join(ADDRESSES)}")
    kind, url = server.partition("-")[0], (url or ADDRESSES[server]).rstrip("/")
    host, _, port = url.rpartition("//")[2].rpartition(":")
    starts = f"`make serve SERVER={kind}` starts one" if kind in SERVERS else f"start {kind} first"
    if not host or not port.isdigit() or ("//" in url) == (ADDRESSES[server] == GRPC):
        raise UserError(f"URL is {url}; for {server} write it like {ADDRESSES[server]}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"{url}: no server answers ({error.strerror or error}); {starts}") from None
    adapters = {name: task for task, name in TASKS.items()}
    if kind in ("triton", "trtllm") and adapter not in (None, *adapters):
        raise UserError(f"ADAPTER is {adapter}; {kind} serves {', '.join(adapters)} or none")
    if kind == "trtllm" and adapter:
        adapters = {adapter: lora_request(adapters[adapter], folder.resolve())}
    return CLIENTS[server](url, results("base_model") / "model", adapters)


def as_sentence(timing, client, limit):
    """The measurements of one answer of a server, as a sentence."""
    tokens, first, seconds = timing["tokens"], timing["ttft_seconds"], timing["seconds"]
    count = f"{'' if client.streams else 'about '}{tokens} token{'' if tokens == 1 else 's'}"
    words = [f"{count} ({client.counts})"] if tokens else []
    if first and client.streams:
        words.append(f"the first after {first:.3f} s")
        if tokens and tokens > 1 and seconds > first:
            words.append(f"then {(tokens - 1) / (seconds - first):.1f} tokens/s")
    elif first:
        words.append(f"all at once after {first:.3f} s")
        if tokens:
            words.append(f"{tokens / seconds:.1f} tokens/s")
    words += ["stopped"] * timing["stopped"] + ["cut at chat.max_new_tokens"] * (client.streams and tokens == limit)
    return ", ".join(words)


def reply(client, prompt, adapter, p):
    """One answer on stdout as it comes, what was measured of it on stderr."""
    asked = Request(prompt, adapter, p.max_new_tokens, 0, p.temperature, p.top_p, p.seed)
    timing = timed(client.pieces(asked), lambda text: show(pictured(text)))
    print(flush=True)
    say_dim(as_sentence(timing, client, p.max_new_tokens))
    return timing
