"""Card transactions, made up: a stream that is the same for the same seed. No real card, person or shop is behind it.

Each is a document as a payment system might put it on a topic, with what a feature store knows of the card. About one in
fifty is fraud, by a rule of thumb with chance in it: a burst of payments, far from the last one, abroad, at night, for more
than the card usually pays, in the kinds of shops where stolen cards are used.
"""

import math
import random
from datetime import UTC, datetime, timedelta

CATEGORIES = ("grocery", "fuel", "restaurant", "travel", "electronics", "gift_cards", "online")
RISKY = {"electronics": 0.8, "gift_cards": 1.6, "online": 0.5, "travel": 0.3}
COUNTRIES = ("DE", "FR", "NL", "PL", "ES", "US", "BR")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def transactions(seed, cards=500):
    """Give transactions without end, each with whether it is fraud: (document, bool)."""
    chance = random.Random(seed)
    usual = {f"c-{number:04d}": math.exp(chance.gauss(3.2, 0.6)) for number in range(cards)}
    home = {card: chance.choice(COUNTRIES[:4]) for card in usual}
    names = list(usual)
    now = BEGIN
    number = 0
    while True:
        number += 1
        now += timedelta(seconds=chance.expovariate(1 / 3))
        card = chance.choice(names)
        stolen = chance.random() < 0.03
        category = chance.choices(CATEGORIES, [2, 1, 2, 1, 4, 4, 4] if stolen else [8, 4, 6, 1, 2, 0.5, 5])[0]
        abroad = chance.random() < (0.5 if stolen else 0.06)
        document = {
            "id": f"t-{seed}-{number:07d}",
            "card": card,
            "time": (now + timedelta(hours=chance.choice([0, 0, 2]) if stolen else 0)).isoformat(timespec="seconds"),
            "amount": round(usual[card] * math.exp(chance.gauss(1.1 if stolen else 0, 0.7)), 2),
            "category": category,
            "country": chance.choice(COUNTRIES) if abroad else home[card],
            "history": {
                "home": home[card],
                "usual_amount": round(usual[card], 2),
                "payments_last_hour": chance.choices(range(6), [1, 2, 3, 3, 2, 1] if stolen else [30, 8, 3, 1, 0.2, 0.1])[0],
                "km_from_last": round(chance.expovariate(1 / (900 if stolen else 12)), 1),
            },
        }
        yield document, chance.random() < fraud_chance(document)


def fraud_chance(document):
    """Return how probable fraud is, by the rule of thumb that the models have to find."""
    history = document["history"]
    night = datetime.fromisoformat(document["time"]).hour < 5
    score = (
        -8.2
        + 1.1 * math.log(document["amount"] / history["usual_amount"])
        + 0.9 * history["payments_last_hour"]
        + 0.5 * math.log1p(history["km_from_last"])
        + 1.2 * (document["country"] != history["home"])
        + 0.7 * night
        + RISKY.get(document["category"], 0)
    )
    return 1 / (1 + math.exp(-1.6 * score))
