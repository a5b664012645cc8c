"""A tiny pair of real models (a base and what reinforcement learning made of it) and the task they solve."""
