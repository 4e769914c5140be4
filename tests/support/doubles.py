"""
Doubles of TensorRT-LLM's tools: they take the words that the contracts allow, and write files of the right form.

    python3 doubles.py /app/examples/quantization/quantize.py --model_dir ...     (or any other program of PROGRAMS)

Nothing is computed and nothing is served: every engine and server says that it is a double, and counts no token. In
the double images they stand where the real tools do, and in for the stages that need torch; without a container engine
a PATH with shims leads to them (host_doubles).
"""

import compileall
import http.server
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import struct
import sys
import threading
from array import array
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parent))

import yaml
from contracts import BrokenContract, Contract

DOUBLE = "a double of the tests, no TensorRT-LLM\n"
PROGRAMS = {
    "quantize.py": "quantize",
    "convert_checkpoint.py": "convert_checkpoint",
    "trtllm-build": "trtllm-build",
    "hf_lora_convert.py": "hf_lora_convert",
    "fill_template.py": "fill_template",
}


def skeleton(folder):
    """The five config.pbtxt of the skeleton by the contract: every placeholder, every tensor, the ensemble's steps."""
    for model, facts in Contract("fill_template").data["models"].items():
        steps = "".join(map(step, facts.get("steps", [])))
        instances = "1" if model == "tensorrt_llm" else f"${{{model.removeprefix('tensorrt_llm_')}_instance_count}}"
        backend = "${triton_backend}" if model == "tensorrt_llm" else "python"
        batching = """dynamic_batching {
  max_queue_delay_microseconds: ${max_queue_delay_microseconds}
  default_queue_policy { max_queue_size: ${max_queue_size} }
}
"""
        lines = [
            f'name: "{model}"\nmax_batch_size: ${{triton_max_batch_size}}\n',
            f'platform: "ensemble"\nensemble_scheduling {{\n{steps}}}\n' if steps else f'backend: "{backend}"\n',
            "" if steps else f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]\n",
            batching if "max_queue_size" in facts["bare"] else "",
            "model_transaction_policy { decoupled: ${decoupled_mode} }\n" if "decoupled_mode" in facts["bare"] else "",
            *(tensor(kind, name, form) for kind in ("input", "output") for name, form in facts[kind].items()),
            *(f'parameters {{ key: "{key}" value: {{ string_value: "${{{key}}}" }} }}\n' for key in facts["quoted"]),
        ]
        write(folder / model, "config.pbtxt", "".join(lines))


def tensor(kind, name, form):
    """One tensor of a config.pbtxt from the contract's words for it."""
    data_type, dims, *marks = form.split()
    data_type = data_type if data_type.startswith("$") else f"TYPE_{data_type}"
    words = {"scalar": "reshape { shape: [] }", "optional": "optional: true", "ragged": "allow_ragged_batch: true"}
    marked = " ".join(words[mark] for mark in marks)
    return f'{kind} [ {{ name: "{name}" data_type: {data_type} dims: [ {dims} ] {marked} }} ]\n'


def step(one):
    """One step of the ensemble."""
    maps = "".join(
        f'    {kind}_map {{ key: "{inside}" value: "{outside}" }}\n'
        for kind in ("input", "output")
        for inside, outside in one[kind].items()
    )
    return f'  step {{\n    model_name: "{one["model"]}"\n    model_version: -1\n{maps}  }}\n'


def checkpoint(given):
    """quantize.py and convert_checkpoint.py: config.json and one file a rank."""
    if not Path(given["--model_dir"], "config.json").is_file():
        raise BrokenContract(f"{given['--model_dir']}: no model there")
    # The quantiser's own tests of a path: get_hf_config and get_model in quantize_by_modelopt.py, its data sets.
    for name, words in (("--model_dir", ("mpt", "vila")), ("--calib_dataset", ("cnn_dailymail", "scienceqa"))):
        if taken := [word for word in words if word in str(given.get(name, ""))]:
            raise BrokenContract(f"{name} {given[name]}: taken for {taken[0]}")
    awq = "int4_awq" in (given.get("--qformat"), given.get("--weight_only_precision"))
    if awq:
        rows = Path(given["--calib_dataset"], "train.jsonl").read_text().removesuffix("\n").split("\n")
        if not all(json.loads(row)["text"] for row in rows):
            raise BrokenContract(f"{given['--calib_dataset']}: no column text")
    out, tp = Path(given["--output_dir"]), given.get("--tp_size", 1)
    config = {
        "producer": {"name": "modelopt" if awq else "?"},
        "dtype": given["--dtype"],
        # The quantiser keeps the logits in the weights' type, the plain conversion makes them float32.
        "logits_dtype": given["--dtype"] if awq else "float32",
        "mapping": {"world_size": tp, "tp_size": tp},
    }
    write(out, "config.json", json.dumps(config))
    for rank in range(tp):
        write(out, f"rank{rank}.safetensors", DOUBLE)


