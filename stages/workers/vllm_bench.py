"""
`vllm bench serve` on a file of prompts: bench_serve.py OPTIONS..., the options of vLLM's own command

Two things keep the command itself from it: the CPU build is a package of another name, by which the command does not
find itself, and its custom dataset wants pandas, which vLLM does not bring. So its parser and its benchmark are called
here. Only the reading of the prompts is not vLLM's: the file's first ones, in order, as they stand.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

from vllm.benchmarks.datasets import CustomDataset, SampleRequest
from vllm.benchmarks.serve import add_cli_args, main


def load_data(self):
    self.data = [json.loads(line)["prompt"] for line in Path(self.dataset_path).read_text().splitlines()]


def sample(self, tokenizer, num_requests, output_len, request_id_prefix="", **_):
    """The requests; their prompts' lengths only stand in for the server's count, where it gives none."""
    return [
        SampleRequest(
            prompt=prompt,
            prompt_len=len(tokenizer(prompt).input_ids),
            expected_output_len=output_len,
            request_id=f"{request_id_prefix}{n}",
        )
        for n, prompt in enumerate(islice(self.data, num_requests))
    ]


if __name__ == "__main__":
    CustomDataset.load_data, CustomDataset.sample = load_data, sample
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    if "--extra-body" not in parser.format_help():  # vLLM 0.11.0: there --ignore-eos alone pins the answer's length
        parser.add_argument("--extra-body")
    main(parser.parse_args())
