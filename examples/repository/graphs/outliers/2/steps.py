"""Version 2: median and median deviation, which wild readings hardly move."""

import numpy as np

from servinggraph import signature

# What makes the median deviation of a normal distribution its standard deviation.
SCALE = 1.4826


@signature(outputs={"outlier": ("BOOL", [-1]), "limit": ("FP64", [2])})
def judge(value):
    readings = value["readings"]
    middle = np.median(readings)
    width = 3.5 * SCALE * np.median(np.abs(readings - middle))
    return {"outlier": np.abs(readings - middle) > width, "limit": np.array([middle - width, middle + width])}
