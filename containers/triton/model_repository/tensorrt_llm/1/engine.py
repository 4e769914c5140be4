"""
Continuous batching with Transformers on a CPU: what answers where TensorRT-LLM cannot be had.

The base model and each adapter have a batch of their own, over one copy of the base weights. An adapter is not merged:
it costs time at each step, as it does in TensorRT-LLM and in vLLM.
"""

import copy
import math
import os
import threading

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

PAGE_TOKENS = 128
BASE = 0  # the task id that means: no adapter


class Refused(Exception):
    """A request that this engine cannot serve; the message goes to the client."""


class RequestOptions(ContinuousBatchingLogitsProcessor):
    """Minimum length and sampling, each request with its own values in one batch."""

    supported_kwargs = {"min_tokens": int, "end_id": int, "temperature": float, "top_k": int, "top_p": float,
                        "seed": int}  # fmt: skip
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor):
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token):
        # The batch that the coming scores belong to, row by row: preparing and scoring alternate on one thread.
        self.states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self.states), dtype=torch.int32)

    def __call__(self, scores, tensor_arg):
        # More rows than states: behind them come those of prompts that are read in parts, which make no token yet.
        for row, state in zip(scores, self.states, strict=False):
            options = state.logit_processor_kwargs
            made = state.generated_len()
            if made < options["min_tokens"] and options["end_id"] >= 0:
                row[options["end_id"]] = -torch.inf
            # As in TensorRT-LLM: greedy, unless the request asks for more than one candidate.
            if options["top_k"] > 1 or (options["top_k"] == 0 and options["top_p"] > 0):
                token = draw(row, options, options["seed"] + made)
                row.fill_(-torch.inf)[token] = 0.0
        return scores


def draw(row, options, seed):
    """One token id out of the scores of one request; the same seed draws the same token."""
    scores, tokens = torch.sort(row / max(options["temperature"], 1e-3), descending=True)
    if options["top_k"] > 0:
        scores[options["top_k"] :] = -torch.inf
    probabilities = scores.softmax(-1)
    if 0 < options["top_p"] < 1:
        # A token stays while those before it have not reached top_p together.
        probabilities[probabilities.cumsum(-1) - probabilities >= options["top_p"]] = 0.0
    return tokens[torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))]


class Engine:
    """Managers by task id; `adapters` maps task ids (from 1) to folders of PEFT adapters."""

    def __init__(self, model_dir, adapters, max_batch_size, max_sequence_tokens):
        # As vLLM's CPU build: one core is left to the server, the tokenizers and the client. With none left, every
        # step waits for the thread that another process has pushed aside, and takes ten times as long.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
        self.max_sequence_tokens = max_sequence_tokens
        self.listeners = {}  # (task, request id) -> [callback, tokens already delivered]
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", attn_implementation="sdpa")
        self.vocabulary = base.config.vocab_size
        models = {BASE: base} | {task: with_adapter(base, folder) for task, folder in adapters.items()}
        self.managers = {task: batching(model, max_batch_size, max_sequence_tokens) for task, model in models.items()}
        for task in self.managers:
            threading.Thread(target=self._deliver, args=(task,), daemon=True).start()
        self._warm_up()

    def submit(self, request_id, task, prompt, max_tokens, options, callback):
        """Add a request to the running batch; `callback(new token ids, finished, error)` is called for every step."""
        if task not in self.managers:
            there = ", ".join(str(known) for known in self.managers if known != BASE) or "none"
            raise Refused(f"lora_task_id {task} is not loaded; there are: {there} (0 or absent: the base model)")
        self._check(prompt, max_tokens, options)
        manager = self.managers[task]
        self.listeners[task, request_id] = [callback, 0]
        added = manager.add_request(
            prompt, request_id, max_tokens, streaming=True, eos_token_id=options["end_id"], **options
        )
        if added is None:
            del self.listeners[task, request_id]
            raise Refused("the engine has stopped; its log says why")

    def _check(self, prompt, max_tokens, options):
        """Refuse what would end the engine's thread, and every other request with it."""
        if not prompt:
            raise Refused("the prompt is empty; it needs at least one token")
        if unknown := [token for token in [*prompt, max(options["end_id"], 0)] if not 0 <= token < self.vocabulary]:
            raise Refused(f"token {unknown[0]} is none of the model's, which are 0 to {self.vocabulary - 1}")
        if max_tokens < 1:
            raise Refused(f"request_output_len is {max_tokens}; it must be at least 1")
        if len(prompt) + max_tokens > self.max_sequence_tokens:
            raise Refused(
                f"{len(prompt)} input tokens and request_output_len {max_tokens} are more than "
                f"the {self.max_sequence_tokens} tokens of a sequence"
            )
        if wrong := [name for name in ("temperature", "top_p") if not math.isfinite(options[name])]:
            raise Refused(f"{wrong[0]} is {options[wrong[0]]}; it must be a number")

    def cancel(self, request_id, task):
        if self.listeners.pop((task, request_id), None):
            self.managers[task].cancel_request(request_id)

    def stop(self):
        for manager in self.managers.values():
            manager.stop(block=True, hard_stop=True)

    def _deliver(self, task):
        # Ends with the manager's own thread, which fails what is still open before it goes.
        for output in self.managers[task]:
            listener = self.listeners.get((task, output.request_id))
            if listener is None:  # cancelled
                continue
            callback, sent = listener
            listener[1] = len(output.generated_tokens)
            if output.is_finished():
                del self.listeners[task, output.request_id]
            callback(output.generated_tokens[sent:], output.is_finished(), output.error)

    def _warm_up(self):
        """The first step takes seconds: before the server says that it is ready, not in the first measurement."""
        greedy = {"min_tokens": 0, "end_id": -1, "temperature": 1.0, "top_k": 1, "top_p": 0.0, "seed": 0}
        for task in self.managers:
            done = threading.Event()
            self.submit("warm-up", task, [0] * 8, 4, greedy, lambda _, finished, __, done=done: finished and done.set())
            done.wait()


def with_adapter(base, folder):
    """The base model with one LoRA adapter in its layers; the weights of the base are shared, not copied."""
    from peft import PeftModel

    twin = copy.deepcopy(base, memo={id(weight): weight for weight in base.parameters()})
    return PeftModel.from_pretrained(twin, folder).base_model.model


def batching(model, max_batch_size, max_sequence_tokens):
    """A started manager whose cache holds max_batch_size sequences at once, so that no request is ever put off."""
    pages = -(-max_sequence_tokens // PAGE_TOKENS)
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=max_batch_size * (pages + 1),
            max_batch_tokens=max(512, max_batch_size),
            max_requests_per_batch=max_batch_size,
            allow_block_sharing=False,  # no prefix caching: every prompt is computed, as on the other server
            auto_switch_to_flash=False,
        ),
    )
    # Its own list is made for one GenerationConfig; ours takes the options of each request.
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RequestOptions()]))
    manager.logit_processor.tensors_required = 1
    manager.start()
    return manager