def build(given):
    """trtllm-build: the engine's config.json as 1.0.0 writes it, as far as the stages read it, and one file a rank."""
    model = json.loads(Path(given["--checkpoint_dir"], "config.json").read_text())
    lora = {"max_lora_rank": given["--max_lora_rank"], "lora_target_modules": given["--lora_target_modules"]}
    limits = {name: given[f"--{name}"] for name in ("max_batch_size", "max_input_len", "max_seq_len")}
    plugins = {"lora_plugin": model["dtype"], "gemm_plugin": model["dtype"]}
    config = {
        "version": "1.0.0",
        "pretrained_config": model,
        "build_config": {**limits, "lora_config": lora, "plugin_config": plugins},
    }
    write(Path(given["--output_dir"]), "config.json", json.dumps(config))
    for rank in range(model["mapping"]["tp_size"]):
        write(Path(given["--output_dir"]), f"rank{rank}.engine", DOUBLE)


def convert(given):
    """hf_lora_convert.py: as its source goes over the tensors, row by row, in the order of the file."""
    folder, out = Path(given["--in-file"]), Path(given["--out-dir"])
    config = json.loads((folder / "adapter_config.json").read_text())
    content = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    ids = {"q_proj": 1, "k_proj": 2, "v_proj": 3, "o_proj": 4, "gate_proj": 5, "down_proj": 6, "up_proj": 7}
    pairs, table = {}, []
    for name, entry in json.loads(content[8 : 8 + length]).items():
        found = re.match(r".*\.layers\.([0-9]+)\.(self_attn|mlp)\.([a-z_]+)\.lora_(A|B)\.weight.*", name)
        if not found:
            print(f"no match {name}")
            continue
        first, last = entry["data_offsets"]
        values = array("f", content[8 + length + first : 8 + length + last])
        pairs.setdefault((int(found[1]), found[3]), {})[found[4]] = (values, entry["shape"])
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    rows = []
    for (layer, module), pair in pairs.items():
        rows.append([*pair["A"][0], *(value * scale for value in pair["B"][0])])
        table.append([ids[module], layer, pair["A"][1][0], 0])
    width = max(len(row) for row in rows)
    values = [value for row in rows for value in row + [0.0] * (width - len(row))]
    form, descr = {"float16": ("e", "<f2"), "float32": ("f", "<f4")}[given["--storage-type"]]
    out.mkdir(parents=True, exist_ok=True)
    save(out / "model.lora_weights.npy", descr, (1, len(rows), width), struct.pack(f"<{len(values)}{form}", *values))
    places = [number for row in table for number in row]
    save(out / "model.lora_config.npy", "<i4", (1, len(rows), 4), struct.pack(f"<{len(places)}i", *places))


def save(path, descr, shape, content):
    """A NumPy file, without NumPy: the double images have none."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content)


def fill(given):
    """fill_template.py: only what the file has, the rest left as it is."""
    path = Path(given["file_path"])
    values, _ = Contract("fill_template").fill(path.parent.name, given["substitutions"])
    path.write_text(
        Template(path.read_text()).safe_substitute({"max_queue_size": 0, "max_queue_delay_microseconds": 0} | values)
    )


def serve_triton(words):
    """mpirun and the tritonserver of every rank: the words by the contract, then healthy until it is told to stop."""
    if words[:1] != ["--allow-run-as-root"] or words[-1] != ":":
        raise BrokenContract(f"mpirun: {words}")
    ports = set()
    for part in " ".join(words[1:-1]).split(" : "):
        program = part.split()
        if program[:3] != ["-n", "1", "/opt/tritonserver/bin/tritonserver"]:
            raise BrokenContract(f"mpirun: {program[:3]}")
        given, _ = Contract("tritonserver").parse(["tritonserver", *program[3:]])
        ports |= {given["--http-port"], given["--metrics-port"]}
        for config in Path(given["--model-repository"]).glob("*/config.pbtxt"):
            if re.search(r"\$\{", re.sub(r'"[^"\n]*"', "", config.read_text())):
                raise BrokenContract(f"tritonserver: {config} cannot be parsed")
    listen(ports)


def serve_vllm(words):
    """vLLM's server: the words by the contract."""
    given, _ = Contract("vllm-serve").parse(["python3", "-m", "vllm.entrypoints.openai.api_server", *words])
    if not Path(given["--model"], "config.json").is_file():
        raise BrokenContract(f"{given['--model']}: no model there")
    listen({given["--port"]})


