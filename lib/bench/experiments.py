"""
The experiments of the benchmark as data: those that params.yaml lists, their points, the order in which they are
measured, and the time they take.
"""

import itertools
import re
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from lib.core.stage import UserError, check_bounds, patched, read_json
from lib.serving.clients import GenaiPerf, RandomBench
from lib.serving.servers import OURS, SERVERS

ENDPOINTS = ("completions", "chat")
LOAD_CLIENTS = {"genai-perf": GenaiPerf(), "vllm bench serve": RandomBench()}
PROMPTS = ("unique", "synthetic")
CUT_SHORT = 75  # exit code of a sweep that BUDGET ended: EX_TEMPFAIL, run it again
BUDGET_ENDED = "the budget ended after"  # begins the reason for points that a later run can still measure
FIXED = ("experiments", "definitions", "configurations", "client_variants")  # no patch changes these


@dataclass
class Bench:
    experiments: dict
    definitions: dict
    configurations: dict
    client_variants: dict
    servers: list
    model: str
    lengths: list
    concurrency: list
    repeats: int
    together: bool
    variants: list
    client: str
    requests_per_stream: int
    min_requests: int
    warmup_requests: int
    endpoint: str
    prompts: str
    pinned: bool
    seed: int
    ready_seconds: int
    point_seconds: int
    server_options: list

    def __post_init__(self):
        if not self.concurrency or any(type(level) is not int or level < 1 for level in self.concurrency):
            raise UserError(f"params.yaml: bench.concurrency is {self.concurrency}; use whole numbers from 1")
        pairs = [pair for pair in self.lengths if type(pair) is list and len(pair) == 2]
        if not pairs or len(pairs) < len(self.lengths) or any(type(n) is not int or n < 1 for p in pairs for n in p):
            raise UserError(f"params.yaml: bench.lengths is {self.lengths}; use pairs of tokens in and out, from 1")
        ones = ("repeats", "requests_per_stream", "min_requests", "ready_seconds", "point_seconds")
        check_bounds("bench", self, dict.fromkeys(ones, 1) | {"warmup_requests": 0, "seed": 0})
        for name, known in (("endpoint", ENDPOINTS), ("prompts", PROMPTS), ("client", LOAD_CLIENTS)):
            if getattr(self, name) not in known:
                raise UserError(f"params.yaml: bench.{name} is {getattr(self, name)!r}; use {' or '.join(known)}")
        for name, words in {"server_options": self.server_options, **self.configurations}.items():
            if wrong := [word for word in words if type(word) is not str]:
                raise UserError(f"params.yaml: bench.{name} has {wrong[0]!r}; write it as text, in quotes")
        for name in self.servers:
            self.options(name)
        if self.together and (other := [name for name in self.servers if not name.startswith("vllm")]):
            raise UserError(f"params.yaml: bench.together needs a port for each server; {other[0]} has fixed ports")
        if self.model not in OURS and not re.fullmatch(r"[\w.-]+:[\w.-]+", self.model):
            raise UserError(f"params.yaml: bench.model is {self.model!r}; use base, lora, or SHAPE:FORMAT")
        for name, adapters in self.experiments.items():
            if name not in self.definitions or adapters not in OURS:
                known = ", ".join(self.definitions)
                raise UserError(
                    f"params.yaml: bench.experiments has {name}: {adapters}; use {' or '.join(OURS)} for one of {known}"
                )
        for name in self.variants:
            if name not in self.client_variants:
                raise UserError(f"params.yaml: bench.variants has {name!r}; use {', '.join(self.client_variants)}")

    def server(self, name, inputs):
        """(server, its further words) of SERVER or SERVER-CONFIGURATION, such as vllm-fp8."""
        server = SERVERS[name.partition("-")[0]](self.model, inputs)
        if self.together:
            server.port += self.servers.index(name)
        return server, self.options(name)

    def options(self, name):
        """The further words of a server's command line; UserError for a name that is not known."""
        kind, _, configuration = name.partition("-")
        if kind not in SERVERS or (configuration and configuration not in self.configurations):
            known = [
                *SERVERS,
                *(f"{kind}-{configuration}" for configuration in self.configurations for kind in SERVERS),
            ]
            raise UserError(f"params.yaml: bench.servers has {name!r}; use {', '.join(known)}")
        words = self.configurations[configuration] if configuration else []
        return [*self.server_options, *words]

    def with_variant(self, name):
        """The parameters with one of client_variants in effect."""
        return patched(self, self.client_variants[name], f"bench.client_variants.{name}", FIXED)

    def requests(self, concurrency):
        return max(self.min_requests, concurrency * self.requests_per_stream)

    def warmup(self, concurrency):
        return concurrency * self.warmup_requests


