"""
The report's sections on streaming and on several adapters. fixtures/studies/streaming is real output of the embedded
profile on two busy cores, its answers cut short; what is shown of several adapters is made of the stage's own pieces.
"""

import json

from conftest import REPO

from lib.claims.claims import load_claims
from lib.claims.settle import settle
from lib.core.stage import read_json, write_json
from lib.multilora.isolation import compare_answers
from lib.report import streaming_and_adapters

FIXTURES = REPO / "tests/fixtures/studies"
ENGINE = "Transformers 5.23.0 continuous batching behind Triton 2.51.0 (stand-in for TensorRT-LLM)"


def blocks(section, folder):
    return list(section({"runs": {"mine": {"folder": str(folder)}}}))


def tables(found):
    return [[dict(zip(header, row, strict=True)) for row in rows] for kind, header, rows in
            (block for block in found if block[0] == "table")]  # fmt: skip


def test_each_prompt_is_shown_for_each_client():
    data = read_json(FIXTURES / "streaming/triton/streaming.json")
    prompts, _ = tables(blocks(streaming_and_adapters.streaming, FIXTURES))
    assert {row["engine"] for row in prompts} == {ENGINE}
    assert [(row["client"], row["prompt"]) for row in prompts] == [
        (client, name) for client in ("triton", "triton-stream") for name in ("who", "potato", "contest")
    ]
    assert {row["first token s"] for row in prompts[:3]} == {"—"}
    assert float(prompts[3]["first token s"]) == round(data["triton-stream"][0]["ttft_seconds"], 4)


def test_the_wait_behind_one_bls_instance_stands_beside_two():
    _, cases = tables(blocks(streaming_and_adapters.streaming, FIXTURES))
    one, two = (row for row in cases if row["concurrency"] == "2" and row["instances"] in ("1", "2"))
    wait = [float(row["first token ms"].replace(",", "")) for row in (one, two)]
    assert wait[0] > 10 * wait[1]
    assert {row["model"] for row in cases if row["instances"] == "—"} == {"ensemble"}


def several(tmp_path, **changes):
    """multilora.json of a run whose second adapter answers as the first."""
    answers = [(None, "base", "base"), ("lora", "one", "one"), ("qlora", "one", "two")]
    rows = [{"prompt": "p", "adapter": who, "together": both, "alone": alone} for who, both, alone in answers]
    point = {"adapters": 0, "rank": None, "popularity": None, "output_tokens_per_second": 40.0, "resident_mib": None}
    data = {
        "engine": "vLLM 0.32.0", "base_model_bytes": 269e6, "trained_adapter_bytes": 4.9e6,
        "proof": {"float32": compare_answers(rows)}, "points": [{"variant": "none", **point}], **changes,
    }  # fmt: skip
    write_json(tmp_path / "multilora/vllm/multilora.json", data)
    return blocks(streaming_and_adapters.multilora, tmp_path)


def test_the_proof_counts_a_request_to_another_adapter(tmp_path):
    (proof,), _ = tables(several(tmp_path))
    assert proof["as from its adapter alone"] == "2 of 3"
    assert proof["other than with the adapter off"] == "2 of 2"


def test_adapter_costs_have_dashes_if_not_measured(tmp_path):
    found = several(tmp_path)
    _, (point,) = tables(found)
    assert (point["variant"], point["tokens/s"], point["server MiB"], point["popularity"]) == ("none", "40", "—", "—")
    assert "mine: 4.9 MB beside 269 MB." in json.dumps(found)


def adapter_points(*counts):
    """Points of a study of rank 8: each number of adapters takes a tenth of the speed."""
    facts = {"resident_mib": None, "ttft_ms_p50": 90.0}
    none = {
        "variant": "none",
        "adapters": 0,
        "rank": None,
        "popularity": None,
        "output_tokens_per_second": 50.0,
        **facts,
    }
    return [none, none | {"variant": "unused", "rank": 8, "output_tokens_per_second": 45.0}] + [
        {"variant": "adapters", "adapters": count, "rank": 8, "popularity": popularity,
         "output_tokens_per_second": 40.0 - 4 * place, **facts}
        for place, count in enumerate(counts) for popularity in ("uniform", "skewed")[: 2 if count > 1 else 1]
    ]  # fmt: skip


def test_the_speed_by_adapters_is_drawn_from_three_on(tmp_path):
    base = {"name": "Tiny", "weights": "random", "parameters": 7}
    few = several(tmp_path, points=adapter_points(1, 4), base_model=base)
    assert [block for block in few if block[0] == "figure"] == []
    more = several(tmp_path, points=adapter_points(1, 4, 16), base_model=base)
    (figure,) = (block for block in more if block[0] == "figure")
    assert figure[1] == "adapters-mine" and "Tiny on vLLM 0.32.0" in figure[3]
    speed, wait = figure[2].figure.axes
    uniform, skewed, unused, none = (list(line.get_ydata()) for line in speed.lines)
    assert (uniform, skewed) == ([40.0, 36.0, 32.0], [36.0, 32.0])
    assert (set(unused), set(none)) == ({45.0}, {50.0})
    assert speed.get_title(loc="left").startswith("output tokens/s") and wait.get_xlabel() == "adapters"


def test_a_run_of_vllm_never_answers_for_tensorrt_llm(tmp_path):
    point = {"variant": "adapters", "adapters": 1, "rank": 8, "popularity": "uniform", "load_seconds": 0.2}
    several(tmp_path, points=[point | {"output_tokens_per_second": 40.0}])
    claims = {claim.id: claim for claim in load_claims(REPO / "data/claims")[1]}
    for name in ("multi-at-once", "multi-ablation", "lowrank-on-demand"):
        settled = settle(claims[name], 0.1, {"mine": tmp_path})
        assert settled["verdict"] == "confirmed by source"
        assert settled["outcomes"][0]["verdict"] == "not comparable"


def test_triton_alone_has_a_proof_and_no_costs(tmp_path):
    assert len(tables(several(tmp_path, points=[]))) == 1


def test_missing_sections_name_their_commands(tmp_path):
    assert blocks(streaming_and_adapters.streaming, tmp_path)[1:] == [
        ("text", "Not measured yet. `make streaming` measures it.")
    ]
    nothing = several(tmp_path, engine=None)
    assert nothing[1:] == [("text", "Not measured yet. `make multilora` measures it.")]
