"""
The real Triton with vLLM as its stand-in engine, and the real vLLM, once each, with the same small model and two
adapters: do they batch, stream, pick the adapter, and say the same as Transformers, so the same as each other? In
float32, where no rounding decides.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import psutil
import pytest
from conftest import ONE_THREAD, REPO, copy_tree, every_input, run_in, set_params, variables

from lib.core.stage import write_json
from lib.multilora.cost import load_adapter
from lib.serving.answers import URL, answer, read_metrics
from lib.serving.process import serving
from lib.serving.servers import Triton, Vllm
from lib.streaming.http import Request

PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "Water freezes at"]
TOKENS = 12
# Both servers' engine: exact, and small enough that a long prompt is read in parts.
ENGINE = ["--enforce-eager", "--dtype=float32", "--kv-cache-memory-bytes=256M", "--max-model-len=2048",
          "--max-num-batched-tokens=512"]  # fmt: skip

# LoRA adapters with random weights: they change every answer, unlike a short training.
ADAPTERS = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

for seed, out in enumerate(sys.argv[2:]):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    layers = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(out)
"""
# What Transformers' own generate answers, without continuous batching.
REFERENCE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, prompts, adapters = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
tokenizer = AutoTokenizer.from_pretrained(folder)
answers = []
for adapter in [None, *adapters]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    told = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids.input_ids.shape[1] :]
        told.append(tokenizer.decode(made, skip_special_tokens=True))
    answers.append(told)
print(json.dumps(answers))
"""
# Streams over gRPC, to be added to. A program that hangs says where, before its time is over.
STREAM = """
import faulthandler, json, queue, sys
import numpy as np
import tritonclient.grpc as grpc

faulthandler.dump_traceback_later(100, exit=True)
KINDS = {"BYTES": object, "INT32": np.int32, "BOOL": bool}
answers = queue.Queue()
client = grpc.InferenceServerClient("127.0.0.1:8001")
client.start_stream(lambda result, error: answers.put(error or result))

def ask(model, request_id, **inputs):
    tensors = []
    for name, (kind, value) in inputs.items():
        array = np.array([value], dtype=KINDS[kind])
        tensors.append(grpc.InferInput(name, array.shape, kind))
        tensors[-1].set_data_from_numpy(array)
    client.async_stream_infer(model, tensors, request_id=request_id, enable_empty_final_response=True)

def answer():
    result = answers.get(timeout=60)
    if isinstance(result, Exception):
        client.close()  # its thread would keep this program alive
        sys.exit(str(result))
    return result
"""
# Two at once; prints the number of the stream of each piece as it comes, and each stream's text.
TWO_STREAMS = (
    STREAM
    + """
tokens, prompts = int(sys.argv[1]), sys.argv[2:]
for number, prompt in enumerate(prompts):
    length = ("INT32", [tokens])
    ask("ensemble", str(number), text_input=("BYTES", [prompt.encode()]), max_tokens=length, min_tokens=length,
        stream=("BOOL", [True]))
order, texts, finals = [], [""] * len(prompts), 0
while finals < len(prompts):
    result = answer()
    number = int(result.get_response().id)
    if result.as_numpy("text_output") is not None:
        order.append(number)
        texts[number] += result.as_numpy("text_output")[0].decode()
    finals += result.get_response().parameters["triton_final_response"].bool_param
client.stop_stream()
client.close()
print(json.dumps([order, texts]))
"""
)
# One that is cancelled after its first token. Behind an ensemble Triton 2.51 does not hand a cancellation on.
CANCEL = (
    STREAM
    + """
ask("tensorrt_llm", "0", input_ids=("INT32", [5, 6, 7]), input_lengths=("INT32", [3]), streaming=("BOOL", [True]),
    request_output_len=("INT32", [2000]))
