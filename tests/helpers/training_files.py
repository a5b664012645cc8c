"""The log of a training that never was, as `dlogp train` writes it."""

import json

import numpy as np


def write_run(directory, seed, reweight="low_prob", steps=40, held_out=True, **settings):
    directory.mkdir()
    generator = np.random.default_rng(seed)
    manifest = {"identity": {"training": {"reweight": reweight, "alpha": 0.2, "seed": seed, "steps": steps} | settings}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    entries = [{"step": 0, "eval_accuracy": 0.2}] if held_out else []
    for step in range(1, steps + 1):
        entry = {"step": step, "entropy": 1 / step + 0.1 * generator.random(), "loss": 0.0}
        if step % 2:
            entry |= {"accuracy": step / steps + 0.1 * generator.random(), "length": 30.0 + step + seed}
        if held_out and step % 10 == 0:
            entry["eval_accuracy"] = step / steps + 0.01 * seed
        entries.append(entry)
    (directory / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return directory
