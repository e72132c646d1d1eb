"""The execution of a run: processes, memory, compiler, reports (settings: system_settings.System)."""