assert answer().as_numpy("sequence_length").tolist() == [[1]]
client.stop_stream(cancel_requests=True)
client.close()  # left to the interpreter's end, it can wait for a thread that has ended
"""
)


@pytest.fixture(scope="module")
def served(base_model, tmp_path_factory):
    """A copied tree with a float32 base model, two random adapters and the repository with them; the working folder."""
    tree = copy_tree(tmp_path_factory.mktemp("serving") / "my tree (copy)")
    make_own_environment(tree, "vllm")
    results = tree / "results" / "embedded"
    shutil.copytree(base_model, results / "base_model")
    config = results / "base_model" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    set_params(tree, repository={"max_batch_size": 4, "instances": 2}, bench={"server_options": ENGINE})
    folders = [f"results/embedded/finetune/{method}/adapter" for method in ("lora", "qlora")]
    tree_of(tree, "venv:pytorch", "-c", ADAPTERS, "results/embedded/base_model/model", *folders)
    tree_of(tree, "venv:tools", "-m", "stages.repository", "lora", "venv:vllm")
    # What `make chat` asks with.
    write_json(results / "dataset" / "metrics.json", {"template": "chatml", "system_prompt": ""})
    for method in ("lora", "qlora"):
        write_json(results / "finetune" / method / "metrics.json", {"settings": {"template": "corrected"}})
    set_params(tree, chat={"max_new_tokens": TOKENS, "temperature": 0.0, "repetition_penalty": 1.0})
    here = os.getcwd()
    os.chdir(tree)
    yield tree
    os.chdir(here)


def make_own_environment(tree, name):
    """An environment at a path inside the copied tree, as a clone there would make it, of this checkout's packages."""
    (tree / ".venvs").unlink()
    own, made = tree / ".venvs" / name, (REPO / ".venvs" / name).resolve()
    run_in(REPO, "containers/venv", name, check=True)
    shutil.copytree(made / "bin", own / "bin", symlinks=True)
    (own / "lib").symlink_to(made / "lib")
    for file in ("pyvenv.cfg", "lock.sha256"):
        shutil.copy2(made / file, own / file)
    run_in(tree, f"containers/{name}/setup", own, check=True)
    for other in made.parent.iterdir():
        if other.is_dir() and other.name != name:
            (tree / ".venvs" / other.name).symlink_to(other)


def tree_of(tree, image, *words):
    done = run_in(tree, "containers/run", image, "python", *words, environment=ONE_THREAD, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def expected(served):
    """Transformers' answers to PROMPTS: of the base model, of the first adapter, of the second."""
    folders = [f"results/embedded/finetune/{method}/adapter" for method in ("lora", "qlora")]
    words = ["-c", REFERENCE, "results/embedded/base_model/model", str(TOKENS), json.dumps(PROMPTS), *folders]
    return json.loads(tree_of(served, "venv:vllm", *words).splitlines()[-1])


@pytest.fixture(scope="class")
def triton(served):
    """The real Triton, started as a person starts it."""
    folder = served / "results" / "embedded" / "repository"
    before = sorted(folder.rglob("*"))
    making = subprocess.Popen(
        ["make", "serve", "SERVER=triton"], cwd=served, env=variables(), stderr=subprocess.PIPE, text=True
    )
    said = [making.stderr.readline(), making.stderr.readline()]
    try:
        assert "is ready after" in said[1], said
        yield Triton("lora", every_input())
    finally:
        # As Ctrl-C on a terminal: to the tool, which make waits for.
        psutil.Process(making.pid).children()[0].send_signal(signal.SIGINT)
        said.append(making.stderr.read())
        making.wait(60)
    # It ended by itself, with nothing in flight, and left nothing in a folder that DVC watches.
    assert said[2].startswith("stopping") and making.returncode == 0, said
    assert "Exit timeout expired" not in (served / ".work" / "embedded" / "serve-triton.log").read_text()
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="class")
def vllm(served):
    server = Vllm("lora", every_input())
    updating = ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]
    command = ["containers/run", "venv:vllm", *updating, *server.command(ENGINE)]
    with serving(server, command, served / "vllm.log", 180, "bench.ready_seconds"):
        yield server


