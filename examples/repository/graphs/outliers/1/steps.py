"""Version 1: mean and standard deviation. One wild reading moves both, and hides itself and others."""

import numpy as np

from servinggraph import signature


@signature(outputs={"outlier": ("BOOL", [-1]), "limit": ("FP64", [2])})
def judge(value):
    readings = value["readings"]
    middle, width = readings.mean(), 3 * readings.std()
    return {"outlier": np.abs(readings - middle) > width, "limit": np.array([middle - width, middle + width])}
