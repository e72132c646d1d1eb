"""Parts of the model, one file per feature, built on primitives.py and specs.py; none imports model.py."""
