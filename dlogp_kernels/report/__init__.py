"""The data set of token statistics that jobs write and read, and the figures made of it."""
