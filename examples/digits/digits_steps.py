"""What happens to a scan before and after the models."""

import numpy as np

from servinggraph import InvalidRequest, signature

INK = 16  # the scans have 17 shades, 0 is paper


@signature(inputs={"image": ("UINT8", [-1, 8, 8])}, outputs={"pixels": ("FP32", [-1, 64])})
def prepare(value):
    """Check the scans and give them as the models take them: a row each, from 0 to 1."""
    image = value["image"]
    if len(image) == 0:  # the network's export fails on no rows, and not in words that help a caller
        raise InvalidRequest("'image' holds no scan")
    bad = (image < 0) | (image > INK)  # a signed integer works as well, where the graph declares one
    if bad.any():
        scan, row, column = np.argwhere(bad)[0].tolist()
        found = f"{image[scan, row, column]} in row {row}, column {column} of scan {scan}"
        raise InvalidRequest(f"pixels of 'image' go from 0 to {INK}, but there is {found}")
    return {"pixels": image.reshape(-1, 64).astype(np.float32) / INK}


@signature(
    inputs={"probabilities": ("FP32", [-1, 10])},
    outputs={"label": ("INT64", [-1]), "confidence": ("FP32", [-1])},
)
def decide(value):
    """Give the most probable digit of each scan, and how probable it is."""
    probabilities = value["probabilities"]
    return {"label": probabilities.argmax(axis=1), "confidence": probabilities.max(axis=1)}