# A server's counters: requests, and no token ever.
COUNTERS = """\
nv_llm_input_token_len_sum 0
nv_llm_output_token_len_sum 0
nv_llm_output_token_len_count {asked}
vllm:prompt_tokens_total 0
vllm:generation_tokens_total 0
vllm:request_success_total {asked}
"""


def listen(ports):
    """Answer on these ports as both servers do when they are ready, until SIGTERM."""
    asked = itertools.count(1)

    class Double(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            said = {"/v2": json.dumps({"version": DOUBLE.strip()}), "/version": json.dumps({"version": DOUBLE.strip()}),
                    "/metrics": COUNTERS.format(asked=next(asked)), "/health": "", "/v2/health/ready": ""}  # fmt: skip
            self.send_response(200 if self.path in said else 404)
            self.end_headers()
            self.wfile.write(said.get(self.path, "").encode())

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    *others, last = (http.server.ThreadingHTTPServer(("127.0.0.1", port), Double) for port in ports)
    for server in others:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    last.serve_forever()


def measure(words):
    """genai-perf: the words by the contract, the prompts that it gets, and a file with requests and nothing else."""
    given, _ = Contract("genai-perf").parse(["genai-perf", *words])
    asked = given["--request-count"] + given.get("--warmup-request-count", 0)
    if len(Path(given["--input-file"]).read_text().splitlines()) < asked:
        raise BrokenContract(f"{given['--input-file']}: fewer than {asked} prompts")
    counted = {"request_count": {"unit": "count", "avg": given["--request-count"]},
               "request_throughput": {"unit": "requests/sec", "avg": 0.0}}  # fmt: skip
    write(Path(given["--artifact-dir"]) / "double", "profile_export_genai_perf.json", json.dumps(counted))


def write_prompts(words):
    """stages/workers/prompts.py: as many lines, not of the length asked for."""
    _, _, count, _, out = words
    write(Path(out).parent, Path(out).name, "".join(f'{{"text": "{n}"}}\n' for n in range(int(count))))


def run_stage(name, words):
    """A stage that needs torch: what later stages read of it, without a number of its own."""
    profile = yaml.safe_load(Path("params.yaml").read_text())["profile"]
    out = Path("results") / profile / "/".join([name, *words])
    write(out, "double.json", json.dumps({"double": DOUBLE, "package": package(), "lock": os.environ.get("REPO_LOCK")}))
    if name == "base_model":
        write(out / "model", "config.json", Path("data/shapes/llama-2-7b.json").read_text())
        facts = {"name": "a double", "weights": "none", "parameters": 0}
        write(out, "metrics.json", json.dumps(facts))
    if name == "dataset":
        rows = {"train": 2, "validation": 1}
        for variant in ("corrected", "published"):
            for part, count in rows.items():
                write(out / variant, f"{part}.jsonl", '{"prompt": "[INST] 犬 [/INST]", "completion": " 猫"}\n' * count)
        tokens = {part: [64] * count for part, count in rows.items()}
        write(out, "tokens.json", json.dumps({"corrected": tokens, "published": tokens}))
    if name == "finetune":
        shutil.copytree("tests/fixtures/adapter", out / "adapter")


def package():
    """What lies on the image, by the name that the tests gave it."""
    try:
        return importlib.import_module("tinypkg").VALUE
    except ModuleNotFoundError:
        return None


def python(words):
    """python or python3 with what the image would run: a stage, a script of ours, vLLM."""
    if words[0] == "-m" and words[1].startswith("stages."):
        run_stage(words[1].removeprefix("stages."), words[2:])
    elif words[0] == "-m":
        serve_vllm(words[2:])
    else:
        write_prompts(words[1:])


TOOLS = {"quantize": checkpoint, "convert_checkpoint": checkpoint, "trtllm-build": build, "hf_lora_convert": convert,
         "fill_template": fill}  # fmt: skip
OTHERS = {"mpirun": serve_triton, "genai-perf": measure, "python": python}


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def double_image(root):
    """The files of an image with the doubles at the real tools' places, under `root`; Python is copied from here."""
    here, python = Path(__file__).resolve().parent, Path(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Small, for it is packed and unpacked; modules that would need libraries of this machine are left out too.
    unused = ("test", "unittest", "idlelib", "lib2to3", "tkinter", "turtle*", "pydoc_data", "ensurepip", "distutils",
              "asyncio", "multiprocessing", "xml*", "config-*", "site-packages", "*.opt-?.pyc", "_codecs_*", "_test*",
              "_sqlite3*", "_decimal*", "_yaml*", "zlib*.so", "_hashlib*", "_ssl*")  # fmt: skip
    unused = shutil.ignore_patterns(*unused)
    home = root / str(python).lstrip("/")
    shutil.copytree(python / "lib" / version, home / "lib" / version, ignore=unused)
    shutil.copytree(Path(yaml.__file__).parent, home / "lib" / version / "yaml", ignore=unused)
    shutil.copytree(here.parent / "contracts", root / "opt/contracts")
    (root / "opt/doubles").mkdir()
    for name in ("doubles.py", "contracts.py"):
        shutil.copy2(here / name, root / "opt/doubles" / name)
    compileall.compile_dir(root / "opt/doubles", quiet=1)  # every start of a container would do it again
    skeleton(root / "app/all_models/inflight_batcher_llm")
    real = python / "bin" / version
    scripts = ("examples/quantization/quantize.py", "examples/models/core/llama/convert_checkpoint.py",
               "examples/hf_lora_convert.py", "tools/fill_template.py")  # fmt: skip
    code = 'import runpy, sys\nsys.argv.insert(0, "")\nrunpy.run_path("/opt/doubles/doubles.py", run_name="__main__")\n'
    for script in scripts:
        write((root / "app" / script).parent, Path(script).name, code)
    for name in ("trtllm-build", "mpirun", "genai-perf"):
        write(root / "bin", name, f'#!/bin/sh\nexec {real} /opt/doubles/doubles.py {name} "$@"\n')
    doubled = (
        f'"-m stages."*|"-m vllm."*|stages/workers/prompts.py*) exec {real} /opt/doubles/doubles.py python "$@" ;;'
    )
    for name in ("python", "python3"):
        write(root / "bin", name, f'#!/bin/sh\ncase "$1 $2" in {doubled} *) exec {real} "$@" ;; esac\n')
    for program in (root / "bin").iterdir():
        program.chmod(0o755)
    # With the libraries that Python's own modules load.
    modules = (python / "lib" / version / "lib-dynload").glob("binascii*.so")
    return {str(path): str(path).lstrip("/") for path in (real, *modules)}


def host_doubles(folder):
    """Variables under which python3, trtllm-build, cp and nvidia-smi lead to the doubles, without a container."""
    skeleton(folder / "skeleton")
    real, here = sys.executable, Path(__file__).resolve()
    shims = {
        "python3": f'case "$1" in /app/*) exec {real} {here} "$@" ;; *) exec {real} "$@" ;; esac',
        "trtllm-build": f'exec {real} {here} trtllm-build "$@"',
        "cp": f'if [ "$2" = /app/all_models/inflight_batcher_llm ]; then exec /bin/cp -r {folder}/skeleton "$3"; fi\n'
        'exec /bin/cp "$@"',
        "nvidia-smi": 'case "$*" in *compute_cap*) echo "${GPU:-9.0}" ;; *) exit 9 ;; esac',
    }
    for name, script in shims.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def check_libraries():
    """As the real tools in their images, which load TensorRT as they start: bash sets where it lies, no other shell."""
    in_image = Path(__file__).is_relative_to("/opt/doubles")
    if in_image and "/usr/local/tensorrt/lib" not in os.environ.get("LD_LIBRARY_PATH", ""):
        sys.exit("ImportError: libnvinfer.so.10: cannot open shared object file: No such file or directory")


def main():
    check_libraries()
    program, *words = sys.argv[1:]
    if program == "trtllm-build" and words == ["--help"]:
        print("\n".join(Contract(program).data["flags"]))
        return
    try:
        if program in OTHERS:
            OTHERS[program](words)
            return
        name = PROGRAMS[Path(program).name]
        TOOLS[name](Contract(name).parse([*Contract(name).data["program"][:-1], program, *words])[0])
    except BrokenContract as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
