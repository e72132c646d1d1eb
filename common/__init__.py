"""What every room stands on: files, prints, command lines, git, and the Python that runs it."""
