"""
HTTP requests whose answers arrive in pieces.
"""

import json
import urllib.request
from dataclasses import dataclass

from lib.core.stage import UserError
from lib.core.web import open_url

SILENCE_SECONDS = 300  # without any answer, a server has failed


@dataclass
class Request:
    prompt: str
    adapter: str | None  # None: the base model
    max_tokens: int
    min_tokens: int  # equal to max_tokens: a fixed length; 0: the model ends the answer
    temperature: float  # 0: greedy
    top_p: float
    seed: int


def post(url, body):
    """The open response to a POST (a GET where body is None); UserError with the server's own words."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        return open_url(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        answer = " ".join(error.read().decode(errors="replace").split())
        raise UserError(f"{url}: {error.code} {answer[:500]}") from None
    except OSError as error:
        raise UserError(f"{url}: {getattr(error, 'reason', error)}") from None
