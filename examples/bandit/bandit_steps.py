"""Three ways to look at a scan."""

import numpy as np

from servinggraph import signature

PIXELS = {"pixels": ("FP32", [-1, 64])}


@signature(inputs={"image": ("UINT8", [-1, 8, 8])}, outputs=PIXELS)
def scale(value):
    """Give each scan as a row of 64 shades from 0 to 1."""
    return {"pixels": value["image"].reshape(-1, 64).astype(np.float32) / 16}


@signature(inputs=PIXELS, outputs=PIXELS)
def ink_or_paper(value):
    """Make every pixel black or white."""
    return {"pixels": (value["pixels"] > 0.5).astype(np.float32)}


@signature(inputs=PIXELS, outputs=PIXELS)
def coarse(value):
    """Give each block of 2x2 pixels its mean shade."""
    blocks = value["pixels"].reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4), keepdims=True)
    return {"pixels": np.broadcast_to(blocks, (len(blocks), 4, 2, 4, 2)).reshape(-1, 64).copy()}
