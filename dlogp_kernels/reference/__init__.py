"""The definition of every op in plain PyTorch, from full rows of logits: slow, in float64 the truth of all tests."""
