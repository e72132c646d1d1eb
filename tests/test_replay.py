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
        "short/11", "--without", "model.residual.unet_skips", "--set", "schedule.steps=20", "--scale", "micro"
    ]
    assert replay.arguments_of({**START, "preset": "tiny-v2"}, ELSEWHERE) == ["tiny-v2"]


@pytest.mark.parametrize(
    "change",
    [
        "--out /tmp/elsewhere", "--save-checkpoint", "--set --out=/tmp/x", "--set", "-h", 7,
        "--set=schedule.steps=9 x"
    ],
)
def test_a_log_brings_no_other_option_to_the_trainer(change):
    with pytest.raises(UserError, match="is none of --with, --without, --set, --revert with a value"):
        replay.arguments_of({**START, "changes": [change]}, ELSEWHERE)


@pytest.mark.parametrize(
    "key, value", [("record", "--help"), ("scale", "-x"), ("preset", "--out"), ("record", 3)]
)
def test_a_name_of_a_log_is_no_option(key, value):
    with pytest.raises(UserError, match=f"the log's {key} .* is no name"):
        replay.arguments_of({**START, key: value}, ELSEWHERE)
