"""One file per operation, defined by its plain-torch reference. Kernels never import the model."""