@dataclass(frozen=True)
class Point:
    """One measurement: a server under one load, once."""

    server: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    variant: str
    repeat: int

    def __str__(self):
        load = f"{self.input_tokens}-{self.output_tokens}-c{self.concurrency}"
        return f"{self.server}-{load}-{self.variant}-r{self.repeat}"


def with_experiment(p, name):
    """The parameters of the experiment `name`; UserError names those there are."""
    if name not in p.definitions:
        raise UserError(f"experiments.yaml: bench.definitions has no {name!r}; it has {', '.join(p.definitions)}")
    return patched(p, p.definitions[name], f"bench.definitions.{name}", FIXED)


def adapters_of(p, name):
    """The adapters that an experiment serves: "lora" if its model is the fine-tuned one, otherwise "base"."""
    return "lora" if with_experiment(p, name).model == "lora" else "base"


def check_lengths(p, name):
    """UserError where a vLLM takes fewer tokens in all (its last --max-model-len) than the experiment asks for."""
    longest = max(map(sum, p.lengths))
    for server in (name for name in p.servers if name.startswith("vllm")):
        words = dict(word.partition("=")[::2] for word in p.options(server))
        limit = words.get("--max-model-len", "")
        if limit.isdigit() and int(limit) < longest:
            raise UserError(
                f"experiments.yaml: bench.definitions.{name} asks {server} for {longest} tokens in and out; "
                f"its options have --max-model-len={limit}: raise that, or shorten bench.lengths"
            )


def visits(p):
    """[(server, its points)] in the order of measuring: A B, then B A, then A B, so that what drifts (heat, a
    neighbour) falls on all servers alike; what is adjacent of one server needs one start.

    Within a repeat the ends of the sweep come first, then what halves the gaps: stopped early, it is still a curve.
    """
    turns = [
        (server, repeat)
        for repeat in range(1, p.repeats + 1)
        for server in (p.servers if repeat % 2 else reversed(p.servers))
    ]
    order = coarse_to_fine(sorted(p.concurrency))
    for server, turn in itertools.groupby(turns, key=itemgetter(0)):
        yield (
            server,
            [
                Point(server, *pair, concurrency, variant, repeat)
                for _, repeat in turn
                for pair in p.lengths
                for concurrency in order
                for variant in p.variants
            ],
        )


def coarse_to_fine(levels):
    """First the lowest and the highest, then the middle of each gap, until all are there."""
    if len(levels) < 3:
        return levels
    order, gaps = [levels[0], levels[-1]], [levels]
    while gaps:
        wide = [gap for gap in gaps if len(gap) > 2]
        order += [gap[len(gap) // 2] for gap in wide]
        gaps = [half for gap in wide for half in (gap[: len(gap) // 2 + 1], gap[len(gap) // 2 :])]
    return order


def seconds_of(budget):
    """A time such as 90s, 30m or 2h in seconds; None for none; UserError for anything else."""
    if not budget:
        return None
    match = re.fullmatch(r"(\d+)([smh])", budget)
    if not match:
        raise UserError(f"BUDGET is {budget!r}; write a number and s, m or h, such as 30m")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


class Clock:
    """Predicts how long an experiment takes from its earlier runs on this machine."""

    def __init__(self, path):
        self.path, self.seconds = Path(path), {"ready": {}, "points": {}}
        if self.path.exists():
            self.seconds = read_json(self.path)

    def left(self, plan, running=0):
        """Seconds for the (server, points) of a plan, whose first `running` servers have started; None as long as
        nothing is known."""
        plan, ready, points = list(plan), self.seconds["ready"], self.seconds["points"]
        if not points:
            return None
        starts = sum(ready.get(server, max(ready.values())) for server, _ in plan[running:])
        return starts + sum(points.get(key_of(point), max(points.values())) for _, group in plan for point in group)


def key_of(point):
    """The part of a point's name that its duration depends on."""
    return str(point).rpartition("-r")[0]
