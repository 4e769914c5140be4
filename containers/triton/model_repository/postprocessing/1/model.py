"""Token ids as text. In a stream each piece is decoded alone: a character of two tokens becomes U+FFFD twice."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        folder = json.loads(args["model_config"])["parameters"]["tokenizer_dir"]["string_value"]
        self.tokenizer = Tokenizer.from_file(str(Path(args["model_repository"]) / folder / "tokenizer.json"))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()  # (batch, beam, token)
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()  # (batch, beam)
        # One flat list, as NVIDIA's postprocessing gives it: its clients read element 0.
        texts = [
            self.tokenizer.decode(beam[:length].tolist())
            for beams, ends in zip(tokens, lengths, strict=True)
            for beam, length in zip(beams, ends, strict=True)
        ]
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.array(texts, dtype=object))])
