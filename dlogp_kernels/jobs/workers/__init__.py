"""Who computes the batches of a run: this process, several beside it, or actors of Ray; the run alone writes files."""
