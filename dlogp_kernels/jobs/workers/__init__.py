"""Who computes what a run is made of: this process, several beside it, or actors of Ray; the run alone writes files."""
