"""The stage streaming: what it asks, what it makes of the answers; the clients, on what vLLM really sent."""

import io
import re

import pytest
from conftest import REPO, left_out, only_error, run_in

from lib.core.stage import UserError
from lib.serving.servers import lora_request
from lib.streaming import http
from lib.streaming.triton import triton_inputs
from stages.streaming import BLS, Streaming, bls_cases, bls_loads, by_case, by_prompt, write_bls_models
from stages.workers import stream_client

RECORDED = REPO / "tests" / "fixtures" / "streams"
P = Streaming(["triton"], "data/streaming_prompts.json", 32, 3, [1, 2], [1, 2], 3, 16, 42, 300, 600, [])


def answered(first, seconds, tokens=4, text="a"):
    return {"ttft_seconds": first, "seconds": seconds, "tokens": tokens, "text": text, "stopped": False}


# What is made of the answers.


def test_the_first_answer_to_a_prompt_is_warm_up():
    told = {"answers": [answered(9, 9), answered(8, 8), *[answered(t, 2 * t) for t in (0.1, 0.5, 0.3, 0.6, 0.2, 0.7)]]}
    rows = {row["prompt"]: row for row in by_prompt("vllm", told, ["who", "potato"])}
    assert [rows["who"][f"ttft_seconds{end}"] for end in ("", "_min", "_max")] == [0.2, 0.1, 0.3]
    assert [rows["potato"][f"seconds{end}"] for end in ("", "_min", "_max")] == [1.2, 1.0, 1.4]
    assert rows["who"]["tokens_per_second"] == pytest.approx(4 / 0.4)


def test_a_client_without_streaming_has_no_first_token_time():
    told = {"answers": [answered(2, 2, tokens=None), answered(3, 3, tokens=None)]}
    (row,) = by_prompt("triton", told, ["who"])
    assert row["ttft_seconds"] is None and row["tokens_per_second"] is None and row["seconds"] == 3


def test_each_instance_count_is_a_case_at_each_concurrency():
    assert [case[0] for case in bls_cases(P)] == [
        "ensemble-1",
        "bls_1-1",
        "bls_2-1",
        "ensemble-2",
        "bls_1-2",
        "bls_2-2",
    ]
    loads = bls_loads(P, "model", "hello")
    # Of each case a round to warm up, and three measured ones of every stream; the length is pinned.
    assert [(len(load["requests"]), load["concurrency"]) for load in loads[-2:]] == [(2, 2), (6, 2)]
    assert {(one["min_tokens"], one["max_tokens"]) for load in loads for one in load["requests"]} == {(16, 16)}


def test_the_rate_of_a_case_is_all_tokens_over_the_wall_time():
    told = [
        {"wall_seconds": 4.0, "answers": [answered(0.1, 1)] * (2 * case[3])} for case in bls_cases(P) for _ in (0, 1)
    ]
    row = by_case(P, told)[-1]
    assert (row["case"], row["instances"], row["requests"], row["tokens_per_second"]) == ("bls_2-2", 2, 4, 16.0)
    assert row["ttft_ms"] == 100.0


def test_bls_models_differ_in_their_name_and_their_count_alone(tmp_path):
    source = REPO / "containers" / "triton" / "model_repository" / BLS
    filled = tmp_path / "source"
    (filled / "1").mkdir(parents=True)
    text = (source / "config.pbtxt").read_text().replace("${max_batch_size}", "8").replace("${instances}", "4")
    (filled / "config.pbtxt").write_text(text)
    write_bls_models(filled, tmp_path / "models", [1, 16])
    for count in (1, 16):
        written = (tmp_path / "models" / f"{BLS}_{count}" / "config.pbtxt").read_text()
        assert f'name: "{BLS}_{count}"' in written and f"count: {count} " in written
        back = written.replace(f"{BLS}_{count}", BLS).replace(f"count: {count} ", "count: 4 ")
        assert back == text
    (filled / "config.pbtxt").write_text(text.replace("count: 4", ""))
    with pytest.raises(UserError, match="want one name and one count in it, found 1 and 0"):
        write_bls_models(filled, tmp_path / "again", [1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"servers": ["trition"]}, "streaming.servers has 'trition'; use triton, vllm"),
        ({"repeats": 0}, "streaming.repeats is 0; use 1 or more"),
        ({"bls_instances": [0]}, r"streaming.bls_instances is \[0\]; use whole numbers from 1"),
    ],
)
def test_wrong_parameters_say_what_to_mend(values, message):
    with pytest.raises(UserError, match=message):
        Streaming(**{**P.__dict__, **values})


