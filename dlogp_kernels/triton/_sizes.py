"""Integer arithmetic of launch code. (Triton's own functions for it take microseconds a call.)"""


def ceil_div(number: int, size: int) -> int:
    return -(-number // size)


def round_up(number: int, multiple: int) -> int:
    return ceil_div(number, multiple) * multiple


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
