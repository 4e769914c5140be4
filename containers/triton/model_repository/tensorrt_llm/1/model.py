"""
The stand-in for TensorRT-LLM's backend: its tensors on one side, the engine of engine.py on the other.

execute() only adds requests to the running batch; the tokens are sent as they are made, from the engine's threads.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from engine import BASE, Engine, Refused

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        values = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        here = Path(args["model_repository"])
        # As TensorRT-LLM reads it: a folder whose name is a number holds an adapter, and the number is its task id.
        prefetched = sorted((here / values["lora_prefetch_dir"]).iterdir()) if values["lora_prefetch_dir"] else []
        self.engine = Engine(
            here / values["model_dir"],
            {int(folder.name): folder for folder in prefetched if folder.name.isdigit()},
            config["max_batch_size"],
            int(values["max_sequence_tokens"]),
        )
        self.numbers = itertools.count()
        self.input_tokens = Tally("nv_llm_input_token_len", "total_input_tokens")
        self.output_tokens = Tally("nv_llm_output_token_len", "total_output_tokens")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.submit(request, sender)
            except Refused as error:
                fail(sender, str(error))
        return None

    def submit(self, request, sender):
        def value(name, default=None):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return default if tensor is None else tensor.as_numpy().item()

        ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
        beams = value("beam_width", 1)
        if len(ids) != 1 or beams != 1:
            raise Refused(f"{len(ids)} prompts with beam width {beams}; send one prompt a request, with beam width 1")
        reply = Reply(self, sender, streaming=value("streaming", False))
        reply.key = str(next(self.numbers)), value("lora_task_id", BASE)
        reply.prompt = ids[0, : value("input_lengths")].tolist()
        reply.echo = not reply.streaming and not value("exclude_input_in_output", False)
        options = {
            "min_tokens": value("min_tokens", 0),
            "end_id": value("end_id", -1),
            "temperature": float(value("temperature", 1.0)),
            "top_k": value("runtime_top_k", 0),
            "top_p": float(value("runtime_top_p", 0.0)),
            "seed": value("seed", 0),
        }
        self.engine.submit(*reply.key, reply.prompt, value("request_output_len"), options, reply)

    def finalize(self):
        self.engine.stop()


class Reply:
    """The way back of one request: every step's tokens in a stream, else all of them at the end."""

    def __init__(self, backend, sender, streaming):
        self.backend, self.sender, self.streaming = backend, sender, streaming
        self.made, self.waiting = 0, []

    def __call__(self, tokens, finished, error):
        self.made += len(tokens)
        self.waiting += tokens
        if error:
            fail(self.sender, f"the engine failed: {error}")
        elif self.sender.is_cancelled():  # the client has gone
            self.backend.engine.cancel(*self.key)
            # Not an empty last response: behind an ensemble that leaves the request open for ever.
            fail(self.sender, "cancelled")
        else:
            if finished:  # before the last response: a client that has it finds its request counted
                self.backend.input_tokens.add(len(self.prompt))
                self.backend.output_tokens.add(self.made)
            if self.streaming or finished:
                self.sender.send(self.response(), flags=FINAL if finished else 0)
                self.waiting = []

    def response(self):
        ids = (self.prompt if self.echo else []) + self.waiting
        tensors = [
            pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
        ]
        return pb_utils.InferenceResponse(tensors)


class Tally:
    """Two counters with the names that the sum and the count of TensorRT-LLM's histogram have on /metrics."""

    def __init__(self, name, kind):
        labels = {"model": "tensorrt_llm", "version": "1", "response_metric_type": kind}
        # The metric is gone with its family, so both are kept.
        self.families = [
            pb_utils.MetricFamily(name=f"{name}_{part}", description=kind, kind=pb_utils.MetricFamily.COUNTER)
            for part in ("sum", "count")
        ]
        self.sum, self.count = (family.Metric(labels=labels) for family in self.families)

    def add(self, tokens):
        self.sum.increment(tokens)
        self.count.increment(1)


def fail(sender, message):
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), flags=FINAL)
