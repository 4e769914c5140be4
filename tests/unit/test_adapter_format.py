"""The form of an adapter in TensorRT-LLM: what we say of it against PEFT, and what we find wrong with it."""

import json

import numpy as np
import pytest
from conftest import REPO
from doubles import convert

from lib.core.stage import UserError
from lib.trtllm.adapter_format import MODULE_IDS, MODULES, expected, from_bf16, misfits, read_safetensors, verify


def write_adapter(folder, tensors, **config):
    """A PEFT adapter's folder: safetensors by hand, since this environment has no library for it."""
    folder.mkdir(parents=True)
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    text = json.dumps(header).encode()
    body = b"".join(array.tobytes() for array in tensors.values())
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random_adapter(folder, seed):
    """Any modules, layers, rank, sizes and scaling: (folder, its tensors, its config)."""
    rng = np.random.default_rng(seed)
    rank, alpha = int(rng.integers(1, 9)), int(rng.integers(1, 33))
    hidden, inner = (int(rng.integers(rank, 40)) for _ in range(2))
    modules = sorted(rng.choice(list(MODULES), int(rng.integers(1, 8)), replace=False).tolist())
    tensors = {}
    for layer in rng.permutation(int(rng.integers(1, 4))).tolist():
        for module in modules:
            part = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            into, out = {"down_proj": (inner, hidden)}.get(module, (hidden, inner if part == "mlp" else hidden))
            name = f"base_model.model.model.layers.{layer}.{part}.{module}.lora_"
            tensors[f"{name}B.weight"] = rng.normal(size=(out, rank)).astype("<f4")
            tensors[f"{name}A.weight"] = rng.normal(size=(rank, into)).astype("<f4")
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": bool(rng.integers(2)), "target_modules": modules}
    return write_adapter(folder, tensors, **config), tensors, config


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("seed", range(20))
def test_a_converted_adapter_gives_the_same_update(tmp_path, seed, dtype):
    folder, tensors, config = random_adapter(tmp_path / "adapter", seed)
    convert({"--in-file": folder, "--out-dir": tmp_path / "1", "--storage-type": dtype})
    found = verify(folder, tmp_path / "1", dtype)
    assert found["modules"] == sorted(MODULES[one] for one in config["target_modules"])
    assert (found["rank"], found["rows"]) == (config["r"], len(tensors) // 2)

    # A server multiplies B by A and scales nothing: that has to be PEFT's update of the layer.
    weights, table = (np.load(tmp_path / "1" / f"model.lora_{name}.npy")[0] for name in ("weights", "config"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    names = {MODULE_IDS[theirs]: ours for ours, theirs in MODULES.items()}
    for row, (module, layer, rank, _) in zip(weights.astype(np.float64), table, strict=True):
        key = next(key for key in tensors if f"layers.{layer}." in key and f"{names[module]}.lora_A" in key)
        a, b = tensors[key].astype(np.float64), tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
        split, end = a.size, a.size + b.size
        update = row[split:end].reshape(b.shape) @ row[:split].reshape(rank, -1)
        assert np.allclose(update, b @ a * scale, rtol=0.02, atol=0.02 * np.abs(b @ a * scale).max())
        assert not row[end:].any()


def spoil_order(weights, table):
    weights[0, :2], table[0, :2] = weights[0, 1::-1].copy(), table[0, 1::-1].copy()


def spoil_scale(weights, table):
    weights *= 2


def spoil_rank(weights, table):
    table[0, 0, 2] += 1


def spoil_module(weights, table):
    table[0, 0, 0] = 18


def spoil_dora(weights, table):
    table[0, 0, 3] = 1


def spoil_twice(weights, table):
    table[0, 1] = table[0, 0]


@pytest.fixture
def converted(tmp_path):
    """converted(spoil) verifies an adapter of 2 layers and 7 modules whose converted files went through `spoil`."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in (0, 1):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.mlp.{module}.lora_"
            tensors[f"{name}A.weight"] = rng.normal(size=(2, 6)).astype("<f4")
            tensors[f"{name}B.weight"] = rng.normal(size=(6, 2)).astype("<f4")
    folder = write_adapter(tmp_path / "adapter", tensors, r=2, lora_alpha=4, target_modules=list(MODULES))
    convert({"--in-file": folder, "--out-dir": tmp_path / "1", "--storage-type": "float16"})

    def run(spoil=None, dtype="float16"):
        paths = [tmp_path / "1" / f"model.lora_{name}.npy" for name in ("weights", "config")]
        arrays = [np.load(path) for path in paths]
        changed = spoil and spoil(*arrays)
        for path, array in zip(paths, changed or arrays, strict=True):
            np.save(path, array)
        return verify(folder, tmp_path / "1", dtype)

    return run


def test_the_rows_may_stand_in_any_order(converted):
    assert converted(spoil_order) == {
        "modules": sorted(MODULES.values()), "layers": 2, "rank": 2, "rows": 14, "width": 24,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_scale, "has other weights than the adapter"),
        (spoil_rank, "has rank 3, want 2, no DoRA"),
        (spoil_dora, "has rank 2, want 2, no DoRA"),
        (spoil_module, "module 18 of layer 0 stands there twice, or is not the adapter's"),
        (spoil_twice, "stands there twice"),
        (
            lambda weights, table: (weights, table[:, :, :3]),
            r"lora_config has the shape \(1, 14, 3\), want \(1, 14, 4\)",
        ),
        (lambda weights, table: (weights[:, :, :-1], table), r"lora_weights has the shape \(1, 14, 23\)"),
        (lambda weights, table: (weights, table.astype(np.int64)), "lora_config is int64, want int32"),
        (lambda weights, table: (weights.astype(np.float32), table), "are float32, want float16, the engine's own"),
    ],
)
def test_a_file_that_is_not_as_it_has_to_be_is_refused(converted, spoil, says):
    with pytest.raises(UserError, match=says):
        converted(spoil)


def test_bf16_is_read_from_its_bits(converted):
    values = np.array([1.0, -2.5, 3.0e38, 0.0], dtype=np.float32)
    assert (
        from_bf16((values.view(np.uint32) >> 16).astype(np.uint16)) == values.view(np.uint32) // 65536 * 65536
    ).any()
    back = from_bf16((values.view(np.uint32) >> 16).astype(np.uint16))
    assert np.allclose(back, values, rtol=2**-7)

    def to_bf16(weights, table):
        bits = (weights.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
        return bits.view("V2"), table

    assert converted(to_bf16, dtype="bfloat16")["rows"] == 14


def test_a_module_that_tensorrt_llm_has_no_place_for_is_named(tmp_path):
    tensors = {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 4), "<f4")}
    folder = write_adapter(tmp_path / "adapter", tensors, r=2, lora_alpha=4)
    with pytest.raises(UserError, match="lm_head.lora_A.weight has no place in TensorRT-LLM's form"):
        expected(folder)


def test_an_engine_needs_every_module_of_the_adapter():
    assert misfits(["q_proj"], 8, list(MODULE_IDS), 8) == []
    assert misfits(["q_proj", "up_proj"], 4, ["attn_q", "attn_v"], 8) == [
        "up_proj is mlp_gate there, which is not in engine.lora_target_modules"
    ]
    assert misfits(["q_proj"], 16, ["attn_q"], 8) == ["rank 16 is above engine.max_lora_rank 8"]
    assert misfits(["lm_head"], 4, ["attn_q"], 8)[0].startswith("lm_head has no place")


def test_converted_rows_make_the_update_that_peft_makes():
    # Written by PEFT 0.17.1 around a random Llama of 2 layers; deltas.npz is its get_delta_weight of every layer.
    folder = REPO / "tests" / "fixtures" / "adapter"
    rows, deltas = expected(folder), np.load(folder / "deltas.npz")
    assert len(rows) == len(deltas.files) == 14
    assert len(read_safetensors(folder / "adapter_model.safetensors")) == 28
    for name in deltas.files:
        layer, module = name.split(".")[-3], name.split(".")[-1]
        rank, row = rows[(MODULE_IDS[MODULES[module]], int(layer))]
        out, into = deltas[name].shape
        a, b = row[: rank * into].reshape(rank, into), row[rank * into :].reshape(out, rank)
        assert np.allclose(b @ a, deltas[name], atol=1e-6)
