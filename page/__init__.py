"""The parts of `records leaderboard`: facts (what is read), markdown, plot, worth, sections,
and the page's sources."""
