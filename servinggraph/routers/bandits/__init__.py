"""What the `bandit` router is made of: its options, arms, one policy in each module, scorers, and what it remembers."""

from servinggraph.routers.bandits.arms import Arm, Number, Policy, RewardRange, added
from servinggraph.routers.bandits.epsilon_greedy import EpsilonGreedy
from servinggraph.routers.bandits.linucb import MAX_FEATURES, LinUcb, features_of
from servinggraph.routers.bandits.options import BanditOptions, policy_of
from servinggraph.routers.bandits.report import report_of
from servinggraph.routers.bandits.scorers import SCORERS, Scorer, scorer
from servinggraph.routers.bandits.thompson import BetaThompson, GaussianThompson
from servinggraph.routers.bandits.ucb1 import Ucb1
from servinggraph.routers.bandits.window import Answered, Answers, Window

__all__ = [
    "MAX_FEATURES",
    "SCORERS",
    "Answered",
    "Answers",
    "Arm",
    "BanditOptions",
    "BetaThompson",
    "EpsilonGreedy",
    "GaussianThompson",
    "LinUcb",
    "Number",
    "Policy",
    "RewardRange",
    "Scorer",
    "Ucb1",
    "Window",
    "added",
    "features_of",
    "policy_of",
    "report_of",
    "scorer",
]
