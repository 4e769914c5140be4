"""
A folder that vLLM serves, with a model of a known shape and random weights: python -m stages.workers.random_weights
SHAPE FORMAT FOLDER SEED writes all of it (needs torch); SEED none leaves the weights out, for vLLM's own
--load-format dummy.

Its vocabulary is words: token 17 is the text "w17". So whatever the model answers is as many tokens when it is
tokenised again, and every token reaches the client the moment it is made, which random tokens of a real vocabulary do
not (half of a character waits for the other half, two tokens may be spelt as one).

Why not always dummy weights: vLLM 0.25 to 0.32 draw every floating point tensor from +-0.001, norms and biases too, and
leave packed 4-bit weights as they find the memory. In a mixture of experts the router's bias then far outweighs what
the token adds: nearly all tokens go to the same experts, few experts are read, and a large batch is faster than any
real model could be. Here norms are 1, biases 0 and matrices normal, which routes almost evenly (a test holds it).
"""

import json
import sys
from pathlib import Path

from lib.core.stage import UserError, run, write_json
from lib.model.shapes import INDEX, read_shape, tensors

# Spread of the random weights: that of every matrix at the start of training (initializer_range of both families).
SPREAD = 0.02
# GPTQ as AutoGPTQ writes it: 4 bits, one fp16 scale and one zero point of 4 bits for 128 weights. Symmetric: all zero
# points are 8, stored less one. Which group a weight is in is random, as activation order (desc_act) leaves it; without
# desc_act kernels take the groups in order and read no g_idx.
GROUP, ZEROS = 128, 0x77777777
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "lm_head": False}
# MXFP4: 32 weights of 4 bits (E2M1) share one power of two, stored with 127 added; OCP Microscaling Formats (MX) 1.0.
BLOCK = 32
# The root mean square of 16 equally likely codes: -8 to 7 in int4, +-(0 0.5 1 1.5 2 3 4 6) in E2M1.
INT4_RMS, E2M1_RMS = 4.64, 2.93
FORMATS = ("bf16", "fp8", "int4-g128", "mxfp4")


def check(config, weights):
    """UserError where a shape cannot be had in a format."""
    if weights not in FORMATS:
        raise UserError(f"weight format {weights!r} is not known; use one of {', '.join(FORMATS)}")
    moe = config["model_type"] == "gpt_oss"
    if weights == "mxfp4" and not moe or weights == "int4-g128" and moe:
        raise UserError(f"{weights} is not made for {config['model_type']}; mxfp4 is for gpt_oss, int4-g128 for llama")


def options(weights, seed):
    """vLLM's words for such a folder: FP8 is made of bf16 weights while they are loaded."""
    return ["--quantization", "fp8"] * (weights == "fp8") + ["--load-format", "dummy"] * (seed is None)


def write(config, weights, folder):
    """Config, generation config and tokenizer of a model in a format; no weights."""
    check(config, weights)
    folder = Path(folder)
    kept = {name: value for name, value in config.items() if name != "quantization_config"}
    quantised = {"int4-g128": GPTQ, "mxfp4": config.get("quantization_config")}.get(weights)
    write_json(folder / "config.json", kept | ({"quantization_config": quantised} if quantised else {}))
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    write_tokenizer(config["vocab_size"], folder)


def write_tokenizer(vocabulary, folder):
    """Token n is the word "wn"; every other word is token 0. No token is special: any id of an answer is text.

    A chat is its messages, one after the other: no token is added.
    """
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(vocabulary)}, "unk_token": "w0"},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
        },
    )


def write_weights(config, weights, folder, seed):
    """Safetensors of random weights beside the config, a file a layer, in the format that vLLM reads; made on a GPU
    where there is one. The same seed gives the same weights on the same kind of device."""
    import torch
    from safetensors.torch import save_file

    folder, device = Path(folder), "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    files, where = {}, {}
    for tensor in tensors(config):
        words = tensor.name.split(".")
        file = f"layer-{words[2]}.safetensors" if words[1] in ("layers", "h") else f"{words[-2]}.safetensors"
        files.setdefault(file, []).append(tensor)
    total = 0
    for file, inside in files.items():
        arrays = {name: array.cpu() for tensor in inside for name, array in stored(tensor, weights, generator).items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def stored(tensor, weights, generator):
    """{name in the file: tensor}: one of the model's tensors with random values, as the format has it."""
    if weights == "mxfp4" and tensor.part == "experts":
        return mxfp4(tensor, generator)
    if weights == "int4-g128" and tensor.part in ("attention", "mlp"):
        return gptq(tensor, generator)

    import torch

    like = {"device": generator.device, "dtype": torch.bfloat16}
    if tensor.part == "norms":
        return {tensor.name: torch.ones(tensor.shape, **like)}
    if tensor.part in ("biases", "expert_biases"):
        return {tensor.name: torch.zeros(tensor.shape, **like)}
    # A token's own embedding, and not what the layers add to it, decides where it is routed.
    spread = 1.0 if tensor.part == "embedding" else SPREAD
    return {tensor.name: torch.randn(tensor.shape, generator=generator, **like) * spread}


def integers(shape, low, high, kind, generator):
    import torch

    return torch.randint(low, high, shape, dtype=kind, generator=generator, device=generator.device)


def mxfp4(tensor, generator):
    """Experts as the published gpt-oss has them: two weights a byte, a scale for 32, outputs before inputs."""
    import torch

    count, inputs, outputs = tensor.shape
    # The power of two nearest to SPREAD / E2M1_RMS.
    scale = torch.full((count, outputs, inputs // BLOCK), 127 - 7, dtype=torch.uint8)
    blocks = integers((count, outputs, inputs // BLOCK, BLOCK // 2), 0, 256, torch.uint8, generator)
    return {f"{tensor.name}_blocks": blocks, f"{tensor.name}_scales": scale}


def gptq(tensor, generator):
    """A matrix as GPTQ has it: eight weights in an int32, along the inputs."""
    import torch

    outputs, inputs = tensor.shape
    name = tensor.name.removesuffix(".weight")
    return {
        f"{name}.qweight": integers((inputs // 8, outputs), -(2**31), 2**31, torch.int32, generator),
        f"{name}.qzeros": torch.full((inputs // GROUP, outputs // 8), ZEROS, dtype=torch.int32),
        f"{name}.scales": torch.full((inputs // GROUP, outputs), SPREAD / INT4_RMS, dtype=torch.float16),
        f"{name}.g_idx": torch.randperm(inputs, generator=generator, device=generator.device).int() // GROUP,
    }


def main():
    if len(sys.argv) != 5 or sys.argv[4] != "none" and not sys.argv[4].isdigit():
        raise UserError(
            "usage: python -m stages.workers.random_weights SHAPE FORMAT FOLDER SEED, with SEED none for no weights"
        )
    shape, weights, folder, seed = sys.argv[1:]
    config = read_shape(shape, "the shape is")
    write(config, weights, folder)
    if seed != "none":
        write_weights(config, weights, folder, int(seed))


if __name__ == "__main__":
    run(main)