def test_a_server_that_is_left_out_stands_as_not_measured(tree):
    written = left_out(tree, "streaming")
    assert (written["engine"], written["not_measured"]) == (None, "params.yaml: streaming.servers has no vllm")


def test_the_usage_names_the_servers(tree):
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.streaming", "tgi", "venv:a", "venv:b")
    assert only_error(done).endswith("with SERVER one of triton, vllm")


# The clients.


class Played(io.BytesIO):
    """What a server sent, to be read as an open response."""


def sse(name, monkeypatch, **request):
    """The pieces that the OpenAI client yields of a recorded stream, and the body that it sent."""
    sent = []

    def post(url, body):
        sent.append(body)
        return Played(b'{"data": [{"id": "base"}]}' if body is None else (RECORDED / name).read_bytes())

    monkeypatch.setattr(stream_client, "post", post)
    asked = {
        "prompt": "犬",
        "adapter": None,
        "max_tokens": 8,
        "min_tokens": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 1,
    }
    client = stream_client.OpenAi("http://localhost", "model", {})
    return list(client.pieces(http.Request(**{**asked, **request}))), sent[-1]


def test_a_vllm_stream_ends_with_a_token_count(monkeypatch):
    pieces, body = sse("vllm.sse", monkeypatch)
    texts, counts = zip(*pieces, strict=True)
    assert re.search("[ぁ-ん]", "".join(texts)) and "\ufffd" not in "".join(texts)
    assert counts[-1] == 24 and set(counts[:-1]) == {None}
    assert body["model"] == "base" and body["stream"] and body["stream_options"] == {"include_usage": True}
    assert "min_tokens" not in body


def test_vllm_and_trtllm_serve_name_adapters_differently(monkeypatch):
    _, body = sse("vllm.sse", monkeypatch, adapter="lora", min_tokens=8)
    assert (body["model"], body["min_tokens"], body["ignore_eos"]) == ("lora", 8, True)
    client = stream_client.TrtLlm("http://localhost", "model", {"lora": lora_request(1, "/adapters/lora")})
    assert client.chosen("lora") == {
        "model": "base",
        "lora_request": {"lora_name": "1", "lora_int_id": 1, "lora_path": "/adapters/lora"},
    }


def test_triton_gets_no_task_id_for_the_base_model():
    asked = http.Request("a", None, 8, 0, 0.0, 1.0, 1)
    assert triton_inputs(asked, {}) == {
        "max_tokens": 8,
        "seed": 1,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 0.0,
    }
    drawn = http.Request("a", "qlora", 8, 4, 0.7, 0.9, 1)
    assert triton_inputs(drawn, {"lora": 1, "qlora": 2}) == {
        "max_tokens": 8, "seed": 1, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_tokens": 4, "lora_task_id": 2,
    }  # fmt: skip


def test_ctrl_c_ends_the_answer_and_keeps_what_came():
    def pieces():
        yield "a", 1
        raise KeyboardInterrupt

    told = stream_client.timed(pieces())
    assert (told["text"], told["tokens"], told["stopped"]) == ("a", 1, True)


def test_an_address_without_a_server_is_one_line():
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/models: .*refused"):
        stream_client.OpenAi("http://127.0.0.1:9", "model", {})
