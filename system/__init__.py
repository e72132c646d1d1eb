"""The execution of a run: processes, memory, compiler, reports (settings: settings.system.System)."""
