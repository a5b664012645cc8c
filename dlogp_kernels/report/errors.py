"""Errors of the data set, apart from it so that catching them loads nothing."""


class DatasetError(ValueError):
    """A directory that holds no data set of token statistics, or a broken one."""