def post(path, **body):
    """The body of the answer to a POST, an error's too."""
    request = urllib.request.Request(f"http://127.0.0.1:8000{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def generate(prompt, model="ensemble", **inputs):
    inputs = {"max_tokens": TOKENS, "exclude_input_in_output": True, **inputs}
    return json.loads(post(f"/v2/models/{model}/generate", text_input=prompt, **inputs))


def complete(model, prompt, **options):
    options = {"max_tokens": TOKENS, "temperature": 0, **options}
    return json.loads(post("/v1/completions", model=model, prompt=prompt, **options))


def all_at_once(ask):
    """ask(task, prompt) of every prompt with no adapter and with each, all in flight at once; as `expected` is."""
    with ThreadPoolExecutor(3 * len(PROMPTS)) as pool:
        asked = [[pool.submit(ask, task, prompt) for prompt in PROMPTS] for task in (0, 1, 2)]
        return [[one.result() for one in told] for told in asked]


def streamed(tree, *loads):
    """What stages/workers/stream_client.py gives of PROMPTS, all in flight at once, for each (client, words,
    adapter)."""
    asked = [
        {
            "client": client,
            "words": {"model_dir": "results/embedded/base_model/model", **words},
            "concurrency": len(PROMPTS),
            "requests": [asdict(Request(prompt, adapter, TOKENS, 0, 0.0, 1.0, 0)) for prompt in PROMPTS],
        }
        for client, words, adapter in loads
    ]
    (tree / "ask.json").write_text(json.dumps(asked))
    tree_of(tree, "venv:client", "-m", "stages.workers.stream_client", "ask.json", "told.json")
    return [load["answers"] for load in json.loads((tree / "told.json").read_text())]


def chat(tree, **words):
    done = run_in(tree, "make", "chat", *(f"{name}={value}" for name, value in words.items()), timeout=60)
    return done.stdout, done.stderr


QUESTION = "犬は好き?"
AS_ASKED = f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def test_the_quick_start_answers_and_names_the_stand_in(served):
    tree_of(served, "venv:tools", "-m", "stages.repository", "base", "venv:vllm")
    said = tree_of(served, "venv:tools", "-m", "tools.quickstart_trtllm")
    assert "a stand-in for TensorRT-LLM: no engine to build" in said
    assert re.search(r"vLLM [\w.]+ behind Triton 2\.\d+\.0 \(stand-in for TensorRT-LLM\) is ready", said)
    shown = [shlex.split(line[2:]) for line in said.splitlines() if line.startswith("$ curl")]
    texts = [json.loads(words[words.index("-d") + 1])["text_input"] for words in shown]
    answers = [json.loads(found)["text_output"] for found in re.findall(r"(?ms)^\{$.*?^\}$", said)]
    assert texts[0] == texts[1] == "How do I count to nine in French?" and answers[0] == answers[1]
    # Only in the template of its training does this model answer with more than an end.
    assert texts[2].startswith("<|im_start|>") and len(answers[2]) > len(texts[2])


class TestTriton:
    def test_triton_answers_as_transformers_with_each_adapter(self, triton, expected):
        answers = [[generate(prompt, lora_task_id=task)["text_output"] for prompt in PROMPTS] for task in (0, 1, 2)]
        assert answers == expected
        # The adapters make a difference, or this test would show nothing.
        assert expected[0] != expected[1] != expected[2] != expected[0]

    def test_triton_without_a_task_id_answers_as_the_base_model(self, triton, expected):
        assert generate(PROMPTS[0])["text_output"] == expected[0][0]

    def test_triton_gives_the_prompt_back_unless_it_is_told_not_to(self, triton, expected):
        whole = generate(PROMPTS[0], exclude_input_in_output=False)["text_output"]
        assert whole == PROMPTS[0] + expected[0][0]

    def test_the_bls_model_answers_as_the_ensemble(self, triton, expected):
        assert generate(PROMPTS[1], "tensorrt_llm_bls", lora_task_id=1)["text_output"] == expected[1][1]
        assert "lora_task_id 9 is not loaded" in generate(PROMPTS[1], "tensorrt_llm_bls", lora_task_id=9)["error"]

    @pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
    def test_streamed_pieces_join_to_the_same_text(self, triton, expected, model):
        events = post(f"/v2/models/{model}/generate_stream", text_input=PROMPTS[1], max_tokens=TOKENS, stream=True)
        pieces = [json.loads(line[6:])["text_output"] for line in events.splitlines() if line.startswith("data: ")]
        assert len(pieces) == TOKENS
        assert "".join(pieces) == expected[0][1]

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"lora_task_id": 7}, "lora_task_id 7 is not loaded; there are: 1, 2 (0 or absent: the base model)"),
            ({"max_tokens": 4000}, "request_output_len 4000 are more than the 2048 tokens of a sequence"),
            ({"max_tokens": 0}, "request_output_len is 0; it must be at least 1"),
            ({"text_input": ""}, "the prompt is empty; it needs at least one token"),
            ({"end_id": 9_999_999}, "token 9999999 is none of the model's, which are 0 to "),
            ({"beam_width": 2}, "send one prompt a request, with beam width 1"),
            ({"stop_words": "Paris"}, "this stand-in engine has neither bad words nor stop words"),
        ],
    )
    def test_what_the_stand_in_cannot_do_is_an_error_that_says_so(self, triton, expected, inputs, message):
        inputs = {"text_input": PROMPTS[0], "max_tokens": TOKENS, "exclude_input_in_output": True, **inputs}
        assert message in json.loads(post("/v2/models/ensemble/generate", **inputs))["error"]
        assert generate(PROMPTS[1])["text_output"] == expected[0][1]  # the others go on

    def test_the_writeups_payload_is_accepted_as_it_stands(self, triton, expected):
        payload = {"text_input": PROMPTS[0], "max_tokens": TOKENS, "bad_words": "", "stop_words": "", "lora_task_id": 0}
        answered = json.loads(post("/v2/models/ensemble/generate", **payload))
        assert answered["text_output"] == PROMPTS[0] + expected[0][0]

    def test_nested_parameters_reach_the_model(self, triton, expected):
        nested = {"max_tokens": TOKENS, "bad_words": [""], "stop_words": [""]}
        answered = json.loads(post("/v2/models/ensemble/generate", text_input=PROMPTS[0], parameters=nested))
        assert answered["text_output"] == PROMPTS[0] + expected[0][0]

    def test_the_end_token_ends_an_answer_but_not_before_min_tokens(self, triton, expected):
        before = read_metrics(triton, triton.counters)
        # The id of the model's first answer token, a space, is declared to be the end.
        first = generate(PROMPTS[1], max_tokens=1)["text_output"]
        ended = generate(PROMPTS[1], end_id=216)["text_output"]
        pinned = generate(PROMPTS[1], end_id=216, min_tokens=TOKENS)["text_output"]
        after = read_metrics(triton, triton.counters)
        assert (first, ended) == (" ", " ")
        assert expected[0][1].startswith(" ") and pinned.strip()
        # Another way was taken at the first token, and the length is the one asked for.
        assert pinned != expected[0][1]
        made = after["output_tokens"] - before["output_tokens"], after["requests"] - before["requests"]
        assert made == (1 + 1 + TOKENS, 3)

    def test_a_seed_repeats_samples_and_no_candidates_is_greedy(self, triton, expected):
        drawn = [generate(PROMPTS[2], top_k=50, temperature=2.0, seed=seed)["text_output"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert generate(PROMPTS[2], top_k=1, temperature=2.0)["text_output"] == expected[0][2]
        assert generate(PROMPTS[2], top_p=0.0001)["text_output"] == expected[0][2]

    def test_two_grpc_streams_at_once_run_in_one_batch(self, triton, expected):
        order, texts = json.loads(tree_of(REPO, "venv:client", "-c", TWO_STREAMS, str(TOKENS), *PROMPTS[:2]))
        assert texts == expected[0][:2]
        assert sorted(order) == [0] * TOKENS + [1] * TOKENS
        # Served one after the other, the streams would change over once.
        assert sum(one != two for one, two in zip(order, order[1:], strict=False)) > TOKENS

    def test_nine_at_once_on_triton_get_what_each_gets_alone(self, triton, expected):
        assert all_at_once(lambda task, prompt: generate(prompt, lora_task_id=task)["text_output"]) == expected

    def test_an_answer_is_counted_before_its_client_has_it(self, triton):
        start, counted = read_metrics(triton, triton.counters)["requests"], []
        for _ in range(30):
            generate(PROMPTS[0], max_tokens=1)
            counted.append(read_metrics(triton, triton.counters)["requests"] - start)
        assert counted == list(range(1, 31))

    def test_a_cancelled_request_leaves_the_batch(self, triton):
        before = read_metrics(triton, triton.counters)
        tree_of(REPO, "venv:client", "-c", CANCEL)
        generate(PROMPTS[0], max_tokens=4)
        time.sleep(1)
        after = read_metrics(triton, triton.counters)
        # The cancelled one wanted 2,000 tokens; it is neither counted nor still running.
        assert (after["requests"] - before["requests"], after["output_tokens"] - before["output_tokens"]) == (1, 4)
        took = time.monotonic()
        generate(PROMPTS[0], max_tokens=TOKENS)
        assert time.monotonic() - took < 10

    def test_every_triton_client_returns_each_adapters_answers(self, served, triton, expected):
        http, grpc = ({"url": url, "adapters": {"lora": 1, "qlora": 2}} for url in (URL, "127.0.0.1:8001"))
        bls = {**grpc, "model": "tensorrt_llm_bls"}
        whole, ids, text, base = streamed(
            served,
            ("triton", http, "lora"),
            ("triton-stream", grpc, "qlora"),
            ("triton-text", bls, "lora"),
            ("triton-stream", grpc, None),
        )
        texts = [[one["text"].strip() for one in answers] for answers in (base, whole, ids, text)]
        assert texts == [[one.strip() for one in expected[task]] for task in (0, 1, 2, 1)]
        assert [one["tokens"] for one in ids] == [TOKENS] * len(PROMPTS)
        assert all(0 < one["ttft_seconds"] < one["seconds"] for one in ids + text)
        assert all(one["ttft_seconds"] == pytest.approx(one["seconds"], rel=0.01) for one in whole)

    def test_chunked_prefill_answers_all_concurrent_prompts(self, triton, expected):
        answers = {}

        def ask(prompt):
            answers[prompt] = generate(prompt)["text_output"]

        long = "word " * 1200  # the engine reads 512 tokens a step
        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in (PROMPTS[0], long)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[PROMPTS[0]] == expected[0][0]
        assert answers[long] == generate(long)["text_output"] != ""

    def test_chat_asks_triton_over_http_and_grpc_with_timings(self, served, triton):
        raw = generate(AS_ASKED, lora_task_id=1)["text_output"].rstrip("\ufffd").strip()
        whole, measured = chat(served, SERVER="triton", ONCE=QUESTION)
        assert whole.strip() == raw
        assert re.search(r"about \d+ tokens \(its text tokenised again\), all at once after \d\.\d+ s", measured)
        pieces, measured = chat(served, SERVER="triton-stream", ADAPTER="lora", ONCE=QUESTION)
        assert pieces.strip() == raw and "\ufffd" not in pieces
        assert re.search(
            r"\d+ tokens \(rows cut to sequence_length\), the first after \d\.\d+ s, then [\d.]+ tok", measured
        )
        said = chat(served, SERVER="vllm", ONCE=QUESTION)[1]
        assert f'error: {URL}/v1/models: 404 {{"error":"Not Found"}}' in said

    def test_triton_says_what_runs(self, triton):
        name, is_stand_in = triton.engine()
        assert name.startswith("vLLM 0.") and "behind Triton 2." in name
        assert name.endswith("(stand-in for TensorRT-LLM)") and is_stand_in


class TestVllm:
    def test_vllm_answers_as_transformers_with_each_adapter(self, vllm, expected):
        models = ("base", "lora", "qlora")
        answers = [[complete(model, prompt)["choices"][0]["text"] for prompt in PROMPTS] for model in models]
        assert answers == expected

    def test_nine_at_once_on_vllm_get_what_each_gets_alone(self, vllm, expected):
        models = ("base", "lora", "qlora")
        assert all_at_once(lambda task, prompt: complete(models[task], prompt)["choices"][0]["text"]) == expected

    def test_vllm_makes_the_pinned_length_and_counts_it(self, vllm):
        before = read_metrics(vllm, vllm.counters)
        for prompt in PROMPTS:
            usage = complete("lora", prompt, ignore_eos=True, min_tokens=40, max_tokens=40)["usage"]
            assert usage["completion_tokens"] == 40
        after = read_metrics(vllm, vllm.counters)
        assert after["output_tokens"] - before["output_tokens"] == 40 * len(PROMPTS)
        assert after["requests"] - before["requests"] == len(PROMPTS)

    def test_chat_asks_vllm_as_the_openai_client(self, served, vllm):
        text, measured = chat(served, SERVER="vllm", ADAPTER="qlora", ONCE=QUESTION)
        assert text.strip() == complete("qlora", AS_ASKED)["choices"][0]["text"].strip()
        assert re.search(r"\d+ tokens? \(usage of the last event\), the first after \d\.\d+ s", measured)

    def test_a_running_server_loads_a_random_adapter(self, served, vllm):
        folder = served / "random"
        words = ["stages/workers/random_lora.py", "results/embedded/base_model/model", folder, 1, 8, 42, "q_proj"]
        tree_of(served, "venv:client", *map(str, words))
        reference = ["-c", REFERENCE, "results/embedded/base_model/model", str(TOKENS), json.dumps(PROMPTS)]
        wanted = json.loads(tree_of(served, "venv:vllm", *reference, str(folder / "0")).splitlines()[-1])
        assert load_adapter("random-0", folder / "0") > 0
        vllms = {"url": URL, "adapters": {}}
        answers = streamed(served, ("vllm", vllms, "random-0"), ("vllm", vllms, None))
        assert [[one["text"] for one in each] for each in answers] == wanted[::-1]
        assert {one["tokens"] for each in answers for one in each} == {TOKENS}

    def test_vllm_knows_its_models_and_its_version(self, vllm):
        assert [model["id"] for model in answer("/v1/models")["data"]][:3] == ["base", "lora", "qlora"]
        assert "does not exist" in complete("dora", PROMPTS[0])["error"]["message"]
        assert vllm.engine() == (f"vLLM {answer('/version')['version']}", False)
