"""A sweep of arms against one control, for tests of the statistics and of what is made of them."""

from typing import Any

from evidence import statistics

CONTROL = "the control"


def against_control(control: Any, arms: dict[Any, Any], **options: Any) -> dict:
    """evidence.statistics.successive with the control as every arm's parent. Rows are named by arm."""
    return statistics.successive({**arms, CONTROL: control}, [(name, CONTROL) for name in arms], **options)
