"""The steps of another graph may be in a `steps.py` as well: each load has modules of its own."""


def convert(value):
    return {"fahrenheit": value["celsius"] * 9 / 5 + 32}
