"""How the project gets its Python, and what ./run.sh, ./test.sh and the installed commands start."""
