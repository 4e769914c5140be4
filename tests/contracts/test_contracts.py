"""What tools take in their pinned versions, and which of the writeups' own lines still hold."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import REPO, every_input
from contracts import FOLDER, BrokenContract, Contract, judge

from lib.bench.experiments import Bench, Point, with_experiment
from lib.bench.inputs import load_of
from lib.core.stage import load_yaml, read_params, results, write_json
from lib.serving.clients import CLIENTS, GenaiPerf, RandomBench
from lib.serving.load import Load
from lib.serving.servers import OURS, SERVERS, Vllm
from stages.client_accuracy import ClientAccuracy
from stages.multilora import Multilora, with_lora

WRITTEN = yaml.safe_load((REPO / "tests/fixtures/writeup_commands.yaml").read_text())
OPTIONS = """\
enable_attention_dp: false
cuda_graph_config:
  max_batch_size: 256
  enable_padding: true
moe_config:
  backend: TRITON
"""


@pytest.mark.parametrize("entry", WRITTEN, ids=lambda one: f"{one['seed']}-{one['contract']}")
def test_published_commands_hold_or_fail_as_recorded(entry):
    if "fails" in entry:
        with pytest.raises(BrokenContract, match=entry["fails"]):
            judge(entry)
    else:
        assert judge(entry) == entry["remarks"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_contract_has_a_source_and_its_flags_parse(path):
    contract = Contract(path.stem)
    for source in contract.data["source"]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source["repo"]) and source["path"] and source["commit"]
    values = {"int": "4", "float": "0.5", "str": "text", "flag": None}
    required = [
        word
        for flag, spec in contract.data["flags"].items()
        if spec.get("required")
        for word in (flag, values[spec["type"]])
    ]
    places = ["text" for _ in contract.data.get("positional", {})]
    for flag, spec in contract.data["flags"].items():
        value = str(spec["choices"][0]) if "choices" in spec else values[spec["type"]]
        words = [word for word in (flag, value) if word is not None]
        given, _ = contract.parse([*contract.data["program"], *places, *required, *words])
        assert given[flag] is not None and given[flag] is not False


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("trtllm-build", "--max_batchsize 4", "trtllm-build 1.0.0: unrecognized arguments: --max_batchsize 4"),
        ("trtllm-build", "--max_batch_size four", "--max_batch_size: invalid int value: 'four'"),
        ("trtllm-build", "--kv_cache_type pages", "--kv_cache_type: invalid choice: 'pages'"),
        ("trtllm-build", "--max_batch", "unrecognized arguments: --max_batch"),
        ("trtllm-build", "--use_inflight_batching", "not there any more; in-flight batching is chosen when serving"),
        ("hf_lora_convert", "-i a", "the following arguments are required: --out-dir"),
        ("launch_triton_server", "--exit_timeout 5", "perhaps than 1.0.0: do not use it"),
        ("trtllm-serve-1.0.0", "m --moe_backend TRITON", "give moe_config.backend in the options file"),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_tool_and_what_to_do(name, words, says):
    contract = Contract(name)
    with pytest.raises(BrokenContract, match=re.escape(says)) as raised:
        contract.parse([*contract.data["program"], *words.split()])
    assert len(str(raised.value).splitlines()) == 1


def test_a_type_in_capitals_is_taken_where_the_tool_takes_it():
    assert Contract("trtllm-build").parse("trtllm-build --kv_cache_type PAGED")[0]["--kv_cache_type"] == "paged"


def test_release_1_0_0_rejects_the_published_moe_backend():
    tree = yaml.safe_load(OPTIONS)
    Contract("trtllm-serve-gpt-oss-dev").check_options(tree)
    with pytest.raises(BrokenContract, match="moe_config: backend is 'TRITON'; use CUTLASS, CUTEDSL, WIDEEP"):
        Contract("trtllm-serve-1.0.0").check_options(tree)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"max_batch_size": 256}, "unknown key max_batch_size"),  # as the text prints it, without its indentation
        ({"cuda_graph_config": {"padding_enabled": True}}, "padding_enabled is not there any more; now enable_padding"),
        ({"cuda_graph_config": None}, "None is no mapping"),
        ({"enable_attention_dp": 0}, "enable_attention_dp is 0, want bool"),
        ({"cuda_graph_config": {"max_batch_size": True}}, "max_batch_size is True, want int"),
    ],
)
def test_an_option_that_the_server_would_reject_is_named(tree, says):
    with pytest.raises(BrokenContract, match=says):
        Contract("trtllm-serve-1.0.0").check_options(tree)


def test_a_comma_inside_a_filled_value_is_kept_by_a_backslash():
    text = "triton_backend:tensorrtllm,triton_max_batch_size:4,decoupled_mode:true,engine_dir:/e,"
    text += "logits_datatype:TYPE_FP16,batching_strategy:inflight_fused_batching,"
    text += "encoder_input_features_data_type:TYPE_FP16,gpu_device_ids:0\\,1"
    assert Contract("fill_template").fill("tensorrt_llm", text)[0]["gpu_device_ids"] == "0,1"
    with pytest.raises(BrokenContract, match="'1' is not key:value"):
        Contract("fill_template").fill("tensorrt_llm", text.replace("\\", ""))


PROFILES = ("weightless", "writeup")  # those whose vLLM is 0.11.0; the other runs its commands


@pytest.fixture(params=PROFILES)
def parameters(request, tmp_path, monkeypatch):
    """Bench, Multilora and ClientAccuracy of a profile, in a folder with two adapters and what every server is served
    from."""
    params = load_yaml(REPO / "params.yaml")
    for section, keys in load_yaml(REPO / f"profiles/{request.param}.yaml").items():
        params[section] |= keys
    params["profile"] = request.param
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    served = {"not_built": None, "adapters": {"1": "/a/1"}, "engine_is_stand_in": False, "world_size": 1, "command": []}
    for name, data in {
        "finetune/lora/adapter/adapter_config.json": {"r": 4},
        "finetune/qlora/adapter/adapter_config.json": {"r": 8},
        **{f"{stage}/{model}/{stage.removeprefix('trtllm_')}.json": served
           for stage in ("repository", "trtllm_serve") for model in ("base", "lora")},
    }.items():  # fmt: skip
        write_json(results(name), data)
    read = [read_params(section) for section in (Bench, Multilora, ClientAccuracy)]
    Path("params.yaml").write_text(f"profile: {request.param}\n")  # which is read again for every path
    return [*read, request.param]


def test_every_server_and_every_load_of_every_experiment_holds(parameters):
    seen, refused, vllm, genai_perf = set(), set(), Contract("vllm-serve"), Contract("genai-perf")
    bench, inputs = parameters[0], every_input(profile=parameters[3])
    for name in bench.definitions:
        p = with_experiment(bench, name)
        for server_name in {*p.servers, *(SERVERS if p.model in OURS else ())}:
            server, options = p.server(server_name, inputs)
            if isinstance(server, Vllm):
                try:
                    vllm.parse(server.command(options))
                except BrokenContract:
                    refused.add(server_name)
            for variant in bench.client_variants:
                for tokens, concurrency in zip(p.lengths, p.concurrency, strict=False):
                    point = Point(server_name, *tokens, concurrency, variant, 1)
                    load = load_of(p.with_variant(variant), server, point, Path("W"))
                    genai_perf.parse(GenaiPerf().command(load))
                    seen.add((type(server).__name__, p.model, variant))
    assert refused == {"vllm-gpt-oss-newer", "vllm-gpt-oss-newer-kv8"}  # as their names say
    assert len(seen) > 40 and {one[0] for one in seen} == {"Triton", "Vllm", "Trtllm"}


def test_the_servers_and_clients_of_the_studies_hold(parameters):
    _, several, ruler, profile = parameters
    plain = Vllm("base", every_input(profile=profile)).command(several.server_options)
    given = [Contract("vllm-serve").parse(with_lora(several, plain, rank))[0] for rank in several.ranks]
    assert [one["--max-lora-rank"] for one in given] == several.ranks
    lengths = {"input_tokens": ruler.input_tokens, "output_tokens": ruler.output_tokens}
    paths = {"prompts": Path("P"), "tokenizer": Path("T"), "folder": Path("F")}
    load = Load(url="http://a", model="base", concurrency=3, requests=8, warmup=2, seed=1, **lengths, **paths)
    given, _ = Contract("genai-perf").parse(CLIENTS["genai-perf"].command(load))
    assert [given[f"--{name}"] for name in ("concurrency", "request-count")] == [3, 8]
    words = RandomBench().command(load)[2:]
    given, _ = Contract("vllm-bench-serve").parse(["vllm", "bench", "serve", *words])
    assert (given["--random-input-len"], given["--num-prompts"]) == (ruler.input_tokens, 8)
    words = CLIENTS["vllm bench serve"].command(load)[2:]
    # Taken by our own starter of it where vLLM has no such flag yet.
    extra = words.index("--extra-body")
    given, _ = Contract("vllm-bench-serve").parse(["vllm", "bench", "serve", *words[:extra], *words[extra + 2 :]])
    assert [given[f"--{name}"] for name in ("max-concurrency", "num-prompts", "seed")] == [3, 8, 1]


def fake_program(folder, name):
    """A program that notes the words it gets, one call a line."""
    (folder / name).write_text(
        f'#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open("{folder}/calls", "a"))\n'
    )
    (folder / name).chmod(0o755)


def in_bash(folder, script):
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True, text=True
    )


COMMENTED = """\
vllm bench serve \\
--backend openai \\
--max-concurrency 16 \\ # <- concurrency = 16
--num-prompts 400 \\
--random-input-len 512
"""


def test_a_comment_after_a_backslash_ends_the_command_in_bash(tmp_path):
    fake_program(tmp_path, "vllm")
    assert in_bash(tmp_path, COMMENTED).returncode != 0
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert not [call for call in calls if "--num-prompts" in json.loads(call)]
    assert in_bash(tmp_path, re.sub(r" # <-.*", "", COMMENTED)).returncode == 0
    assert "--num-prompts" in json.loads((tmp_path / "calls").read_text().splitlines()[-1])


def test_the_echo_without_a_quote_is_a_syntax_error_in_bash(tmp_path):
    line = 'echo [シナリオ1] 負荷(同時実行数)とユースケース(入出力長)の組み合わせをテストします..."\n'
    assert "syntax error" in in_bash(tmp_path, line).stderr
    assert in_bash(tmp_path, line.replace("echo ", 'echo "')).returncode == 0


def test_genai_perfs_contract_is_what_its_installed_parser_takes():
    code = (
        "import json\nfrom genai_perf.parser import init_parsers\n"
        "profile = init_parsers()._subparsers._group_actions[0].choices['profile']\n"
        "print(json.dumps([[a.option_strings, a.nargs, [str(getattr(c, 'value', c)) for c in a.choices or []]]"
        " for a in profile._actions if '--help' not in a.option_strings]))"
    )
    command = ["containers/run", "venv:client", "python", "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = Contract("genai-perf").data["flags"]
    known = {frozenset([flag, *spec.get("aliases", [])]): spec for flag, spec in flags.items()}
    installed = {
        frozenset(names): (nargs, choices) for names, nargs, choices in json.loads(done.stdout.splitlines()[-1])
    }
    assert known.keys() == installed.keys()
    for names, (nargs, choices) in installed.items():
        assert [str(one) for one in known[names].get("choices", [])] == choices, names
        if nargs != 0:  # 0: a switch
            assert known[names].get("nargs") == nargs, names
