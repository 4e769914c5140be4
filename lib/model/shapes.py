"""
The tensors of a model, from its config alone: those of a Llama, a gpt-oss and a GPT-2, in Hugging Face's
names. llm-jp-1.3b.json is the config of llm-jp/llm-jp-1.3b-v1.0 as models derived from it carry it, with the names that
transformers takes for all models (hidden_size for n_embd).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from lib.core.stage import UserError, read_json

FOLDER = Path("data/shapes")
# The kinds of tensors. A quantised model has its matrices in fewer bits and the rest in bf16.
PARTS = ("embedding", "positions", "attention", "mlp", "experts", "expert_biases", "router", "norms", "biases", "head")


@dataclass
class Tensor:
    """A tensor in Hugging Face's name; a matrix is (outputs, inputs), experts are (experts, inputs, outputs)."""

    name: str
    shape: tuple
    part: str

    @property
    def count(self):
        return math.prod(self.shape)


# The keys of config.json that decide a model's size.
DIMENSIONS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok",
              "layer_types", "sliding_window", "tie_word_embeddings", "attention_bias", "n_inner",
              "max_position_embeddings")  # fmt: skip


def dimensions(config):
    """The part of a config that this file and lib/analysis/roofline.py read."""
    return {name: config[name] for name in DIMENSIONS if name in config}


def read_shape(name, where, model_type=None):
    """The config in data/shapes/NAME.json; UserError names those there are (of `model_type`, where one is wanted).

    where: who asked, the beginning of the error: "params.yaml: base_model.shape is".
    """
    configs = {path.stem: read_json(path) for path in sorted(FOLDER.glob("*.json"))}
    fitting = [shape for shape, config in configs.items() if model_type in (None, config["model_type"])]
    if name not in fitting:
        raise UserError(f"{where} {name!r}; use one of {', '.join(fitting)}")
    return configs[name]


def head_size(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def linear_shapes(config):
    """{module name: (inputs, outputs)} of the linear layers in one Llama block."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return attention_shapes(config) | {
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def attention_shapes(config):
    """{module name: (inputs, outputs)} of the projections around the attention of one block."""
    hidden, head = config["hidden_size"], head_size(config)
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }


def experts(config):
    """(experts of a layer, experts that a token passes through); (1, 1) where no layer has experts."""
    return config.get("num_local_experts", 1), config.get("num_experts_per_tok", 1)


def windows(config):
    """For each layer, how many positions a token attends to at most, itself among them; None: to all."""
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    return [config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]


def tensors(config):
    """All tensors of the unquantised model, in order; the head is left out where it is the embedding table."""
    if config.get("model_type") == "gpt2":
        yield from gpt2_tensors(config)
        return
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield Tensor("model.embed_tokens.weight", (vocabulary, hidden), "embedding")
    for layer in range(config["num_hidden_layers"]):
        yield from layer_tensors(config, f"model.layers.{layer}")
    yield Tensor("model.norm.weight", (hidden,), "norms")
    if not config.get("tie_word_embeddings"):
        yield Tensor("lm_head.weight", (vocabulary, hidden), "head")


def layer_tensors(config, layer):
    """The tensors of one block; `layer` is the beginning of their names."""
    hidden = config["hidden_size"]
    yield Tensor(f"{layer}.input_layernorm.weight", (hidden,), "norms")
    for name, (inputs, outputs) in attention_shapes(config).items():
        yield Tensor(f"{layer}.self_attn.{name}.weight", (outputs, inputs), "attention")
        if config.get("attention_bias"):
            yield Tensor(f"{layer}.self_attn.{name}.bias", (outputs,), "biases")
    yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), "norms")
    yield from (moe_tensors if config.get("model_type") == "gpt_oss" else mlp_tensors)(config, layer)


def mlp_tensors(config, layer):
    """The inner layer of a Llama block."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        inputs, outputs = linear_shapes(config)[name]
        yield Tensor(f"{layer}.mlp.{name}.weight", (outputs, inputs), "mlp")


def moe_tensors(config, layer):
    """Sinks of the attention, router and experts of a gpt-oss block; gate and up are one matrix there."""
    hidden, inner, (count, _) = config["hidden_size"], config["intermediate_size"], experts(config)
    yield Tensor(f"{layer}.self_attn.sinks", (config["num_attention_heads"],), "biases")
    yield Tensor(f"{layer}.mlp.router.weight", (count, hidden), "router")
    yield Tensor(f"{layer}.mlp.router.bias", (count,), "biases")
    for name, inputs, outputs in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
        yield Tensor(f"{layer}.mlp.experts.{name}", (count, inputs, outputs), "experts")
        yield Tensor(f"{layer}.mlp.experts.{name}_bias", (count, outputs), "expert_biases")


def gpt2_tensors(config):
    """All tensors of a GPT-2. Its matrices are (inputs, outputs), each with a bias; q, k and v are one."""
    hidden, inner = config["hidden_size"], config["n_inner"]
    yield Tensor("transformer.wte.weight", (config["vocab_size"], hidden), "embedding")
    yield Tensor("transformer.wpe.weight", (config["max_position_embeddings"], hidden), "positions")
    matrices = (
        ("ln_1", (hidden,), "norms"),
        ("attn.c_attn", (hidden, 3 * hidden), "attention"),
        ("attn.c_proj", (hidden, hidden), "attention"),
        ("ln_2", (hidden,), "norms"),
        ("mlp.c_fc", (hidden, inner), "mlp"),
        ("mlp.c_proj", (inner, hidden), "mlp"),
    )
    layers = [f"transformer.h.{layer}.{name}" for layer in range(config["num_hidden_layers"]) for name, *_ in matrices]
    kinds = [kind for _ in range(config["num_hidden_layers"]) for _, *kind in matrices]
    for name, (shape, part) in [*zip(layers, kinds, strict=True), ("transformer.ln_f", ((hidden,), "norms"))]:
        yield Tensor(f"{name}.weight", shape, part)
        yield Tensor(f"{name}.bias", shape[-1:], "biases")


def parameters(config):
    """{part: parameters}; all of PARTS, 0 where the model has none."""
    counts = dict.fromkeys(PARTS, 0)
    for tensor in tensors(config):
        counts[tensor.part] += tensor.count
    return counts


INDEX = "model.safetensors.index.json"  # written last: where it stands, the weights are whole


def shape_file(model):
    """The config of a served shape, SHAPE:FORMAT."""
    return FOLDER / f"{model.split(':')[0]}.json"
