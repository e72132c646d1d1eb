"""How a run is executed, whatever it computes: memory, compiler, waiting. The settings of this axis are
settings.System."""
