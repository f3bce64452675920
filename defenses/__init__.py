"""Built-in defenses: every module here is scanned by the registry."""
