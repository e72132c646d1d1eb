"""One file per operation: the plain-torch reference is the definition. Kernels know torch only, never the
model."""
