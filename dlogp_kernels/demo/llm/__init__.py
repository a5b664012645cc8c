"""The demo on a real language model, SmolLM2-135M-Instruct: taught to solve word problems, then trained on answers."""
