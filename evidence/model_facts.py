"""What the settings of a run fix about its model and its tokens, to hold a log against them.

The model is built on the meta device, without storage, by this checkout's own code: nothing of a submission
is executed. Where torch is missing nothing can be counted, and the caller says so.
"""

import functools
import importlib.util
import json
from dataclasses import dataclass

import schedule
import settings
from common import files
from common.errors import UserError
from settings import schema
from settings.data import LOGICAL_RANKS

STREAM_TOKENS = 10 ** 8  # longest stream that is read again to take its digest: about a second each 10^7
# names in committed logs of numerics version 1 that renames.py does not know, because they were never keys of
# an initial value
FORMER = {"value_mix.value": "values.lam.value"}


@dataclass(frozen=True)
class Counts:
    """Numbers that a log tells of its model. names: of all parameters, as a probe names them."""
    parameters: int
    active_parameters: int
    flops_per_token: int
    names: frozenset


def counts(s: settings.Settings) -> Counts | None:
    """The Counts of the model of these settings, or None where torch is missing. UserError if it has none."""
    if importlib.util.find_spec("torch") is None:
        return None
    return counted(json.dumps(schema.plain(s), sort_keys=True))


@functools.lru_cache(maxsize=64)
def counted(text: str) -> Counts:
    """The Counts of settings as canonical JSON."""
    from model import without_values
    s = schema.from_plain(json.loads(text))
    try:
        model = without_values(s)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"the model of these settings cannot be built: {said}") from None
    return Counts(model.num_parameters(), model.num_active(), int(model.flops_per_token()),
                  frozenset(name for name, _ in model.named_parameters()))


def stream_digest(corpus: str, s: settings.Settings) -> str | None:
    """Digest of the token stream of a finished run on a corpus that this program carries itself.

    None for another corpus, or for a stream that is too long to be read again here.
    """
    if corpus != "sample" or schedule.tokens_before(s, s.schedule.steps) > STREAM_TOKENS:
        return None
    from data.stream import stream_arguments
    return read_stream(json.dumps(stream_arguments(s), sort_keys=True), s.schedule.steps)


@functools.lru_cache(maxsize=64)
def read_stream(arguments: str, steps: int) -> str:
    """Digest of the first steps of the embedded corpus, read with these arguments of data.stream.Stream."""
    from data.corpus import sample_corpus
    from data.stream import Stream, stream_digest
    stream = Stream(sample_corpus(files.default_cache()), ranks=range(LOGICAL_RANKS),
                    **json.loads(arguments))
    for _ in range(steps):
        stream.next()
    return stream_digest(stream.rank_digests())
