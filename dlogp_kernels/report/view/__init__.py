"""Responses to look at: one page of HTML with every token and its numbers, which needs nothing else."""

#: Of responses with more tokens a page shows a sample: with all of these it has about 30 MB.
MAX_TOKENS = 400_000
