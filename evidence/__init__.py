"""Claims: arms declared before the first run, interleaved, verified from their logs,
submitted and replayed."""
