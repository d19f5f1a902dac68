"""What happens to a transaction before and after the models."""

import math
from datetime import datetime

import numpy as np

from servinggraph import InvalidRequest, signature

CATEGORIES = ("grocery", "fuel", "restaurant", "travel", "electronics", "gift_cards", "online")
COLUMNS = ("amount_ratio", "amount", "payments_last_hour", "km_from_last", "abroad", "night", *CATEGORIES)


@signature(outputs={"features": ("FP32", [1, len(COLUMNS)]), "transaction": ("BYTES", [1])})
def features(document):
    """Make a row of numbers of a transaction; what is missing or impossible is refused, with its name."""
    try:
        history = document["history"]
        amount, usual = float(document["amount"]), float(history["usual_amount"])
        payments, distance = float(history["payments_last_hour"]), float(history["km_from_last"])
        hour = datetime.fromisoformat(document["time"]).hour
        abroad, category, name = document["country"] != history["home"], document["category"], str(document["id"])
    except KeyError as error:
        raise InvalidRequest(f"a transaction needs {error}") from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"this is no transaction: {error}") from None
    if not (amount > 0 and usual > 0 and payments >= 0 and distance >= 0):
        raise InvalidRequest("amounts are above 0, 'payments_last_hour' and 'km_from_last' not below")
    if category not in CATEGORIES:
        raise InvalidRequest(f"category '{category}' is not one of {', '.join(CATEGORIES)}")
    row = [math.log(amount / usual), math.log(amount), payments, math.log1p(distance), abroad, hour < 5]
    row += [category == known for known in CATEGORIES]
    return {"features": np.array([row], np.float32), "transaction": np.array([name.encode()], object)}


def checked(document):
    """Give a transaction as it came; what is none is refused as `features` would."""
    features(document)
    return document


class Decide:
    """Turns the probability of fraud into a decision.

    Args:
        review: from this probability on somebody has to look.
        decline: from this one on the payment is refused.
    """

    def __init__(self, review=0.2, decline=0.7):
        self.review, self.decline = review, decline

    def __call__(self, value):
        """Give the decision as a document."""
        risk = float(value["probabilities"][0, 1])
        decision = "decline" if risk >= self.decline else "review" if risk >= self.review else "approve"
        return {"transaction": value["transaction"][0].decode(), "decision": decision, "risk": round(risk, 4)}
