"""The text of a request as token ids, with the tokenizer's own convention about a first BOS, and never two."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        folder = json.loads(args["model_config"])["parameters"]["tokenizer_dir"]["string_value"]
        folder = Path(args["model_repository"]) / folder
        # Not AutoTokenizer: that is 2 s of imports in each of the instances, for the same ids.
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        self.bos, self.end = config.get("bos_token_id"), config["eos_token_id"]
        self.end = self.end[0] if isinstance(self.end, list) else self.end

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        for name in ("BAD_WORDS_DICT", "STOP_WORDS_DICT"):
            words = pb_utils.get_input_tensor_by_name(request, name)
            if words is not None and any(words.as_numpy().ravel()):
                return failure(f"{name} is not empty; this stand-in engine has neither bad words nor stop words")
        query = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy()
        if query.size != 1:
            return failure(f"QUERY holds {query.size} texts; send one text a request")

        ids = self.encode(query.item().decode())
        tensors = {
            "INPUT_ID": np.array([ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], np.int32),
            "REQUEST_OUTPUT_LEN": pb_utils.get_input_tensor_by_name(request, "REQUEST_OUTPUT_LEN").as_numpy(),
            "OUT_END_ID": self.given(request, "END_ID"),
            "OUT_PAD_ID": self.given(request, "PAD_ID"),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])

    def encode(self, text):
        """Token ids of the text. A prompt that brings its own BOS, as the writeup's did, gets no second one."""
        ids = self.tokenizer.encode(text).ids
        return ids[1:] if ids[:2] == [self.bos, self.bos] else ids

    def given(self, request, name):
        """The request's id, or the model's end id: it stands for padding too, as Llama has no padding token."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return np.array([[self.end]], np.int32) if tensor is None else tensor.as_numpy()


def failure(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
