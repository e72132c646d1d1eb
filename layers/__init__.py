"""Parts of the model, a feature a file; primitives.py and specs.py are the ground floor. No part imports
model.py."""
