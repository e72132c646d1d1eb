"""Laws of what `records replay` takes from a log into a command line."""

from pathlib import Path

import pytest

from common.errors import UserError
from evidence import replay

ELSEWHERE = Path("/elsewhere")
START = {"preset": "", "record": "short/11", "scale": "micro",
         "changes": ["--without model.residual.unet_skips", "--set schedule.steps=20"]}


def test_record_changes_and_scale_become_arguments():
    assert replay.arguments_of(START, ELSEWHERE) == [
        "short/11", "--without=model.residual.unet_skips", "--set=schedule.steps=20", "--scale", "micro"]
    assert replay.arguments_of({**START, "preset": "tiny-v2"}, ELSEWHERE) == ["tiny-v2"]


@pytest.mark.parametrize("change", [
    "--out /tmp/elsewhere", "--save-checkpoint", "--set --out=/tmp/x", "--set", "-h", 7,
    "--set=schedule.steps=9 x", "--set a=1\nb", "--set a=\0", "--set \x1b[2J"])
def test_a_log_brings_no_other_option_to_the_trainer(change):
    with pytest.raises(
        UserError, match="unknown change .*: changes are --set, --with, --without and --revert"
    ):
        replay.arguments_of({**START, "changes": [change]}, ELSEWHERE)
    with pytest.raises(UserError, match="its changes are no list"):
        replay.arguments_of({**START, "changes": change}, ELSEWHERE)


@pytest.mark.parametrize(
    "key, value, what",
    [("record", "--help", "record"), ("record", "short/../x", "record"), ("record", 3, "record"),
     ("record", "short/11\n", "record"), ("preset", "--out", "record"), ("scale", "-x", "scale"),
     ("scale", [], "scale")],
)
def test_a_name_of_a_log_is_no_option(key, value, what):
    with pytest.raises(UserError, match=f"is no {what}$"):
        replay.arguments_of({**START, key: value}, ELSEWHERE)
