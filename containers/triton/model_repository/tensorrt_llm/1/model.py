"""
vLLM in the place of TensorRT-LLM's backend, with that one's tensors: token ids in and out.

execute() only hands requests over; the answers are sent as they are made, from the thread of the engine's event loop.
VLLM_OPTIONS: more command line words for the engine, those that a plain vLLM gets beside it.
"""

import asyncio
import itertools
import json
import locale
import math
import os
import shlex
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # the stub sets none, and torch reads its own files in that encoding

from vllm import SamplingParams, exceptions  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.usage.usage_lib import UsageContext  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402

# vLLM 0.25 has no VLLMClientError: its VLLMValidationError is a ValueError.
CLIENT_ERROR = getattr(exceptions, "VLLMClientError", ValueError)
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Refused(Exception):
    """A request that this engine cannot serve; the message goes to the client."""


class TritonPythonModel:
    def initialize(self, args):
        values = {name: entry["string_value"] for name, entry in json.loads(args["model_config"])["parameters"].items()}
        here = Path(args["model_repository"])
        # As TensorRT-LLM reads it: a folder whose name is a number holds an adapter, and the number is its task id.
        prefetched = sorted((here / values["lora_prefetch_dir"]).iterdir()) if values["lora_prefetch_dir"] else []
        self.adapters = {
            int(folder.name): LoRARequest(folder.name, int(folder.name), str(folder))
            for folder in prefetched
            if folder.name.isdigit()
        }
        words = ["--model", str(here / values["model_dir"]), *shlex.split(values["engine_options"])]
        self.engine = start_engine([*words, *shlex.split(os.environ.get("VLLM_OPTIONS", ""))])
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.longest = self.engine.model_config.max_model_len
        self.numbers = itertools.count()
        self.input_tokens = Tally("nv_llm_input_token_len", "total_input_tokens")
        self.output_tokens = Tally("nv_llm_output_token_len", "total_output_tokens")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            number = next(self.numbers)
            sender = request.get_response_sender()
            name = f"{request.request_id() or 'request'}-{number}"
            try:
                asked = Asked(request, name)
            except Refused as error:
                fail(sender, f"{name}: {error}")
            else:
                asyncio.run_coroutine_threadsafe(self.answer(asked, sender), self.loop)
        return None

    async def answer(self, asked, sender):
        """Every step's tokens in a stream, else all of them at the end; an error names the request."""
        try:
            self.check(asked)
            await self.generate(asked, sender)
        except (Refused, CLIENT_ERROR, ValueError) as error:
            fail(sender, f"{asked.name}: {error}")
        except Exception as error:  # whatever it was, the client must hear of it
            fail(sender, f"{asked.name}: the engine failed: {type(error).__name__} {error}")

    async def generate(self, asked, sender):
        prompt, made, waiting = {"prompt_token_ids": asked.prompt}, 0, list(asked.prompt) if asked.echo else []
        adapter = self.adapters.get(asked.task)
        async for output in self.engine.generate(prompt, asked.sampling(), asked.name, lora_request=adapter):
            if sender.is_cancelled():  # the client has gone
                await self.engine.abort(asked.name)
                # Not an empty last response: behind an ensemble that leaves the request open for ever.
                raise Refused("cancelled")
            made += len(output.outputs[0].token_ids)
            waiting += output.outputs[0].token_ids
            if output.finished:  # before the last response: a client that has it finds its request counted
                self.input_tokens.add(len(asked.prompt))
                self.output_tokens.add(made)
            if asked.streaming or output.finished:
                sender.send(response(waiting), flags=FINAL if output.finished else 0)
                waiting = []

    def check(self, asked):
        """Refuses what vLLM answers otherwise than TensorRT-LLM: with fewer tokens, or with another adapter."""
        if asked.beams != 1:
            raise Refused(f"beam width {asked.beams}; send one prompt a request, with beam width 1")
        if asked.task and asked.task not in self.adapters:
            there = ", ".join(map(str, self.adapters)) or "none"
            raise Refused(f"lora_task_id {asked.task} is not loaded; there are: {there} (0 or absent: the base model)")
        if not asked.prompt:
            raise Refused("the prompt is empty; it needs at least one token")
        if unknown := [token for token in [*asked.prompt, max(asked.end, 0)] if not 0 <= token < self.vocabulary]:
            raise Refused(f"token {unknown[0]} is none of the model's, which are 0 to {self.vocabulary - 1}")
        if asked.tokens < 1:
            raise Refused(f"request_output_len is {asked.tokens}; it must be at least 1")
        if len(asked.prompt) + asked.tokens > self.longest:
            raise Refused(
                f"{len(asked.prompt)} input tokens and request_output_len {asked.tokens} are more than "
                f"the {self.longest} tokens of a sequence"
            )

    def finalize(self):
        # The loop first: with the engine gone, the task that waits for its tokens calls that a failure.
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.engine.shutdown()
        # Before the stub ends: a metric gives its memory back to Triton, and the stub crashes where that is gone.
        del self.input_tokens, self.output_tokens


class Asked:
    """The tensors of one request."""

    def __init__(self, request, name):
        def value(tensor, default):
            given = pb_utils.get_input_tensor_by_name(request, tensor)
            return default if given is None else given.as_numpy().item()

        ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
        if len(ids) != 1:
            raise Refused(f"{len(ids)} prompts; send one prompt a request, with beam width 1")
        self.name = name
        self.prompt = ids[0, : value("input_lengths", 0)].tolist()
        self.tokens, self.min_tokens = value("request_output_len", 0), value("min_tokens", 0)
        self.task, self.end, self.beams = value("lora_task_id", 0), value("end_id", -1), value("beam_width", 1)
        self.streaming = value("streaming", False)
        self.echo = not self.streaming and not value("exclude_input_in_output", False)
        self.top_k, self.top_p = value("runtime_top_k", 0), value("runtime_top_p", 0.0)
        self.temperature, self.seed = value("temperature", 1.0), value("seed", 0)

    def sampling(self):
        """As in TensorRT-LLM: greedy, unless the request asks for more than one candidate."""
        drawn = self.top_k > 1 or (self.top_k == 0 and self.top_p > 0)
        options = {"temperature": max(self.temperature, 1e-2), "top_k": self.top_k, "seed": self.seed}
        if 0 < self.top_p < 1:
            options["top_p"] = self.top_p
        if drawn and (wrong := [name for name, number in options.items() if not math.isfinite(number)]):
            raise Refused(f"{wrong[0]} is {options[wrong[0]]}; it must be a number")
        return SamplingParams(
            **(options if drawn else {"temperature": 0.0}),
            max_tokens=self.tokens,
            min_tokens=self.min_tokens,
            ignore_eos=True,  # the request brings its own end
            stop_token_ids=[self.end] if self.end >= 0 else [],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


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


def start_engine(words):
    """vLLM's engine, with the defaults of its own server; returns when it is ready."""
    arguments = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    # What has been imported here need not be imported again, which takes 5 s; vLLM itself takes "spawn" where a GPU is
    # already in use.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=True)


def response(ids):
    tensors = [
        pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
        pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
    ]
    return pb_utils.InferenceResponse(tensors)


def fail(sender, message):
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), flags=FINAL)
