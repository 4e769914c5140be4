"""Preprocessing, engine, postprocessing: the ensemble's flow, written as a program (business logic scripting)."""

import triton_python_backend_utils as pb_utils

# Tensor of the request -> tensor of the model it goes to.
TO_PREPROCESSING = {"text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN", "bad_words": "BAD_WORDS_DICT",
                    "stop_words": "STOP_WORDS_DICT", "end_id": "END_ID", "pad_id": "PAD_ID"}  # fmt: skip
TO_ENGINE = {"exclude_input_in_output": "exclude_input_in_output", "top_k": "runtime_top_k", "top_p": "runtime_top_p",
             "temperature": "temperature", "seed": "seed", "min_tokens": "min_tokens", "beam_width": "beam_width",
             "stream": "streaming", "lora_task_id": "lora_task_id"}  # fmt: skip
# Output of preprocessing -> input of the engine, output of the engine -> input of postprocessing.
PREPARED = {"INPUT_ID": "input_ids", "REQUEST_INPUT_LEN": "input_lengths", "REQUEST_OUTPUT_LEN": "request_output_len",
            "OUT_END_ID": "end_id", "OUT_PAD_ID": "pad_id"}  # fmt: skip
GENERATED = {"output_ids": "TOKENS_BATCH", "sequence_length": "SEQUENCE_LENGTH"}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.answer(request, sender)
            except pb_utils.TritonModelException as error:
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
                sender.send(response, flags=FINAL)
        return None

    def answer(self, request, sender):
        (prepared,) = call("preprocessing", renamed(request.inputs(), TO_PREPROCESSING), list(PREPARED))
        inputs = renamed(prepared.output_tensors(), PREPARED) + renamed(request.inputs(), TO_ENGINE)
        for generated in call("tensorrt_llm", inputs, list(GENERATED), decoupled=True):
            if not generated.output_tensors():  # the empty response that ends a decoupled stream
                continue
            inputs = renamed(generated.output_tensors(), GENERATED)
            (text,) = call("postprocessing", inputs, ["OUTPUT"])
            sender.send(pb_utils.InferenceResponse(renamed(text.output_tensors(), {"OUTPUT": "text_output"})))
        sender.send(flags=FINAL)


def call(model, inputs, outputs, decoupled=False):
    """The responses of another model of this server; TritonModelException where one holds an error."""
    request = pb_utils.InferenceRequest(model_name=model, inputs=inputs, requested_output_names=outputs)
    responses = request.exec(decoupled=True) if decoupled else [request.exec()]
    for response in responses:
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        yield response


def renamed(tensors, names):
    return [pb_utils.Tensor(names[tensor.name()], tensor.as_numpy()) for tensor in tensors if tensor.name() in names]
