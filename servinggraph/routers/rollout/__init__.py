"""Ramping a challenger up beside a baseline: the schedule, what is watched, the evidence that it hurts, the decision."""

from servinggraph.routers.rollout.schedule import Duration, RolloutStep, Share

__all__ = ["Duration", "RolloutStep", "Share"]
