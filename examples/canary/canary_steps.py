"""The steps around the models: scaling, a way to break the new one, and what its guardrail watches."""

from pathlib import Path

import numpy as np

from servinggraph import Context, signature

BROKEN = Path(__file__).with_name("broken")


@signature(inputs={"image": ("UINT8", [-1, 8, 8])}, outputs={"pixels": ("FP32", [-1, 64])})
def prepare(value):
    """Give the scans as the models take them: a row each, from 0 to 1."""
    return {"pixels": value["image"].reshape(-1, 64).astype(np.float32) / 16}


@signature(inputs={"pixels": ("FP32", [-1, 64])}, outputs={"pixels": ("FP32", [-1, 64])})
def gate(value):
    """Let requests through, unless there is a file called `broken`: then the deployment has gone wrong."""
    if BROKEN.exists():
        raise RuntimeError("the weights do not fit the network")
    return value


@signature(
    inputs={"label": ("INT64", [-1]), "probabilities": ("FP32", [-1, 10])},
    outputs={"label": ("INT64", [-1]), "probabilities": ("FP32", [-1, 10])},
)
def sure(value, context: Context):
    """Observe how sure the model was."""
    context.observe("confidence", float(value["probabilities"].max(axis=1).mean()))
    return value
