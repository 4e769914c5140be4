"""
Clients of Triton: the ensemble whole, the engine's tokens as a stream, and the text of a stream. They run in the client
environment (stages/workers/stream_client.py).
"""

import json
import queue
import threading
from pathlib import Path

from lib.core.stage import UserError
from lib.streaming.http import SILENCE_SECONDS, post


class Text:
    """The tokens of one answer as whole characters, each as soon as its last token is there.

    Not transformers' TextStreamer: it keeps kana back until a space, a line's end or a kanji comes, so that a Japanese
    sentence arrives at once. What `of` gave is, put together, the stripped text of all tokens.
    """

    def __init__(self, decode):
        self.decode, self.shown = decode, 0

    def of(self, ids):
        """The new part of the text of `ids`, all tokens so far."""
        # A character of several tokens is U+FFFD until its last one is there.
        text = self.decode(ids).rstrip("\ufffd").strip()
        # With byte fallback the characters before an unfinished one turn to U+FFFD too: text is shorter then.
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new


def load_tokenizer(model_dir):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))


class TritonHttp:
    """The ensemble's `generate`: one answer, whole. It tells no tokens, so its text is tokenised again, as the writeup
    does: nearly what was made."""

    streams, counts = False, "its text tokenised again"

    def __init__(self, url, model_dir, adapters):
        self.url, self.tokenizer, self.tasks = url, load_tokenizer(model_dir), adapters

    def pieces(self, asked):
        """Yield (text, tokens so far) as they come; so do all clients."""
        body = {"text_input": asked.prompt, "exclude_input_in_output": True, **triton_inputs(asked, self.tasks)}
        with post(f"{self.url}/v2/models/ensemble/generate", body) as response:
            # An answer that is cut inside a character ends with half of it.
            text = json.load(response)["text_output"].rstrip("\ufffd")
        yield text, len(self.tokenizer.encode(text, add_special_tokens=False).ids)


class TritonStream:
    """The decoupled tensorrt_llm model over gRPC: token ids in and out, as the writeup's streaming client."""

    streams, counts = True, "rows cut to sequence_length"
    model = "tensorrt_llm"
    # Names that differ from those of the ensemble's inputs.
    names = {"max_tokens": "request_output_len", "top_k": "runtime_top_k", "top_p": "runtime_top_p"}

    def __init__(self, url, model_dir, adapters):
        self.url, self.tasks, self.local = url, adapters, threading.local()
        self.tokenizer = load_tokenizer(model_dir)
        config = json.loads((Path(model_dir) / "config.json").read_text())
        end = config["eos_token_id"]
        self.bos, self.end = config.get("bos_token_id"), end[0] if isinstance(end, list) else end

    def pieces(self, asked):
        ids = self.tokenizer.encode(asked.prompt).ids
        # A prompt that brings its own BOS, as the writeup's did, gets no second one: as in preprocessing.
        ids = ids[1:] if ids[:2] == [self.bos, self.bos] else ids
        inputs = {self.names.get(name, name): value for name, value in triton_inputs(asked, self.tasks).items()}
        inputs |= {"input_lengths": len(ids), "end_id": self.end, "pad_id": self.end, "streaming": True}
        tokens, text = [], Text(self.tokenizer.decode)
        for result in self.responses({"input_ids": ids, **inputs}):
            # A row may be padded, and may hold no token; neither ends the answer.
            row, length = result.as_numpy("output_ids")[0][0], result.as_numpy("sequence_length")[0][0]
            tokens += row[:length].tolist()
            if length:
                yield text.of(tokens), len(tokens)

    def responses(self, inputs):
        """The responses of one request, until Triton marks the last one; UserError where one is an error."""
        from tritonclient.utils import InferenceServerException

        answers = queue.Queue()
        client = self.connection()
        client.start_stream(lambda result, error: answers.put(error or result))
        final = False
        try:
            client.async_stream_infer(self.model, tensors(inputs), enable_empty_final_response=True)
            while not final:
                result = answers.get(timeout=SILENCE_SECONDS)
                if isinstance(result, InferenceServerException):
                    raise UserError(f"{self.url}: {result.message()}")
                response = result.get_response()
                final = response.parameters["triton_final_response"].bool_param
                if response.outputs:  # the last one may be empty
                    yield result
        except queue.Empty:
            raise UserError(f"{self.url}: no answer for {SILENCE_SECONDS} s; see the server's log") from None
        finally:
            client.stop_stream(cancel_requests=not final)

    def connection(self):
        """This thread's connection: one of tritonclient's carries one stream at a time."""
        import tritonclient.grpc as grpc

        if not hasattr(self.local, "client"):
            self.local.client = grpc.InferenceServerClient(self.url)
        return self.local.client


class TritonText(TritonStream):
    """The ensemble, or a BLS model, over gRPC: text in and out, each piece decoded by the server alone."""

    counts = "not told"
    names = {}

    def __init__(self, url, model_dir, adapters, model):
        super().__init__(url, model_dir, adapters)
        self.model = model

    def pieces(self, asked):
        inputs = {"text_input": asked.prompt, "stream": True, **triton_inputs(asked, self.tasks)}
        for result in self.responses(inputs):
            yield result.as_numpy("text_output").ravel()[0].decode(), None


def triton_inputs(asked, tasks):
    """The request by the names of the ensemble's inputs; tasks: {adapter: lora_task_id}."""
    greedy = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
    drawn = {"temperature": float(asked.temperature), "top_k": 0, "top_p": float(asked.top_p)}
    inputs = {"max_tokens": asked.max_tokens, "seed": asked.seed, **(drawn if asked.temperature else greedy)}
    inputs |= {"min_tokens": asked.min_tokens} if asked.min_tokens else {}
    return inputs | ({"lora_task_id": tasks[asked.adapter]} if asked.adapter else {})


def tensors(inputs):
    """{name: value} as Triton's tensors, with a batch dimension of one."""
    import numpy as np
    import tritonclient.grpc as grpc

    kinds = {bool: ("BOOL", bool), int: ("INT32", np.int32), float: ("FP32", np.float32), str: ("BYTES", object)}
    sent = []
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        kind, dtype = ("UINT64", np.uint64) if name in ("seed", "lora_task_id") else kinds[type(values[0])]
        array = np.array([[value.encode() if isinstance(value, str) else value for value in values]], dtype=dtype)
        sent.append(grpc.InferInput(name, array.shape, kind))
        sent[-1].set_data_from_numpy(array)
    return sent
