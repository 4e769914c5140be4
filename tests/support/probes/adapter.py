"""adapter.py VARIANT...: what each saved adapter is once peft has loaded it on the base it was trained on."""

import json
import sys

from peft import PeftModel

from lib.core.stage import results
from lib.model.load import load_base


def facts(variant):
    """{trainable, modules, trained_modules, moved, four_bit} of one adapter; moved: the largest change of a logit."""
    model, tokenizer = load_base(results("base_model") / "model", variant)
    batch = tokenizer("[INST] <<SYS>>\n\n<</SYS>>\n\n犬は好き? [/INST]", return_tensors="pt")
    before = model(**batch).logits.float()
    model = PeftModel.from_pretrained(model, results("finetune") / variant / "adapter", is_trainable=True)
    model.eval()
    after = model(**batch).logits.float()
    updates = [module.lora_B["default"].weight for module in model.modules() if hasattr(module, "lora_B")]
    return {
        "trainable": model.get_nb_trainable_parameters()[0],
        "modules": len(updates),
        "trained_modules": sum(bool(update.abs().max() > 0) for update in updates),
        "moved": float((after - before).abs().max()),
        "four_bit": sum(type(module).__module__.startswith("bitsandbytes") for module in model.modules()),
    }


print(json.dumps({variant: facts(variant) for variant in sys.argv[1:]}))
